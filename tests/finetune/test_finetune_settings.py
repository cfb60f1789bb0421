"""The settings of fine-tuning: defaults per model, any data, the numbers of the paper."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sjd2.config import CONF, check_node, instantiate
from sjd2.finetune.data.tokens import ImageTokens
from tests.helpers.small_training import settings

RECIPES = sorted(path for path in (CONF / "finetune_defaults").glob("*.yaml"))
MODELS = {path.stem for path in (CONF / "model").glob("*.yaml")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_reach_their_model_and_the_command_line_wins(path: Path) -> None:
    model = next(model for model in MODELS if path.stem.endswith(f"-{model}"))
    name = path.stem.removesuffix(f"-{model}")
    head = [line for line in path.read_text().splitlines()[:8] if line.startswith("#")]
    assert any(f"finetune={name} model={model}" in line for line in head)
    words = () if name == "front" else ("finetune.machine.micro_batch=3", "finetune.machine.checkpoint_s=7")
    cfg = settings("stage=finetune", f"finetune={name}", f"model={model}", *words)
    check_node(cfg.finetune)
    assert cfg.dtype == "auto"
    assert cfg.run_dir == f"runs/finetune-{name}-{cfg.model.name}"
    if cfg.guidance_scale == 1:  # no guidance, so no empty prompts
        assert cfg.finetune.get("unconditional", 0) == 0
        assert list(cfg.finetune.data.get("scales", [1])) == [1]
    if name == "front":
        return
    assert OmegaConf.load(path).finetune.machine.micro_batch != cfg.finetune.machine.micro_batch == 3
    assert cfg.finetune.machine.checkpoint_s == 7  # set by what recipes share
    if name != "eagle":
        assert cfg.finetune.batch_size == 64
        assert cfg.finetune.data._target_.endswith("ImageTokens")


def test_any_recipe_takes_any_data(place: Path) -> None:
    """No setting of one kind of data may remain for the other."""
    given = "+finetune.data={_target_: sjd2.finetune.data.tokens.ImageTokens, images: " + str(place / "shards") + "}"
    for name, model in (("eagle", "janus"), ("sjd2", "tiny")):
        more = ("decoder=scd",) if name == "eagle" else ()
        cfg = settings("stage=finetune", f"finetune={name}", f"model={model}", "~finetune.data", given, *more)
        check_node(cfg.finetune)
        assert isinstance(instantiate(cfg.finetune).data, ImageTokens)
    own = settings(
        "stage=finetune", "finetune=eagle", "model=janus", "finetune.data.captions.path=x.txt", "decoder=scd",
        "+finetune.data.decoder=${decoder}",
    )  # fmt: skip
    data = instantiate(own.finetune).data
    assert (data.decoder.name, data.scales) == ("scd", [own.guidance_scale])


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    tuned = settings("stage=finetune", "finetune=sjd2-paper").finetune
    assert (tuned.batch_size, tuned.lr, tuned.epochs, tuned.steps) == (64, 2e-5, 6, None)
    assert (tuned.adapter.kind, tuned.adapter.code, tuned.context) == ("full", "appended", "in_place")
    assert settings("stage=finetune", "finetune=sjd2").get("run_dir") is None  # the embedded model's stays as it was
