"""What all trainings share: settings, the order of a run, what they declare, and keys of files that must not change."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
import torch
from omegaconf import OmegaConf

from baselines.eagle.head import EagleSettings
from baselines.eagle.train import FinetuneEagle
from sjd2.config import CONF, compose, instantiate
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError
from sjd2.finetune.data.generated import FileCaptions, Generated, _text
from sjd2.finetune.recipe import ParallelRecipe, Recipe, Training, TrainRecipe
from sjd2.finetune.trainer import Metrics, Piece
from tests.helpers.small_training import spec

# name of `finetune=`: (starts from a model, runs under torchrun)
DECLARED = {
    "ar": (False, False),
    "attributes": (False, False),
    "clip": (False, False),
    "eagle": (True, True),
    "front": (True, False),
    "quick": (False, False),
    "sjd2": (True, True),
    "sjd2-paper": (True, True),
    "vq": (False, False),
}


@dataclass(kw_only=True)
class Line(TrainRecipe):
    """A training of one weight, which notes what is called."""

    calls: list[str] = field(default_factory=list)

    def prepare(self, model: Any, out: Path) -> None:
        self.calls.append("prepare")

    def build_training(self, model: Any, *, out: Path, device: str, seed: int) -> Training:
        self.calls.append("build")
        line = torch.nn.Linear(1, 1)

        def loss(step: int) -> Piece:
            return line(torch.ones(1)).square().sum(), {"seen": 1.0}

        def validate() -> Metrics:
            self.calls.append("validate")
            return {"weight": line.weight.item()}

        def finish(folder: Path) -> Metrics:
            self.calls.append(f"finish {folder.name}")
            return validate()

        return Training(
            module=line,
            optimizers=[torch.optim.SGD(line.parameters(), 0.1)],
            loss=loss,
            validate=validate,
            finish=finish,
            after_step=lambda done: self.calls.append(f"step {done}"),
        )


def test_a_run_prepares_builds_trains_validates_and_finishes(tmp_path: Path) -> None:
    recipe = Line(steps=5, batch_size=1, validate_every=2)
    metrics = recipe.run(out=tmp_path, log=None, device="cpu", seed=0)
    steps = ["step 1", "step 2", "validate", "step 3", "step 4", "validate", "step 5", "validate"]
    assert recipe.calls == ["prepare", "build", *steps, "finish final", "validate"]
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [2, 4, 5]
    assert [line["seen"] for line in curve] == [1.0, 1.0, 1.0]  # means, whatever the number of steps between reports
    assert curve[-1]["weight"] == metrics["weight"]
    other = Line(steps=5, batch_size=1, validate_every=100)
    assert other.run(out=tmp_path / "other", log=None, device="cpu", seed=0) == metrics


@pytest.mark.parametrize("name", ["steps", "batch_size", "validate_every"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"finetune\.{name} must be 1 or more, got 0"):
        Line(**({"steps": 1, "batch_size": 1} | {name: 0}))


def test_every_training_is_a_recipe_that_declares_what_it_needs() -> None:
    files = {path.stem: path for path in (CONF / "finetune").glob("*.yaml")}
    assert files.keys() == DECLARED.keys()
    for name, path in files.items():
        target = hydra.utils.get_class(OmegaConf.load(path)._target_)
        assert issubclass(target, Recipe)
        assert (target.needs_model, target.parallel) == DECLARED[name]


def test_keys_of_drawn_images_are_those_of_release_0_1() -> None:
    """A renamed class must not draw thousands of images again."""
    text = "Sampling(guidance_scale=3.0, temperature=1.0, top_k=0, top_p=1.0, sampler='cdf')"
    assert _text(SamplingParams(guidance_scale=3.0)) == text


def test_missing_captions_are_reported_before_a_model_loads(tmp_path: Path) -> None:
    data = Generated(captions=FileCaptions(path=str(tmp_path / "none.txt")), images=2)
    recipe = FinetuneEagle(head=EagleSettings(), data=data, steps=1, batch_size=1, lr=0.1)
    with pytest.raises(UserError, match=r"none\.txt does not exist"):
        recipe.check(None)


def test_training_switches_the_attention_without_a_warning(place: Path) -> None:
    model, heard = spec(place).load("cpu"), []
    usual = model.transformer.config._attn_implementation
    handler = logging.Handler()
    handler.emit = heard.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        with ParallelRecipe.attention(object.__new__(ParallelRecipe), model):
            assert model.transformer.config._attn_implementation == "eager"
        assert model.transformer.config._attn_implementation == usual != "eager"
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert heard == []


@pytest.mark.parametrize(("name", "settings"), [("sjd2", "decoder=sjd2 model.adapter=there"),
                                                ("sjd2-paper", "decoder=sjd2-paper model.adapter=there"),
                                                ("eagle", "decoder=eagle decoder.drafter.weights=there"),
                                                ("front", "decoder=sjd-fc decoder.drafter.weights=there")])  # fmt: skip
def test_a_training_names_the_settings_that_use_its_result(name: str, settings: str) -> None:
    images = ["finetune.data.images=somewhere"] if name == "sjd2-paper" else []  # which has no default
    recipe = instantiate(compose([f"finetune={name}", *images]).finetune)
    assert recipe.usage(Path("there")) == settings
