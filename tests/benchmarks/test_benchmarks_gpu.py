"""`python -m benchmarks.gpu` runs through on a CPU with narrow models; its counts of bytes and operations are right."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import first_gpu_run, gpu
from benchmarks.architectures import ARCHITECTURES, entry_bytes, weight_bytes
from benchmarks.random_model import RandomSpec
from benchmarks.roofline import SHEETS, Peaks, Work, free_window, work
from benchmarks.timing import Budget, graphed, time_call
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.refine import Coupled
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.verify import Exact
from sjd2.errors import UserError
from sjd2.files import ROOT

CPU = torch.device("cpu")


@pytest.mark.full
def test_the_command_measures_every_family(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    models = "emu3,glm-image"
    out = tmp_path / "sub" / "gpu.json"
    command = ["--device", "cpu", "--small", "--dtype", "float32", "--models", models, "--seconds", "300"]
    assert gpu.main([*command, "--out", str(out)]) == out
    result = json.loads(out.read_text())
    assert [model["name"] for model in result["models"]] == models.split(",")
    assert {"hardware", "packages", "git", "peaks", "seconds", "dtype", "budget_s"} <= result.keys()
    for model in result["models"]:
        assert model["skipped"] == []
        assert {row["slots"] for row in model["passes"]} == {1, 16}
        assert {row["batch"] for row in model["passes"]} == {1, 2}
        assert [row["decoder"] for row in model["decoders"]] == ["ar", "sjd", "scd", "scd"] * 2
        assert [row["decoder"] for row in model["sjd2"]] == ["sjd2 exact", "sjd2 paper"] * 2
        assert {row["part"] for row in model["sampling"]} >= {"law", "draw", "chance", "redraw"}
        assert len(model["pixels"]) == (2 if model["name"] == "emu3" else 0)  # GLM-Image's are a diffusion stage's
        assert [row["batch"] for row in model["free_window"]] == [1, 2]
        ways = {(row["way"], row["kernel"]): "ms" in row for row in model["attention"]}
        assert ways["repeated", "chosen"]
        assert ways["folded", "chosen"]
        assert not ways["repeated", "cudnn"]  # and the reason is recorded
        for part in ("passes", "decoders", "sjd2", "sampling", "pixels"):
            assert all(row["ms"] > 0 and row["n"] > 0 for row in model[part])
        assert all(row["roof_ms"] > 0 for row in model["passes"])
    shown = capsys.readouterr().out
    assert "| Emu3-Gen 8B, 720 px, narrow | 2 | sjd2 paper | 16 |" in shown
    assert "GLM-Image 9B, 1024 px, narrow, batch 1: predicted free window" in shown


def test_the_state_before_is_this_command_s_own_output() -> None:
    """The table of passes, from what the command wrote on an H200 before attention and layers were fused."""
    (file,) = (ROOT / "benchmarks" / "results").glob("nvidia-h200-gpu-*.json")
    (model,) = json.loads(file.read_text())["models"]
    head, _, eager, graph, roof, share = gpu.overview(model)[1:]
    assert "| batch 1: 1 | batch 1: 16 |" in head
    assert eager.startswith("| eager | 34.48 | 35.15 |")
    assert graph.startswith("| graph | 7.73 | 9.17 | 9.29 |")
    assert roof.startswith("| roof | 3.37 |")
    assert share.startswith("| share of the roof | 44% | 37% | 36% |")
    fused = [row | {"attention": "fused", "graph_ms": row["roof_ms"]} for row in model["passes"]]
    lines = gpu.overview(model | {"passes": fused + model["passes"]})
    assert [line.split("|")[1].strip() for line in lines[3:]] == [
        "eager",
        "graph",
        "fused",
        "roof",
        "share of the roof",
    ]
    assert "| 100% |" in lines[-1]
    assert gpu.overview({"title": "nothing measured"}) == []
    rows = {"decoders": [{"batch": 1, "decoder": "scd", "slots": 32, "ms": 9.0, "graph_ms": 4.0}]}
    rows["sjd2"] = [{"batch": 1, "decoder": "sjd2 exact", "slots": 32, "ms": 9.0, "graph_ms": 5.0}]
    assert gpu.ratios({"title": "x", **rows}) == ["\nx, batch 1: sjd2 exact (32) takes 1.25 times SCD's pass."]


@pytest.mark.full
def test_whole_images_of_random_weights_go_through_run_py() -> None:
    rows, why = gpu.whole_images("lumina", small=True, device="cpu", seconds=300)
    assert why is None
    assert [row["decoder"] for row in rows] == ["ar", "scd"]
    assert rows[0]["forwards_mean"] == 25
    assert all(row["latency_s_median"] > 0 and row["warm_up_s"] > 0 for row in rows)


def test_a_spent_budget_is_reported_and_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--small", "--models", "anole,llamagen", "--seconds", "0", "--out", str(out)])
    result = json.loads(out.read_text())
    assert [model["name"] for model in result["models"]] == ["anole", "llamagen"]
    for model in result["models"]:
        assert {gap["reason"] for gap in model["skipped"]} == {"the time was spent"}
    assert "skipped: the time was spent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "lumna", "--small"], "did you mean 'lumina'"),
        (["--variants", "graphs", "--small"], "did you mean 'graph'"),
        (["--device", "cpu"], "add --small"),
    ],
)
def test_wrong_options_say_how_to_fix_them(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_full_sizes_are_the_published_ones(name: str) -> None:
    # decoders.md, table of models: parameters of the layers (billions), bytes of keys and values per token and row, N
    layers, entry, length, head = {
        "lumina": (6.48, 524288, 2357, 8192 * 4096),
        "lumina2": (6.48, 524288, 9316, 16384 * 4096),
        "anole": (6.48, 524288, 1024, 8192 * 4096),
        "emu3": (6.98, 131072, 8193, 32768 * 4096),
        "janus-1b": (1.23, 196608, 576, 2048 * 2048 + 2048 + (2048 + 1) * 16384),
        "janus-7b": (6.07, 491520, 576, 4096 * 4096 + 4096 + (4096 + 1) * 16384),
        "llamagen": (0.731, 184320, 1024, 16384 * 1280),
        "glm-image": (8.16, 40960, 1281, 16384 * 4096),
        "simplear-0.5b": (0.358, 12288, 4096, 64000 * 896),
        "simplear-1.5b": (1.310, 28672, 4096, 64000 * 1536),
    }[name]
    model = ARCHITECTURES[name].build(torch.device("meta"), torch.bfloat16)
    weights = weight_bytes(model)
    assert weights["layers"] / 2e9 == pytest.approx(layers, rel=0.01)
    assert weights["head"] == 2 * head
    assert entry_bytes(model) == entry
    assert model.layout.length == length
    assert model.dtype == torch.bfloat16
    assert all(p.device.type == "meta" for part in (model.full, model.vq) for p in part.parameters())


@pytest.mark.parametrize("name", ["lumina", "lumina2", "llamagen", "simplear-0.5b"])
def test_narrow_models_draw_whole_images(name: str) -> None:
    plan = ARCHITECTURES[name].small()
    model = plan.build(CPU, torch.float32)
    sampling = SamplingParams(guidance_scale=plan.guidance, top_k=plan.top_k)
    decoder = Decoder(name="scd", window=6, lossless=True, drafter=Jacobi(), verifier=Exact(), refiner=Coupled())
    tokens = generate(model, decoder, plan.condition(model, 2), [1, 2], sampling=sampling).tokens
    forced = plan.layout.forced()
    assert (tokens[:, forced >= 0] == forced[forced >= 0]).all()
    assert (tokens[:, forced < 0] < plan.layout.vocabulary).all()
    assert model.decode(tokens).shape[:2] == (2, 3)


def test_the_roof_of_lumina_is_the_calculated_one() -> None:
    # decoders.md 4.3: 14.3 GB and 27 GFLOP per slot at batch 1 with guidance; memory binds at 1 slot, matrices at 128
    model = ARCHITECTURES["lumina"].build(torch.device("meta"), torch.bfloat16)
    sheet = Peaks(4.8e12, 800e12, None, None)
    one, wide = (work(model, 2, slots, 1250) for slots in (1, 128))
    assert one.bytes == pytest.approx(14.3e9, rel=0.01)
    assert one.flops == pytest.approx(27.4e9, rel=0.02)
    assert one.milliseconds(sheet) == pytest.approx(2.99, rel=0.01)
    assert wide.milliseconds(sheet) == pytest.approx(4.38, rel=0.02)
    assert Work(0, 1e12).milliseconds(sheet) == pytest.approx(1.25)


def test_a_window_is_free_as_long_as_memory_binds() -> None:
    """GLM-Image has no guidance and few keys: a slot is one row of arithmetic, half of Lumina's."""
    sheet = Peaks(3.35e12, 989e12, None, None)  # an H100's
    slots = {}
    for name, rows in (("lumina", 2), ("glm-image", 1)):
        plan = ARCHITECTURES[name]
        model, context = plan.build(torch.device("meta"), torch.bfloat16), plan.prompt + plan.layout.length // 2
        free = slots[name] = free_window(model, sheet, rows, context)
        at, over = (work(model, rows, size, context) for size in (free, free + 1))
        assert at.flops / sheet.flops <= at.bytes / sheet.bandwidth
        assert over.flops / sheet.flops > over.bytes / sheet.bandwidth
    assert slots == {"lumina": 155, "glm-image": 284}


def test_the_page_has_the_free_windows_that_the_data_sheets_predict() -> None:
    plan, page = ARCHITECTURES["glm-image"], (ROOT / "docs" / "models" / "glm-image.md").read_text()
    model, context = plan.build(torch.device("meta"), torch.bfloat16), plan.prompt + plan.layout.length // 2
    for card, name in (("H100", "H100"), ("H200", "H200"), ("A100", "A100-SXM4-80GB")):
        peak = Peaks(*SHEETS[name], None, None)
        slots = [free_window(model, peak, batch, context) for batch in (1, 4, 16)]
        assert f"| {card} | {slots[0]} | {slots[1]} | {slots[2]} |" in page


def test_times_are_medians_of_the_calls_asked_for() -> None:
    calls = []
    found = time_call(CPU, lambda: calls.append(1), seconds=0, least=4, warm=3, between=lambda: calls.append(0))
    assert found.n == 4
    assert calls == [0, 1] * 7
    assert found.ms == found.host_ms > 0
    with pytest.raises(RuntimeError, match="CUDA device"):
        graphed(CPU, lambda: None)


def test_models_share_what_is_left() -> None:
    budget = Budget(1000)
    budget.divide(4)
    assert 249 < budget.left <= 250
    budget.divide(1)
    assert 999 < budget.left <= 1000
    spent = Budget(0)
    spent.divide(2)
    assert spent.left <= 0


def test_gpu_tests_are_marked_and_skipped_without_a_device() -> None:
    module = importlib.import_module("tests.engine.test_gpu")
    marks = {mark.name: mark for mark in module.pytestmark}
    assert set(marks) == {"gpu", "skipif"}
    assert marks["skipif"].args[0] is not torch.cuda.is_available()
    assert "CUDA" in marks["skipif"].kwargs["reason"]


def test_registered_marks(pytestconfig: pytest.Config) -> None:
    names = {line.split(":")[0] for line in pytestconfig.getini("markers")}
    assert {"gpu", "slow"} <= names


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_full_size_commands_end_at_once_without_a_gpu(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        first_gpu_run.main([])
    assert "benchmarks.gpu --small" in capsys.readouterr().err
    spec = {"name": "random", "weights": "none", "vocabulary": 8192, "architecture": "lumina"}
    with pytest.raises(UserError, match=r"model\.small=true"):
        RandomSpec(**spec).check()
    RandomSpec(**spec, small=True).check()


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(seconds for seconds, _ in first_gpu_run.STEPS.values()) <= 590
    monkeypatch.setattr(first_gpu_run, "result_file", lambda *words: tmp_path / f"{'-'.join(words)}.json")
    assert first_gpu_run.run("broken", 30, ("-c", "raise SystemExit(3)")).startswith("broken: exit status 3")
    assert "stopped after 1 s" in first_gpu_run.run("slow", 1, ("-c", "import time; time.sleep(30)"))
    assert first_gpu_run.run("right", 30, ("-c", "print('fine')")).endswith("fine\n")
