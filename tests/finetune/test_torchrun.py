"""Two processes learn what one learns, under torchrun as well, and a killed training resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from baselines.eagle import train as eagle
from baselines.eagle.train import FinetuneEagle
from harness.cli import main
from sjd2.config import instantiate
from sjd2.finetune import distributed, sharding
from sjd2.finetune.data.generated import Generated
from sjd2.finetune.distributed import Machine
from sjd2.models.adapter import Adapter, AdapterSettings
from tests.helpers.cli import ROOT
from tests.helpers.small_training import (
    CODES,
    FULL,
    GRID,
    ROWS,
    SIDE,
    VARIANTS,
    Codes,
    Words,
    recipe,
    settings,
    spec,
    tokens,
)
from tests.helpers.torchrun import finish, kill, start, together
from tests.helpers.toy import Toy

pytestmark = pytest.mark.full


def kinds(place: Path, out: Path, device: str) -> dict[str, object]:
    """Train a gated LoRA and all weights for three steps of four images."""
    made = {}
    for name, more in VARIANTS.items():
        model = spec(place).load(device, "float32")
        built = recipe(Codes(), machine={"micro_batch": 2, "checkpointing": name == "full"}, bf16=False, **more)
        made[name] = (model, built.run(model=model, out=out / name, log=None, device=device, seed=0))
    return made


def member(place: Path, out: Path) -> None:
    """One of two processes: train both kinds and record which weights this process holds."""
    with distributed.processes("cpu") as device:
        model, _ = kinds(place, out, device)["full"]
        layer = model.transformer.layers[0].mlp.up_proj.weight
        facts = {"type": type(layer).__name__, "here": layer.to_local().numel(), "whole": layer.numel()}
        facts["norm"] = norm(place, device)
        (out / f"{distributed.rank()}.json").write_text(json.dumps(facts))
        data = tokens(place, "shards", folder=str(out / "tokens"))
        data.prepare(model, out)
        pairs = heads(out / "eagle")
        (out / f"drawn{distributed.rank()}.json").write_text(json.dumps(pairs))


def norm(place: Path, device: str) -> float:
    """Return the gradient's norm over all weights, as clipping sees it."""
    model, made = spec(place).load(device, "float32"), recipe(Codes(), machine={"micro_batch": 2}, **VARIANTS["full"])
    model.adapter = Adapter(made.adapter, model)
    objective = made._objective(model, model.adapter)
    for value, _ in made._pieces(model, objective, 0, 0):
        value.backward()
    found = torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    return float(found.full_tensor() if objective.sharded else found)


def heads(out: Path) -> list[list[int]]:
    """Train an EAGLE head on the toy's own images; return the images' tokens."""
    data = Generated(captions=Words(), images=22, validation_images=9, batch_size=4)
    made = FinetuneEagle(
        head=eagle.EagleSettings(),
        data=data,
        steps=3,
        batch_size=4,
        lr=1e-2,
        bf16=False,
        machine=Machine(micro_batch=2),
    )
    made.run(model=Toy(GRID), out=out, log=None, device="cpu", seed=0)
    return [data._sets[held_out]["tokens"].tolist() for held_out in (False, True)]


@pytest.fixture(scope="module")
def pair(place: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Train everything in one process and in two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    together(member, place, two)
    return SimpleNamespace(one=one, two=two, made=kinds(place, one, "cpu"), drawn=heads(one / "eagle"))


def test_two_processes_learn_what_one_learns(pair: SimpleNamespace, place: Path) -> None:
    alone, joined = (torch.load(path / "gated" / "checkpoint.pt")["module"] for path in (pair.one, pair.two))
    assert alone.keys() == joined.keys()
    assert max(float((alone[key] - joined[key]).abs().max()) for key in alone) < 1e-6
    # all weights: the shards of two processes, read by one
    model, metrics = pair.made["full"]
    alone = {name: tensor.clone() for name, tensor in model.adapter.tensors().items()}
    other = spec(place).load("cpu", "float32")
    other.adapter = Adapter(AdapterSettings(**FULL), other)
    objective = recipe(Codes(), **VARIANTS["full"])._objective(other, other.adapter)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad])
    before = {name: tensor.clone() for name, tensor in other.adapter.tensors().items()}
    folder = sharding.newest(pair.two / "full")
    assert sharding.facts(folder)["step"] == 3
    sharding.load(folder, objective, [optimizer])
    joined = other.adapter.tensors()
    assert max(float((alone[key] - joined[key]).abs().max()) for key in alone) < 1e-6
    assert max(float((before[key] - joined[key]).abs().max()) for key in alone) > 1e-3  # the control: it did train
    assert min(float(state["step"]) for state in optimizer.state.values()) == 3
    curves = [
        [json.loads(line) for line in (p / "full" / "curve.jsonl").read_text().splitlines()]
        for p in (pair.one, pair.two)
    ]
    assert len(curves[0]) == len(curves[1]) == 1
    for key in ("loss", "val_loss_k1", "val_loss_k2"):
        assert curves[0][0][key] == pytest.approx(curves[1][0][key], abs=1e-5)
    assert metrics["val_loss_k1"] == pytest.approx(curves[1][0]["val_loss_k1"], abs=1e-5)


def test_weights_are_sharded(pair: SimpleNamespace, place: Path) -> None:
    wanted = norm(place, "cpu")
    for rank in range(2):
        facts = json.loads((pair.two / f"{rank}.json").read_text())
        assert facts["type"] == "DTensor"
        assert 2 * facts["here"] == facts["whole"]
        assert facts["norm"] == pytest.approx(wanted, rel=1e-5)  # of all weights, not only of this process's
    parts = sorted(file.stat().st_size for file in sharding.newest(pair.two / "full").glob("*.distcp"))
    assert len(parts) == 2
    assert parts[0] > 0.8 * parts[1]
    with pytest.raises(
        RuntimeError, match="not sharded"
    ):  # the control: what accelerate does on a CPU would be noticed
        sharding.check_sharded(torch.nn.Linear(2, 2))


def test_a_result_of_two_processes_loads_as_that_of_one(pair: SimpleNamespace, place: Path) -> None:
    for name in VARIANTS:
        mine, theirs = (load_file(path / name / "final" / "sjd2.safetensors") for path in (pair.one, pair.two))
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert torch.allclose(mine[key].float(), theirs[key].float(), atol=1e-3)  # bfloat16
        loaded = replace(spec(place), adapter=str(pair.two / name / "final")).load("cpu", "float32")
        assert loaded.adapter.settings.kind == ("full" if name == "full" else "lora")


def test_processes_encode_and_draw_different_parts_of_the_same(
    pair: SimpleNamespace, model: object, tmp_path: Path
) -> None:
    alone = tokens(place_of(pair, model), "shards", folder=str(tmp_path))
    alone.prepare(model, tmp_path)
    (mine,), (theirs,) = (list(folder.glob("tokens-*")) for folder in (tmp_path, pair.two / "tokens"))
    assert mine.name == theirs.name
    assert len(list(theirs.glob("*.npy"))) == 4
    for file in mine.iterdir():
        assert file.read_bytes() == (theirs / file.name).read_bytes()
    for rank in range(2):
        assert json.loads((pair.two / f"drawn{rank}.json").read_text()) == pair.drawn
    heads = [load_file(path / "eagle" / "final" / "eagle.safetensors") for path in (pair.one, pair.two)]
    assert max(float((heads[0][key].float() - heads[1][key].float()).abs().max()) for key in heads[0]) < 1e-2
    states = [torch.load(path / "eagle" / "checkpoint.pt")["module"] for path in (pair.one, pair.two)]
    assert max(float((states[0][key] - states[1][key]).abs().max()) for key in states[0]) < 1e-5


def place_of(pair: SimpleNamespace, model: object) -> Path:
    return Path(model.spec.weights).parent


def command(place: Path, out: Path, *more: str) -> list[str]:
    """Return a short full fine-tuning of the small model as a command."""
    model = {"weights": place / "model", "vq_weights": place / "vq", "rows": ROWS, "columns": ROWS, "vocabulary": CODES}
    made = [
        "stage=finetune",
        "finetune=sjd2-paper",
        "model=tiny",
        "model.adapter=null",
        "logger=none",
        f"run_dir={out}",
    ]
    made += [f"model.{key}={value}" for key, value in model.items()]
    data = {"images": place / "shards", "smallest": 0, "held_out_share": 4, "workers": 2, "batch_size": 4}
    made += [f"finetune.data.{key}={value}" for key, value in data.items()]
    training = {
        "epochs": 0.9,
        "batch_size": 4,
        "lr": 0.01,
        "warmup": 1,
        "shortest": 4,
        "longest": 8,
        "levels": "[2]",
        "bf16": "false",
    }
    made += [f"finetune.{key}={value}" for key, value in training.items()]
    return [*made, "finetune.machine.micro_batch=2", "finetune.machine.checkpoint_s=0", *more]


def commanded(arguments: list[str]) -> None:
    """Run a command in this process, as one of several."""
    sys.argv = ["run.py", *arguments]
    code = main()
    sys.exit(code)


@pytest.fixture(scope="module")
def trained(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Run the command under torchrun."""
    out = tmp_path_factory.mktemp("torchrun") / "run"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--standalone",
    ]
    done = subprocess.run(
        [*launcher, str(ROOT / "run.py"), *command(place, out)], cwd=out.parent, capture_output=True, text=True, timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return SimpleNamespace(out=out, done=done)


def test_torchrun_trains_sharded_weights_and_prints_once(trained: SimpleNamespace) -> None:
    done, out = trained.done, trained.out
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("result: ") == 1
    assert done.stderr.count("sharded 29 weights") == 1
    assert len(list(out.glob("tokens-*/*.npy"))) == 4
    steps = [json.loads(line)["step"] for line in (out / "curve.jsonl").read_text().splitlines()]
    count = sum(
        json.loads(line)["content"] % 4 != 0
        for file in out.glob("tokens-*/*.jsonl")
        for line in file.read_text().splitlines()
    )
    assert steps[-1] == round(0.9 * count / 4)
    assert "identity" in OmegaConf.load(out / "config.yaml")


def test_a_training_whose_processes_are_all_killed_ends_with_the_same_weights(
    place: Path, trained: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    processes = start(commanded, command(place, out))
    try:
        end = time.monotonic() + 900
        while not list(out.glob("shards-0000000[2-9]/facts.json")) and time.monotonic() < end:
            assert not any(process.exitcode for process in processes)
            time.sleep(0.005)
    finally:
        kill(processes)
    assert not (out / "final").exists()
    began = sharding.facts(sharding.newest(out))["step"]
    finish(
        start(commanded, command(place, out, "finetune.machine.checkpointing=false"))
    )  # the machine's part may change
    assert 2 <= began < sharding.facts(sharding.newest(out))["step"]
    whole, cut = (load_file(path / "final" / "sjd2.safetensors") for path in (trained.out, out))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    curves = [
        [json.loads(line)["step"] for line in (p / "curve.jsonl").read_text().splitlines()] for p in (trained.out, out)
    ]
    assert curves[0] == curves[1]


def test_the_result_decodes(place: Path, trained: SimpleNamespace) -> None:
    from sjd2.decoding.generate import generate
    from sjd2.decoding.sampling import SamplingParams

    loaded = replace(spec(place), adapter=str(trained.out / "final")).load("cpu", "float32")
    decoder = instantiate(settings("decoder=sjd2", "decoder.rule=paper", "decoder.steps=2", "decoder.window=8").decoder)
    done = generate(loaded, decoder, loaded.encode(["a red circle"]), [3], sampling=SamplingParams())
    assert done.tokens.shape == (1, loaded.layout.length)
    assert loaded.decode(done.tokens).shape == (1, 3, SIDE, SIDE)


def test_recipes_of_one_process_refuse_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        together(commanded, ["stage=finetune", "finetune=vq", "logger=none", f"runs_dir={tmp_path}"])
    assert not list(tmp_path.iterdir())
