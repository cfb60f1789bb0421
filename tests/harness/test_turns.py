"""AR and a decoder take turns batch by batch; a finished run is timed again with the tokens it has."""

from __future__ import annotations

import contextlib
import csv
import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evaluation.prompts import ImageIds
from evaluation.run_folder import RunFolder, Snapshot, run_folders
from evaluation.timings import newest_timings, retimings
from harness import meter, sample, turns
from harness.sample import Job, make_batch
from harness.turns import Side
from sjd2.decoding.cuda_graph import Graphs
from sjd2.errors import UserError
from tests.helpers.cli import Cli

COMMAND = ("decoder=sjd", "limit=10")


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch, plain: None) -> list[tuple[str, int]]:
    """(decoder, batch) in the order in which batches are made."""
    made: list[tuple[str, int]] = []

    def spy(job, model, number, *rest):
        made.append((job.decoder.name, number))
        return make_batch(job, model, number, *rest)

    monkeypatch.setattr(turns, "make_batch", spy)
    monkeypatch.setattr(meter.Meter, "entry", lambda self: {"ended": "now"})  # a busy machine would blank the speed-up
    return made


def content(run: RunFolder) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for folder in ("images", "tokens") for path in (run.path / folder).iterdir()
    } | {path.name: path.read_bytes() for path in run.path.glob("samples*.jsonl")}


def speedup(cli: Cli) -> dict[str, str]:
    """Return the row of sjd in the CSV that the last command wrote."""
    (path,) = (cli.runs_dir / "tables").glob("toy-sjd-*/table.csv")
    with path.open(newline="") as file:
        return next(row for row in csv.DictReader(file) if row["decoder"] == "sjd")


def test_a_b_a_b_then_timed_again(cli: Cli, order: list[tuple[str, int]]) -> None:
    assert cli(*COMMAND) == 0, cli.err
    assert order == [(name, batch) for batch in range(3) for name in ("ar", "sjd")]
    assert cli.out.count("weights are loaded") == 1
    ar, sjd = cli.run("ar"), cli.run("sjd")
    assert [len(run.records()) for run in (ar, sjd)] == [10, 10]
    assert ar.provenance()[0]["turns"] == sjd.provenance()[0]["turns"]
    assert speedup(cli)["speedup_in_turns"] == "True"
    assert "toy-ar-" in cli.out
    assert "10/10 images" in cli.out
    before, times = [content(run) for run in (ar, sjd)], sjd.metrics["seconds_decode_mean"]

    # once more: nothing to do, and nothing is done
    order.clear()
    assert cli(*COMMAND) == 0
    assert order == []
    assert len(sjd.provenance()) == 1

    # timed again, in turns; what was made stays byte for byte
    assert cli("decoder=sjd", "limit=8", "retime=true") == 0, cli.err
    assert order == [(name, batch) for batch in range(2) for name in ("ar", "sjd")]
    assert [content(run) for run in (ar, sjd)] == before
    assert "8 images timed again, with the tokens of their records" in cli.out
    first, second = (run.provenance()[1] for run in (ar, sjd))
    assert first["turns"] == second["turns"] != sjd.provenance()[0]["turns"]
    assert second["retimed"] is True
    assert (sjd.metrics["n_images"], sjd.metrics["n_timed"]) == (10, 8)
    assert sjd.metrics["seconds_decode_mean"] != times
    assert (speedup(cli)["speedup_in_turns"], speedup(cli)["n_timed"]) == ("True", "8")

    # and again: the newest timings count
    assert cli("decoder=sjd", "limit=9", "retime=true", "baseline=null") == 0
    assert len(retimings(Snapshot(sjd))) == 2
    assert len(newest_timings(Snapshot(sjd))) == sjd.metrics["n_timed"] == 9
    assert len(ar.provenance()) == 2

    # other tokens than the records have stop it, and nothing of it counts
    lines = [json.loads(line) for line in (sjd.path / "samples.jsonl").read_text().splitlines()]
    lines[5]["tokens_sha256"] = "0"
    (sjd.path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli(*COMMAND, "retime=true") == 1
    assert "image 00005_0 of toy-sjd-" in cli.err
    assert "other tokens" in cli.err
    assert len(newest_timings(Snapshot(sjd))) == 9
    assert len(newest_timings(Snapshot(ar))) == 8


def test_only_finished_runs_are_timed_again(cli: Cli) -> None:
    assert cli(*COMMAND, "retime=true") == 1
    assert "lacks 10 of 10 images; run the same command without it first." in cli.err
    assert not run_folders(cli.runs_dir)
    assert "weights are loaded" not in cli.out
    assert cli(*COMMAND, "retime=true", "trace=2") == 1
    assert "leave trace= out" in cli.err
    assert cli(*COMMAND, "retime=true", "stage=table") == 1
    assert "it works with stage=sample, not table" in cli.err


class Killed(BaseException):
    pass


@pytest.fixture
def killed(order: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The fourth batch of a command is never made."""
    spy = turns.make_batch

    def make(*arguments):
        if len(order) == 3:
            raise Killed
        return spy(*arguments)

    monkeypatch.setattr(turns, "make_batch", make)
    return order


def test_a_kill_costs_one_pair(cli: Cli, killed: list[tuple[str, int]]) -> None:
    for again in ((), ("retime=true",)):
        killed.clear()
        with pytest.raises(Killed):
            cli(*COMMAND, *again)
        assert killed == [("ar", 0), ("sjd", 0), ("ar", 1)]
        if again:  # the timings that were there count until the new ones are complete
            timings = newest_timings(Snapshot(cli.run("sjd")))
            assert [timing["launch"] for timing in timings] == [0] * 4 + [1] * 6
        killed.extend([("", 0)])  # the fourth may be made from here on
        assert cli(*COMMAND, *again) == 0, cli.err
        assert killed[4:] == [("sjd", 1), ("ar", 2), ("sjd", 2)]
        assert "resuming" in cli.out
        runs = [Snapshot(cli.run(name)) for name in ("ar", "sjd")]
        turns_of = [{entry["launch"]: entry["turns"] for entry in run.launches} for run in runs]
        marks = [[of[r["launch"]] for r in newest_timings(run)] for of, run in zip(turns_of, runs, strict=True)]
        assert [len(mark) for mark in marks] == [10, 10]
        assert [a == b for a, b in zip(*marks, strict=True)] == [True] * 4 + [False] * 4 + [True] * 2
        assert len(retimings(runs[1])) == len(again)
    assert [run.provenance()[-1]["retimed"] for run in (cli.run("ar"), cli.run("sjd"))] == [True, True]


def test_a_kill_after_the_last_image_of_ar(cli: Cli, killed: list[tuple[str, int]]) -> None:
    killed.extend([("", 0)] * 4)  # no kill yet
    command = ("decoder=sjd", "limit=8")
    assert cli(*command) == 0, cli.err
    killed.clear()
    with pytest.raises(Killed):
        cli(*command, "retime=true")
    assert killed == [("ar", 0), ("sjd", 0), ("ar", 1)]
    killed.append(("", 0))
    assert cli(*command, "retime=true") == 0, cli.err
    assert killed[4:] == [("sjd", 1)]
    for run in (cli.run("ar"), cli.run("sjd")):
        assert {timing["launch"] for timing in newest_timings(Snapshot(run))} <= {1, 2}


def test_refilled_runs_follow_one_another(cli: Cli, plain: None) -> None:
    assert cli(*COMMAND, "refill=true") == 0, cli.err
    runs = [cli.run(name) for name in ("ar", "sjd")]
    assert [len(run.records()) for run in runs] == [10, 10]
    assert not any("turns" in entry for run in runs for entry in run.provenance())
    before = [content(run) for run in runs]
    assert cli(*COMMAND, "refill=true", "retime=true") == 0, cli.err
    assert [content(run) for run in runs] == before
    assert [len(newest_timings(Snapshot(run))) for run in runs] == [10, 10]


def test_a_baseline_in_other_hands_is_waited_for(
    cli: Cli, order: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process makes AR, the decoder is made alone; what AR lacks afterwards is made then."""
    lock = RunFolder.lock

    def taken(run: RunFolder, *, wait: bool = False, shared: bool = False) -> AbstractContextManager[None]:
        if "toy-ar-" in run.path.name and not wait:
            raise UserError("in use")
        return lock(run, wait=wait, shared=shared)

    monkeypatch.setattr(RunFolder, "lock", taken)
    assert cli("decoder=sjd", "limit=6") == 0, cli.err
    assert order == [("sjd", 0), ("sjd", 1), ("ar", 0), ("ar", 1)]
    assert "sjd and AR were not timed in turns" in cli.out


# ---- what a launch says of the GPU


class NVMLError(Exception):
    def __init__(self, value: int = 3) -> None:  # not supported
        self.value = value


def gpu(*busy: int, running: tuple[int, ...], reasons: int = 0, silent: bool = False) -> SimpleNamespace:
    def utilization(*_: object) -> list[SimpleNamespace]:
        if silent or not busy:
            raise NVMLError(3 if silent else 6)
        return [SimpleNamespace(pid=pid, smUtil=50) for pid in busy]

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlDeviceGetComputeRunningProcesses=lambda _: [SimpleNamespace(pid=pid) for pid in running],
        nvmlDeviceGetProcessUtilization=utilization,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda _: reasons,
    )


@pytest.mark.parametrize(
    ("nvml", "shared"),
    [
        (gpu(1, running=(1, 2)), False),  # 2 only holds memory
        (gpu(1, 2, running=(1, 2)), True),
        (gpu(running=(1,)), False),
        (gpu(running=(1, 2), silent=True), True),  # who computes is not reported
        (gpu(running=(1,), silent=True), False),
        (gpu(71, running=(71, 72)), False),  # numbered as the host does
        (gpu(71, 72, running=(71, 72)), True),
    ],
)
def test_who_shares_the_gpu(nvml: SimpleNamespace, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter.os, "getpid", lambda: 1)
    assert meter.others_at_work(nvml, None, 0) is shared


def test_the_watch_counts_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = meter.GpuWatch(torch.device("cpu"))
    with watch:
        pass
    assert watch.entry() == {}  # no GPU, nothing known
    looks = iter([False, False, True])
    monkeypatch.setattr(watch, "_end", SimpleNamespace(wait=lambda _: next(looks)))
    watch._watch(gpu(1, 2, running=(1, 2), reasons=0x20), None)
    assert watch.entry() == {"gpu_shared": 1.0, "gpu_throttled": 1.0}
    looks = iter([False, False, True])
    monkeypatch.setattr(meter.os, "getpid", lambda: 2)
    watch._watch(gpu(2, running=(2,), reasons=0x04), None)  # the usual power cap is no disturbance
    assert watch.entry() == {"gpu_shared": 0.5, "gpu_throttled": 0.5}


def test_energy_is_what_the_counter_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    energy = meter.EnergyMeter(torch.device("cpu"))
    energy.stop()
    assert energy.joules is None
    readings = iter([5000, 7500])
    nvml = SimpleNamespace(nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings))
    monkeypatch.setattr(meter, "gpu_handle", lambda device: (nvml, None))
    energy = meter.EnergyMeter(torch.device("cuda"))
    energy.stop()
    assert energy.joules == 2.5
    monkeypatch.setattr(meter, "gpu_handle", lambda device: (SimpleNamespace(), None))  # an old card or driver
    energy = meter.EnergyMeter(torch.device("cuda"))
    energy.stop()
    assert energy.joules is None


def test_runs_that_do_not_fit_beside_each_other_free_what_they_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []
    for _ in range(2):
        graphs = Graphs(lambda work: work)
        job = SimpleNamespace(
            run=SimpleNamespace(path=Path("run")), graphs=graphs, refill=False, numbers=lambda share: [0, 1]
        )
        sides.append(Side(job=job, share=[], launch=0, done=0, total=2, meter=contextlib.nullcontext()))
    kept = []

    def warm_up(job, model):
        if any(side.job.graphs.kept for side in sides if side.job is not job):
            raise torch.OutOfMemoryError("CUDA out of memory")
        job.graphs.kept = SimpleNamespace(graphs={}, prefills={})  # an engine with its keys and values

    def make(job, *_):
        kept.append([side.job.graphs.kept is not None for side in sides])
        return []

    monkeypatch.setattr(turns, "warm_up", warm_up)
    monkeypatch.setattr(turns, "make_batch", make)
    model = SimpleNamespace(compiler=None)
    crowded = turns._warm_up(sides, model)
    assert crowded
    stop = SimpleNamespace(begin=lambda: None)
    assert [place for place, _ in turns._turns(sides, model, stop, crowded=crowded)] == [0, 1, 0, 1]
    assert kept == [[True, False], [False, True]] * 2
    sides[0].job.graphs.release()
    sides[1].job.graphs = None
    monkeypatch.setattr(turns, "warm_up", lambda job, model: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):  # nothing to free
        turns._warm_up(sides, model)


def test_a_last_smaller_batch_is_compiled_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    warm: list[int] = []
    monkeypatch.setattr(sample, "_encode", lambda model, prompts: prompts)
    monkeypatch.setattr(sample, "warm_up_passes", lambda model, decoder, cond, **_: warm.append(len(cond)))
    ids = ImageIds(prompts=7, count=7)
    settings = dict.fromkeys(("run", "load", "decoder", "sampling", "limit", "seed", "trace"))
    job = Job(**settings, prompts=["a"] * 7, ids=ids, batch_size=3, refill=False)
    compiled, plain = SimpleNamespace(compiler=object()), SimpleNamespace(compiler=None)
    sample.compile_other_rows(job, compiled, ids[:6])  # batches of three
    sample.compile_other_rows(job, plain, ids[:7])
    assert warm == []
    sample.compile_other_rows(job, compiled, ids[4:])  # the third batch has one image
    assert warm == [1]
    sample.compile_other_rows(replace(job, refill=True), compiled, ids[5:])
    assert warm == [1, 2]
