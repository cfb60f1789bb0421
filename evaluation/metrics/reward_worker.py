"""Score images with the package of a reward, in an interpreter that has it; run by workers.py, imports nothing of ours.

    PYTHON evaluation/metrics/reward_worker.py NAME PAIRS OUT OPTIONS

NAME: one of SCORERS; PAIRS: one {"image": path, "prompt": text} per line; OUT: one number per line, in their order. OPTIONS:
JSON; null for what the package is to fetch or choose itself.
"""

from __future__ import annotations

import json
import sys
from typing import Any

Pairs = list[dict[str, str]]


def image_reward(pairs: Pairs, device: str, weights: str | None, med_config: str | None) -> list[Any]:
    """Score with ImageReward."""
    import ImageReward  # pyright: ignore[reportMissingImports]  of the other interpreter

    model = ImageReward.load(weights or "ImageReward-v1.0", device=device, med_config=med_config)
    return [model.score(pair["prompt"], pair["image"]) for pair in pairs]


def hpsv3(pairs: Pairs, device: str, weights: str | None) -> list[Any]:
    """Score with HPSv3: the mean of the normal distribution that it predicts."""
    from hpsv3 import HPSv3RewardInferencer  # pyright: ignore[reportMissingImports]  of the other interpreter

    model = HPSv3RewardInferencer(checkpoint_path=weights, device=device)
    # by name: the order of these arguments has changed between releases
    rewards = (model.reward(prompts=[pair["prompt"]], image_paths=[pair["image"]])[0] for pair in pairs)
    return [reward[0] if len(getattr(reward, "shape", ())) else reward for reward in rewards]  # [mean, deviation]


def vqascore(pairs: Pairs, device: str, model: str) -> list[Any]:
    """Score with VQAScore: the probability that the answer is yes."""
    import t2v_metrics  # pyright: ignore[reportMissingImports]  of the other interpreter

    judge = t2v_metrics.VQAScore(model=model, device=device)
    return [judge(images=[pair["image"]], texts=[pair["prompt"]])[0][0] for pair in pairs]


SCORERS = {"image_reward": image_reward, "hpsv3": hpsv3, "vqascore": vqascore}


def main(name: str, given: str, out: str, options: str) -> None:
    """Write one score per pair."""
    sys.path.pop(0)  # this file's folder has a clip.py, which is not the package clip that ImageReward imports
    with open(given, encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in lines]
    scores = SCORERS[name](pairs, **json.loads(options))
    with open(out, "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(float(score))}\n" for score in scores)


if __name__ == "__main__":
    main(*sys.argv[1:])
