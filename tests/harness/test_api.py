"""The Python API on the embedded model: a handful of lines, and clear words for wrong ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import sjd2
from sjd2.config import compose, instantiate
from sjd2.decoding.cuda_graph import Graphs, usual_graphs
from sjd2.decoding.generate import StepInfo, warm_up
from sjd2.devices import resolve_dtype
from sjd2.errors import UserError
from sjd2.files import ROOT
from tests.helpers import tape
from tests.helpers.bounded_spans import as_on_a_gpu

PROMPTS = [
    "a large red circle above a small blue square on a plain teal background",
    "two large green triangles on a plain gray background",
]


@pytest.fixture(scope="module")
def model():
    return sjd2.load("tiny")


@pytest.mark.parametrize("prompts", [3, ["a dog", 3], None, [], b"a dog"], ids=str)
def test_prompts_that_are_no_text_are_answered_in_a_sentence(model, prompts) -> None:
    with pytest.raises(UserError, match=r"prompts are one text or a list of texts|at least one prompt"):
        sjd2.generate(model, prompts)


def test_a_window_longer_than_the_image_is_refused(model) -> None:
    with pytest.raises(UserError, match=r"decoder.window=145 is longer than the image, which has 144 tokens"):
        sjd2.generate(model, "a dog", decoder="scd", window=145)


def test_a_few_lines_give_images_tokens_and_passes(model) -> None:
    result = sjd2.generate(model, PROMPTS)
    assert result.images.shape == (2, 3, 48, 48)
    assert result.images.dtype == torch.uint8
    assert result.tokens.shape == (2, 144)
    assert all(sum(passes) == 144 for passes in result.accepted)
    assert max(result.forwards) < 100
    with pytest.raises(UserError, match="a file is in the way of"):
        result.save(__file__)


def test_decoders_by_name_and_setting(model) -> None:
    narrow = sjd2.decoder("scd", window=4)
    result = sjd2.generate(model, PROMPTS[:1], decoder=narrow, guidance_scale=1.0)
    assert max(result.accepted[0]) <= 4


@pytest.mark.full
def test_gumbel_matching_on_the_real_backbone_in_float64() -> None:
    model = sjd2.load("tiny", dtype="float64")
    expected = sjd2.generate(model, PROMPTS, decoder="ar", sampler="gumbel", seed=3)
    for name in ("sjd", "scd", "sjd2"):
        got = sjd2.generate(model, PROMPTS, decoder=name, sampler="gumbel", seed=3)
        assert torch.equal(got.tokens, expected.tokens)
        assert sum(got.forwards) < sum(expected.forwards) / 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: sjd2.load("tinny"), "did you mean 'tiny'"),
        (lambda m: sjd2.load("tiny", dtype="foo"), "float32"),
        (lambda m: sjd2.load("tiny", wights="x"), "weights"),
        (lambda m: sjd2.decoder("sjd3"), "sjd2"),
        (lambda m: sjd2.decoder("sjd", widow=3), "window"),
        (lambda m: sjd2.load("tiny", device="cuda:99"), "not available"),
        (lambda m: sjd2.load("tiny", device="gpu"), "unknown device 'gpu'"),
        (lambda m: sjd2.decoder("sjd", model="lumna"), "did you mean 'lumina'"),
        (lambda m: sjd2.decoder("sjd", refiner="couple"), "did you mean 'coupled'"),
        (lambda m: sjd2.generate(m, PROMPTS, decoder="sjd", widow=3), "did you mean 'window'"),
        (lambda m: sjd2.generate(m, PROMPTS, decoder=sjd2.decoder("sjd"), window=3), "unknown setting 'window'"),
        (lambda m: sjd2.generate("tiny", PROMPTS), r"sjd2.load\('tiny'\)"),
        (lambda m: sjd2.generate(PROMPTS, m), "the model first, then prompts"),
        (lambda m: sjd2.generate("a dog", m), "the model first, then prompts"),
        (lambda m: sjd2.generate(m, PROMPTS, temperature="hot"), "temperature must be a finite number, got 'hot'"),
        (lambda m: sjd2.generate(m, PROMPTS, top_k=2.5), "top_k must be a whole number, got 2.5"),
        (lambda m: sjd2.generate(m, PROMPTS, seed="x"), "seed must be a whole number, got 'x'"),
        (lambda m: sjd2.generate(m, PROMPTS, decodr="sjd"), "did you mean 'decoder'.*on_step"),
        (lambda m: sjd2.generate(m, PROMPTS, decoder=sjd2.decoder("sjd"), sed=3), "did you mean 'seed'"),
        (lambda m: sjd2.generate(m, []), "at least one prompt"),
        (lambda m: sjd2.generate(m, PROMPTS, guidance=2), "guidance_scale"),
        (lambda m: sjd2.generate(m, PROMPTS, top_k=1000), "vocabulary of 512"),
        (lambda m: sjd2.generate(m, PROMPTS, decoder=sjd2.decoder("sjd2", window=1)), "window of 2"),
        (lambda m: sjd2.generate(m, PROMPTS, decoder=sjd2.decoder("sjd2", steps=31)), "fewer"),
        (lambda m: sjd2.generate(m, PROMPTS, decoder=sjd2.decoder("sjd2", levels="slot")), "clean"),
    ],
)
def test_wrong_calls_name_the_fix(model, call, words: str) -> None:
    with pytest.raises(UserError, match=words):
        call(model)


def test_sjd2_without_a_fine_tuning_names_the_fixes() -> None:
    model = sjd2.load("tiny", adapter=None)
    with pytest.raises(UserError, match=r"finetune=sjd2.*decoder=scd"):
        sjd2.generate(model, PROMPTS)


# ---- what a user meets


def test_the_package_lists_what_it_offers() -> None:
    offered = dir(sjd2)
    assert {"load", "generate", "decoder", "list_decoders", "list_models", "__version__"} <= set(offered)
    assert all(hasattr(sjd2, name) for name in offered)
    assert {"ar", "sjd2", "scd"} <= set(sjd2.list_decoders())
    assert {"tiny", "lumina"} <= set(sjd2.list_models())


def test_a_decoder_has_the_defaults_of_the_model_at_hand() -> None:
    assert sjd2.decoder("sjd2", model="lumina").window == 96
    assert sjd2.decoder("sjd2", model="lumina", window=8).window == 8
    assert sjd2.decoder("sjd2").window == 32


def test_generate_takes_the_defaults_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sjd2.load("tiny")
    asked = {}

    def see(_model: object, decoder: object, *_: object, **__: object) -> None:
        asked["window"] = decoder.window
        raise KeyboardInterrupt

    monkeypatch.setattr("sjd2.api.run_decoder", see)
    for name in ("tiny", "lumina", "else"):
        object.__setattr__(model.spec, "name", name)
        with pytest.raises(KeyboardInterrupt):
            sjd2.generate(model, PROMPTS, decoder="sjd2")
        assert asked["window"] == sjd2.decoder("sjd2", model=name if name != "else" else None).window
    assert len({sjd2.decoder("sjd2", model=name).window for name in ("tiny", "lumina")}) == 2


def test_a_part_by_name() -> None:
    assert type(sjd2.decoder("sjd", refiner="coupled").refiner).__name__ == "Coupled"


def test_one_prompt_and_a_torch_dtype(tmp_path: Path) -> None:
    model = sjd2.load("tiny", dtype=torch.float64, device="auto" if not torch.cuda.is_available() else "cpu")
    assert repr(model) == "Chameleon(144 tokens an image, 512 codes, cpu, torch.float64)"
    result = sjd2.generate(model, PROMPTS[0], decoder="scd", window=16)
    assert len(result) == 1
    assert repr(result).startswith("Images(1 of 48x48 pixels, 144 tokens each, scd: ")
    assert len(repr(result)) < 120
    assert result.step_compression == pytest.approx(144 / result.forwards[0])
    (image,) = result.pil
    assert image.size == (48, 48)
    folder = result.save(tmp_path / "new" / "folder")
    assert sorted(path.name for path in folder.iterdir()) == ["0000.png", "images.json", "tokens.npy"]
    assert np.array_equal(np.load(folder / "tokens.npy"), result.tokens.numpy())
    assert json.loads((folder / "images.json").read_text())["prompts"] == PROMPTS[:1]


def test_threads_of_torch_are_as_before(model) -> None:
    before, during = torch.get_num_threads(), []
    sjd2.generate(model, PROMPTS[0], decoder="scd", on_step=lambda info: during.append(torch.get_num_threads()))
    assert set(during) == {1}
    assert torch.get_num_threads() == before


def test_a_terminal_gets_a_bar(model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    passes: list[int] = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    sjd2.generate(model, PROMPTS[0], decoder="scd", on_step=lambda info: passes.append(info.pass_index))
    assert "tokens" in capsys.readouterr().err
    assert passes == list(range(1, len(passes) + 1))
    sjd2.generate(model, PROMPTS[0], decoder="scd", progress=False)
    assert capsys.readouterr().err == ""


def test_inside_a_hydra_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's own @hydra.main of an older version_base: nothing of it changes."""
    done = []

    def app(_cfg: object) -> None:
        outer, version, own = GlobalHydra.instance().hydra, hydra.version.getbase(), HydraConfig.get()
        assert sjd2.load("tiny").layout.length == 144
        assert sjd2.decoder("lantern", model="tiny", verifier="exact", window=4).window == 4
        assert GlobalHydra.instance().hydra is outer
        assert HydraConfig.get() is own
        assert hydra.version.getbase() == version
        done.append(version)

    GlobalHydra.instance().clear()
    monkeypatch.chdir(tmp_path)
    quiet = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    monkeypatch.setattr(sys, "argv", ["app.py", *quiet])
    hydra.main(version_base="1.2", config_path=None)(app)()
    assert len(done) == 1


# ---- the examples


@pytest.mark.full
def test_the_python_example(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "python_api.py"), "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "times fewer forward passes than AR" in done.stdout
    assert (tmp_path / "out" / "0001.png").is_file()


@pytest.mark.full
def test_the_notebook_runs_from_top_to_bottom() -> None:
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # committed without results
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert sum(b - a for a, b in zip([0, *names["committed"]], names["committed"], strict=False)) == 144


def test_a_model_has_a_dtype_of_its_own_and_the_command_wins() -> None:
    lumina = compose(["model=lumina", "model.weights=x"]).model
    assert instantiate(lumina).dtype == "auto"
    assert instantiate(compose(["model=tiny"]).model).dtype == "float32"
    assert {resolve_dtype("auto", device) for device in ("cuda", "cuda:1")} == {"bfloat16"}
    assert resolve_dtype("auto", "cpu") == "float32"
    assert sjd2.load("tiny").dtype == torch.float32
    assert sjd2.load("tiny", dtype="bfloat16").dtype == torch.bfloat16


def interrupt(info: StepInfo) -> None:
    raise KeyboardInterrupt


def test_passes_are_recorded_once_and_replayed_by_the_next_call(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with a tape in place of CUDA graphs."""
    plain = sjd2.generate(model, PROMPTS[:1], decoder="scd", window=12)
    monkeypatch.setattr("sjd2.api.usual_graphs", lambda *_: (Graphs(tape.record), None))
    warm: list[int] = []
    monkeypatch.setattr("sjd2.api.warm_up", lambda *args, **more: (warm.append(1), warm_up(*args, **more)))
    with as_on_a_gpu():
        first = sjd2.generate(model, PROMPTS[:1], decoder="scd", window=12)
        kept = model.graphs.kept
        assert any(kept.graphs.values())
        again = sjd2.generate(model, PROMPTS[:1], decoder="scd", window=12)
    assert model.graphs.kept is kept
    assert warm == [1]  # nothing is recorded in the second call
    assert torch.equal(first.tokens, plain.tokens)
    assert torch.equal(again.tokens, plain.tokens)
    monkeypatch.setattr("sjd2.api.warm_up", lambda *_, **__: None)
    for prompts in (PROMPTS, PROMPTS[:1]):
        with as_on_a_gpu(), pytest.raises(KeyboardInterrupt):
            sjd2.generate(model, prompts, decoder="scd", window=12, on_step=interrupt)
        assert model.graphs.kept.num_rows == len(prompts)  # one prompt does not pay for the rows of two
    monkeypatch.setattr("sjd2.api.usual_graphs", usual_graphs)
    sjd2.generate(model, PROMPTS[:1], decoder="scd", window=12)
    assert model.graphs is None  # eager passes: the recorded ones' keys and values are let go
