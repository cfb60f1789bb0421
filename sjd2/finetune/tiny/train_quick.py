"""The whole embedded model in one go, smaller: VQGAN, model and SJD2 fine-tuning, one after the other."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from sjd2.finetune.next_clean import FinetuneSJD2
from sjd2.finetune.recipe import Recipe
from sjd2.finetune.tiny.scene_data import SceneTokens
from sjd2.finetune.tiny.train_ar import TrainAR
from sjd2.finetune.tiny.train_vq import TrainVQ
from sjd2.finetune.trainer import Log, Metrics
from sjd2.models.chameleon import ChameleonSpec


@dataclass(kw_only=True)
class Quick(Recipe):
    """Train the three parts, each on the result of the one before; a killed training resumes where it was.

    model: how the trained parts are put together, as in conf/model/tiny.yaml.
    """

    vq: TrainVQ
    ar: TrainAR
    sjd2: FinetuneSJD2
    model: ChameleonSpec

    def usage(self, result: Path) -> str:
        """Return the settings of a command that uses the result."""
        return f"model.weights={result}/model model.vq_weights={result}/vq model.adapter={result}/sjd2"

    def run(self, *, out: Path, log: Log | None, device: str, seed: int, model: None = None) -> Metrics:
        """Write out/final/{vq,model,sjd2} and return the metrics of all parts; their curves follow each other."""
        metrics, offset = {}, 0

        def follow(step: int, values: Metrics) -> None:
            if log is not None:
                log(offset + step, values)

        vq, ar, adapter = (out / part / "final" for part in ("vq", "ar", "sjd2"))
        metrics |= _named("vq", self.vq.run(out=vq.parent, log=follow, device=device, seed=seed))
        offset += self.vq.steps
        recipe = replace(self.ar, vq_weights=str(vq))
        metrics |= _named("ar", recipe.run(out=ar.parent, log=follow, device=device, seed=seed))
        offset += self.ar.steps
        loaded = replace(self.model, weights=str(ar), vq_weights=str(vq), adapter=None).load(device)
        tuning = replace(self.sjd2, data=SceneTokens(vq_weights=str(vq)))
        metrics |= _named("sjd2", tuning.run(model=loaded, out=adapter.parent, log=follow, device=device, seed=seed))
        for name, part in (("vq", vq), ("model", ar), ("sjd2", adapter)):
            shutil.copytree(part, out / "final" / name, dirs_exist_ok=True)
        return metrics


def _named(part: str, metrics: Metrics) -> Metrics:
    return {f"{part}/{name}": value for name, value in metrics.items()}
