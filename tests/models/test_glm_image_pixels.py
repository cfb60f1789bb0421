"""GLM-Image's diffusion stage on a small random checkpoint in the public layout: diffusers' pipeline gets our tokens."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation.run_folder import RunFolder
from sjd2.errors import UserError
from sjd2.models.glm_image_pixels import DiffusionSettings, DiffusionStage, upsampled
from tests.helpers import checkpoints_glm_image
from tests.helpers.checkpoints_glm_image_pixels import write_diffusion
from tests.helpers.cli import Cli

CPU = torch.device("cpu")
CODES = torch.randint(64, (3, 2, 3), generator=torch.Generator().manual_seed(1))  # 64 x 96 pixels
PROMPTS = ["a dog", "a sign that reads 'stop'", 'two signs, "left" and "right"']
SEEDS = [5, 2**62 + 3, 7]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_diffusion(tmp_path_factory.mktemp("glm-image"))


@pytest.fixture(scope="module")
def stage(checkpoint: Path) -> DiffusionStage:
    return DiffusionStage(checkpoint, DiffusionSettings(steps=2), CPU, torch.float32)


@pytest.mark.full
def test_an_image_depends_on_its_own_tokens_prompt_and_seed_only(stage: DiffusionStage) -> None:
    images = stage.draw(CODES, PROMPTS, SEEDS)
    assert images.shape == (3, 3, 64, 96)
    assert images.dtype == torch.uint8
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(stage.draw(CODES[one], PROMPTS[one], SEEDS[one])[0], images[row])
    codes = CODES[1:2].clone()
    codes[0, 1, 2] = (codes[0, 1, 2] + 1) % 64
    changed = [
        (codes, PROMPTS[1], 2**62 + 3),
        (CODES[1:2], "a sign that reads 'go'", 2**62 + 3),
        (CODES[1:2], PROMPTS[1], 8),
    ]
    for tokens, prompt, seed in changed:
        assert not torch.equal(stage.draw(tokens, [prompt], [seed])[0], images[1])


@pytest.mark.full
def test_pixels_are_those_of_the_public_pipeline(stage: DiffusionStage) -> None:
    prior = stage.pipeline._upsample_token_ids(CODES[1].flatten(), 2, 3)  # what the pipeline makes of its own tokens
    assert torch.equal(prior[0], upsampled(CODES[1]))
    generator = torch.Generator().manual_seed(SEEDS[1])
    image = stage.pipeline(
        PROMPTS[1],
        height=64,
        width=96,
        num_inference_steps=2,
        generator=generator,
        prior_token_ids=prior,
        output_type="pil",
    ).images[0]
    drawn = stage.draw(CODES[1:2], PROMPTS[1:2], SEEDS[1:2])[0]
    assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), drawn)


@pytest.mark.full
def test_steps_guidance_and_warm_up(stage: DiffusionStage, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    monkeypatch.setattr(stage.pipeline.transformer, "forward", count(stage.pipeline.transformer.forward, passes))
    stage.draw(CODES[:1], PROMPTS[:1], SEEDS[:1])
    assert len(passes) == 4  # two steps, each with and without the prompt
    monkeypatch.setattr(stage, "settings", DiffusionSettings(steps=50, guidance_scale=1.0))
    stage.warm_up(CODES[:1])
    assert len(passes) == 6
    monkeypatch.setattr(
        stage.pipeline.transformer, "forward", lambda *_args, **_kw: (torch.full((1, 4, 8, 12), torch.nan),)
    )
    with pytest.raises(UserError, match="pixels that are not finite"):
        stage.warm_up(CODES[:1])


def count(forward, passes: list):
    def counted(*args, **keywords):
        passes.append(1)
        return forward(*args, **keywords)

    return counted


@pytest.mark.full
def test_missing_tensors_are_an_error_and_never_noise(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    for name, tensor in (
        ("vae", "decoder.conv_in.bias"),
        ("transformer", "proj_out.bias"),
        ("text_encoder", "encoder.final_layer_norm.weight"),  # the first to be loaded
    ):
        (file,) = (tmp_path / name).glob("*.safetensors")
        tensors = load_file(file)
        tensors.pop(tensor)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"=\S+ lacks 1 of the {name}'s tensors, e\.g\. {tensor}\.$"):
            DiffusionStage(tmp_path, DiffusionSettings(), CPU, torch.float32)
    monkeypatch.setattr("sjd2.models.glm_image_pixels.free_bytes", lambda _device: 10)
    with pytest.raises(UserError, match=r"takes 0\.0 GB and cpu has 0\.0 GB free; use model\.pixels=none for tokens"):
        DiffusionStage(checkpoint, DiffusionSettings(), CPU, torch.float32)


def test_settings_and_library_are_checked_before_anything_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"steps": 0}, {"guidance_scale": 0.5}):
        with pytest.raises(UserError, match=r"model\.diffusion_(steps|guidance) must be 1"):
            DiffusionSettings(**wrong).check()
    with pytest.raises(UserError, match=r"^model\.diffusion_device: unknown device 'gpu'"):
        DiffusionSettings(device="gpu").check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"need diffusers: pip install -e '\.\[glm\]', or set model\.pixels=none"):
        DiffusionSettings().check()


@pytest.mark.full
def test_a_run_times_both_stages(cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sjd2.models.glm_image.PREVIEW", 4)  # 12 codes instead of 238
    folder = checkpoints_glm_image.write(tmp_path / "weights")
    settings = checkpoints_glm_image.settings(folder) | {"pixels": "decode", "diffusion_steps": 3}
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    words = [f"model.{key}={value}" for key, value in settings.items()]
    words += [
        "model=glm-image",
        "decoder=sjd",
        "prompts=file",
        f"prompts.path={tmp_path / 'prompts.txt'}",
        "batch_size=2",
    ]
    assert cli(*words) == 1
    assert "has no model_index.json, so it is not a folder of these weights" in cli.err
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    assert cli(*words) == 0
    for column in ("AR stage s", "AR stage speed-up", "diffusion s", "whole image s", "whole speed-up"):
        assert column in cli.out
    (path,) = cli.runs_dir.glob("glm-image-sjd-*")
    run = RunFolder(path)
    stage = DiffusionStage(folder, DiffusionSettings(steps=3), CPU, torch.float32)
    for record, prompt, image in zip(run.records(), PROMPTS, run.images(), strict=False):
        assert list(record["seconds"]) == ["encode", "prefill", "decode", "diffusion"]
        codes = torch.from_numpy(run.tokens(record))[None, 12:32].long().view(1, 4, 5)  # after the preview
        assert torch.equal(
            torch.from_numpy(image.copy()).permute(2, 0, 1), stage.draw(codes, [prompt], [record["seed"]])[0]
        )
    assert run.metrics["whole_latency_s_median"] > run.metrics["seconds_diffusion_mean"] > 0
