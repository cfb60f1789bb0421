"""The whole embedded model in one go, smaller: VQGAN, model and SJD2 fine-tuning, one after the other."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from sjd2.finetune.next_clean import FinetuneSJD2
from sjd2.finetune.trainer import Log
from sjd2.models.chameleon import ChameleonSpec
from sjd2.models.tiny.data import SceneTokens
from sjd2.models.tiny.train_ar import TrainAR
from sjd2.models.tiny.train_vq import TrainVQ


@dataclass(kw_only=True)
class Quick:
    """Train the three parts, each on the result of the one before; a killed training goes on where it was.

    model: how the trained parts are put together, as in conf/model/tiny.yaml.
    """

    vq: TrainVQ
    ar: TrainAR
    sjd2: FinetuneSJD2
    model: ChameleonSpec

    def run(self, *, out: Path, log: Log | None, device: str, seed: int) -> dict[str, float]:
        """Write out/final/{vq,model,sjd2} and return the figures of all parts; their curves follow each other."""
        figures, offset = {}, 0

        def follow(step: int, values: dict[str, float]) -> None:
            if log is not None:
                log(offset + step, values)

        vq, model, adapter = (out / part / "final" for part in ("vq", "ar", "sjd2"))
        figures |= _named("vq", self.vq.run(out=vq.parent, log=follow, device=device, seed=seed))
        offset += self.vq.steps
        ar = replace(self.ar, vq_weights=str(vq))
        figures |= _named("ar", ar.run(out=model.parent, log=follow, device=device, seed=seed))
        offset += self.ar.steps
        spec = replace(self.model, weights=str(model), vq_weights=str(vq), adapter=None)
        recipe = replace(self.sjd2, data=SceneTokens(vq_weights=str(vq)))
        loaded = spec.load(device)
        figures |= _named("sjd2", recipe.run(model=loaded, out=adapter.parent, log=follow, device=device, seed=seed))
        for name, part in (("vq", vq), ("model", model), ("sjd2", adapter)):
            shutil.copytree(part, out / "final" / name, dirs_exist_ok=True)
        return figures


def _named(part: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{part}/{name}": value for name, value in figures.items()}
