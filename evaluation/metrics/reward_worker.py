"""Score images with the ImageReward package, in an interpreter that has it; run by rewards.py, imports nothing of ours.

    PYTHON evaluation/metrics/reward_worker.py PAIRS OUT WEIGHTS MED_CONFIG DEVICE

PAIRS: one {"image": path, "prompt": text} per line; OUT: one number per line, in their order. An empty WEIGHTS or MED_CONFIG
means that the package fetches its own.
"""

import json
import sys


def main(pairs: str, out: str, weights: str, med_config: str, device: str) -> None:
    """Write one score per pair."""
    sys.path.pop(0)  # this file's folder has a clip.py, which is not the package clip that ImageReward imports
    import ImageReward  # pyright: ignore[reportMissingImports]  of the other interpreter

    model = ImageReward.load(weights or "ImageReward-v1.0", device=device, med_config=med_config or None)
    with open(pairs, encoding="utf-8") as lines:
        scores = [model.score(pair["prompt"], pair["image"]) for pair in map(json.loads, lines)]
    with open(out, "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(float(score))}\n" for score in scores)


if __name__ == "__main__":
    main(*sys.argv[1:])
