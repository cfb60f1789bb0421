"""What nights bring: kills at any moment, a full disk, folders without rights, damaged files, two processes, wrong clocks.

After each of them the same command ends with exactly the records and tokens of an undisturbed run. The long forms:
`python -m pytest -m slow -n 0 tests/harness/test_faults.py`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import run_folder
from evaluation.run_folder import RunFolder, run_folders
from harness import job as evaluation_job
from harness import sample as sampling
from harness import turns
from sjd2.models.base import Condition, ImageModel
from tests.helpers.cli import ROOT, Cli
from tests.helpers.forked import Forked

pytestmark = pytest.mark.usefixtures("plain")
JOB = ("decoder=sjd", "limit=14", "baseline=null")


def content(runs_dir: Path) -> dict[str, list[tuple]]:
    """Return all that a run's images are: id, seed, tokens and pixels; fails where a line stands twice or lies."""
    found = {}
    for path in run_folders(runs_dir):
        run = RunFolder(path)
        lines = [line for file in path.glob("samples*.jsonl") for line in run_folder.read_lines(file)[0]]
        ids = [tuple(line["id"]) for line in lines if line.keys() >= run_folder.NEEDED]
        assert len(ids) == len(set(ids)), f"doubled in {path.name}"
        found[path.name] = [
            (tuple(line["id"]), line["seed"], line["tokens_sha256"], run.tokens(line).tolist(), image.tolist())
            for line, image in zip(run.records(), run.images(), strict=True)
        ]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, list[tuple]]]:
    """Return what commands make where nothing disturbs them; each is run once."""
    made: dict[tuple[str, ...], dict[str, list[tuple]]] = {}

    def make(cli: Cli, *command: str) -> dict[str, list[tuple]]:
        if command not in made:
            runs_dir, cli.runs_dir = cli.runs_dir, tmp_path_factory.mktemp("undisturbed") / "runs"
            assert cli(*command) == 0
            made[command] = content(cli.runs_dir)
            cli.runs_dir = runs_dir
        return made[command]

    return make


# ---- kills


@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.full), pytest.param(30, marks=pytest.mark.slow)])
def test_a_sweep_killed_at_random_moments(cli: Cli, undisturbed: Callable, kills: int) -> None:
    limit = 4 * kills  # enough that most kills meet an unfinished sweep
    sweep = ("-m", "decoder=sjd", "decoder.window=4,6", f"limit={limit}", "baseline=null")
    began = time.monotonic()
    expected = undisturbed(cli, *sweep)
    moments, longest, cut = random.Random(kills), min(3.0, time.monotonic() - began + 1.0), 0
    for _ in range(kills):
        process = Forked(cli, *sweep, TOY_SECONDS_PER_BATCH="0.15")
        began, moment = time.monotonic(), moments.uniform(0.1, 1) * longest
        while process.poll() is None and time.monotonic() < began + moment:
            time.sleep(0.002)
        process.send(signal.SIGKILL)
        process.wait()
        assert process.code in (0, -signal.SIGKILL), process.output
        found = content(cli.runs_dir)
        cut += sum(map(len, found.values())) < 2 * limit
        for name, images in found.items():
            assert set(map(repr, images)) <= set(map(repr, expected[name]))  # what is there is right at any moment
    assert cut >= kills // 2, "most kills came after the end"
    assert cli(*sweep) == 0
    assert content(cli.runs_dir) == expected
    table = (max((cli.runs_dir / "sweeps").iterdir()) / "table.md").read_text()
    assert "failed" not in table
    assert table.count("\n| sjd") == 2


@pytest.mark.parametrize("step", [pytest.param(20, marks=pytest.mark.full), pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_run_killed_at_every_write(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable, call: str, step: int
) -> None:
    """Kill the process at its k-th write to the disk, for k = 1, 1 + step, ... until it ends by itself."""
    expected, real = undisturbed(cli, *JOB), getattr(os, call)
    for k in range(1, 1000, step):
        calls = []

        def die(*arguments: object, k: int = k, calls: list = calls) -> None:
            calls.append(arguments)
            if len(calls) == k:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments)

        cli.runs_dir = cli.runs_dir.with_name(f"{call}-{k}")
        monkeypatch.setattr(os, call, die)
        code = Forked(cli, *JOB).wait() if cli.runs_dir.parent.is_dir() else 0
        monkeypatch.setattr(os, call, real)
        assert code in (0, -signal.SIGKILL)
        assert cli(*JOB) == 0
        assert content(cli.runs_dir) == expected
        if code == 0:
            return
    raise AssertionError("it never ended")


# ---- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds 200 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("no right to mount a small file system here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.full
def test_a_disk_that_runs_full(cli: Cli, small_disk: Path, undisturbed: Callable) -> None:
    job = ("decoder=sjd", "limit=40", "baseline=null")
    expected = undisturbed(cli, *job)
    cli.runs_dir = small_disk / "runs"
    assert cli(*job) == 1
    assert "the disk is full" in cli.err
    assert cli.err.count("\n") == 1
    (name,) = expected
    there = content(cli.runs_dir)[name]
    assert 0 < len(there) < 40
    assert set(map(repr, there)) <= set(map(repr, expected[name]))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert cli(*job) == 0
    assert content(cli.runs_dir) == expected


@pytest.mark.full
def test_a_sweep_on_a_full_disk_ends_with_rows(cli: Cli, small_disk: Path) -> None:
    cli.runs_dir = small_disk / "runs"
    sweep = ("-m", "decoder=ar,sjd", "limit=40", "baseline=null")
    assert cli(*sweep) == 1
    assert "the disk is full" in cli.err
    assert "Traceback" not in cli.err
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert cli(*sweep) == 0
    assert [len(images) for images in content(cli.runs_dir).values()] == [40, 40]


def test_a_line_that_was_written_half(cli: Cli, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable) -> None:
    """A limit on the size of files cuts the write of a batch's lines, as a quota does."""
    expected, warm_up = undisturbed(cli, *JOB), turns.warm_up

    def limited(*arguments: object) -> None:
        warm_up(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))  # of the forked process

    monkeypatch.setattr(turns, "warm_up", limited)
    process = Forked(cli, *JOB)
    assert process.wait() == 1
    assert "files may not grow further" in process.output
    (file,) = cli.runs_dir.glob("toy-*/samples.jsonl")
    assert file.stat().st_size == 3000
    assert not file.read_bytes().endswith(b"\n")
    monkeypatch.setattr(turns, "warm_up", warm_up)
    assert cli(*JOB) == 0
    assert "1 line(s) cut by a kill" in cli.out
    assert content(cli.runs_dir) == expected


def test_a_batch_that_is_not_finite_costs_no_other(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable
) -> None:
    expected, encode, encoded = undisturbed(cli, *JOB), sampling._encode, []

    def overflowing(model: ImageModel, prompts: list[str]) -> Condition:
        condition = encode(model, prompts)
        encoded.append(prompts)
        if len(encoded) == 4:  # the warm-up's, and two batches
            condition.embeds = condition.embeds * torch.tensor([1, 1, torch.nan, 1])[:, None, None]
        return condition

    monkeypatch.setattr(sampling, "_encode", overflowing)
    assert cli(*JOB) == 1
    assert "the encoded prompt is not finite" in cli.err
    assert cli.err.count("\n") == 1
    assert len(cli.run("sjd").records()) == 8
    monkeypatch.setattr(sampling, "_encode", encode)
    assert cli(*JOB) == 0
    assert "8 of 14 images are there, resuming" in cli.out
    assert content(cli.runs_dir) == expected


@pytest.mark.full
@pytest.mark.skipif(
    not os.geteuid() and any(not path.stat().st_mode & 0o001 for path in (ROOT, *ROOT.parents)),
    reason="the test acts as another user, who cannot enter this checkout's folder",
)
def test_folders_without_rights(cli: Cli, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable) -> None:
    expected = undisturbed(cli, *JOB)
    cli.runs_dir = Path(tempfile.mkdtemp()) / "runs"  # pytest's own folder is closed to others
    try:
        cli.runs_dir.parent.chmod(0o755)
        assert cli("decoder=sjd", "limit=4", "baseline=null") == 0
        (run,) = run_folders(cli.runs_dir)
        for path, mode in ((run / "samples.jsonl", 0o444), (run, 0o555), (cli.runs_dir, 0o555)):
            path.chmod(mode)
        before = sorted((path, path.stat().st_size) for path in cli.runs_dir.rglob("*") if path.is_file())
        for command in (JOB, ("stage=table",)):
            process = nobody(cli, *command)
            assert process.wait() == 1
            assert "no permission" in process.output
            assert process.output.count("error:") == 1
            assert "weights are loaded" not in process.output
        assert sorted((path, path.stat().st_size) for path in cli.runs_dir.rglob("*") if path.is_file()) == before
        for path, mode in ((cli.runs_dir, 0o755), (run, 0o755), (run / "samples.jsonl", 0o644)):
            path.chmod(mode)
        assert cli(*JOB) == 0
        assert content(cli.runs_dir) == expected
    finally:
        shutil.rmtree(cli.runs_dir.parent)


def nobody(cli: Cli, *command: str) -> Forked:
    """Start a command as a user whom rights stop."""
    if os.geteuid():
        return Forked(cli, *command)
    return Forked(cli, *command, user=65534)


# ---- damaged files

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-30],
    "without a newline": lambda data: data[:-1],
    "zeros": lambda data: data[:-50] + bytes(50),  # what a power cut leaves on some file systems
    "zeros and a newline": lambda data: data[:-50] + bytes(49) + b"\n",
    "no text": lambda data: data + b"\xff\xfe\x00{\n",
    "twice": lambda data: data + data.splitlines(keepends=True)[-1],
    "in the middle": lambda data: data.replace(b'"seed"', b'"se\x00', 1),
    "without its keys": lambda data: data + b'{"id": [9, 0]}\n{"launch": 7}\n',
    "gone": lambda data: b"",
}


@pytest.mark.parametrize(
    "damage", ["zeros", "without its keys", "gone", *(pytest.param(n, marks=pytest.mark.slow) for n in DAMAGE)]
)
def test_damaged_records(cli: Cli, undisturbed: Callable, damage: str) -> None:
    expected = undisturbed(cli, *JOB)
    assert cli(*JOB[:1], "limit=8", *JOB[2:]) == 0
    (path,) = run_folders(cli.runs_dir)
    file = path / "samples.jsonl"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    for half in sorted((path / "images").iterdir())[-1:] + sorted((path / "tokens").iterdir())[:1]:
        if damage == "gone":
            half.write_bytes(half.read_bytes()[:20])
    assert cli(*JOB) == 0
    run = RunFolder(path)
    assert [record["id"] for record in run.records()] == [[n, 0] for n in range(14)]
    if damage == "twice":  # the line stays, its image counts once
        file.write_bytes(b"\n".join(dict.fromkeys(file.read_bytes().split(b"\n"))))
    assert content(cli.runs_dir) == expected


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in ("twice", "without its keys")])
def test_damaged_provenance_lends_no_launch_to_another(tmp_path: Path, damage: str) -> None:
    run = RunFolder(tmp_path)
    for number in range(3):
        assert run.launch({"seed": 0, "command": "run.py " * 10}) == number
        run.append(dict.fromkeys(run_folder.NEEDED, 0) | {"id": [number, 0], "launch": number})
    file = tmp_path / "provenance.jsonl"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert run.launch({"seed": 0}) == 3
    assert run.provenance()[-1] == {"launch": 3, "seed": 0}


# ---- several processes


@pytest.mark.full
def test_many_processes_started_on_one_run_at_once(cli: Cli, undisturbed: Callable) -> None:
    expected = undisturbed(cli, *JOB)
    started = [Forked(cli, *JOB, TOY_SECONDS_PER_BATCH="0.3") for _ in range(3)]
    codes = [process.wait() for process in started]
    assert sorted(codes) == [0, 1, 1]
    (winner,) = [process for process in started if process.code == 0]
    for process in started:
        if process is not winner:
            assert "is in use by " in process.output
            assert "wait for it or stop it" in process.output
            assert process.output.count("\n") == 1
    assert content(cli.runs_dir) == expected


# ---- clocks


@pytest.mark.full
def test_a_clock_that_was_set_back(cli: Cli, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable) -> None:
    expected = undisturbed(cli, *JOB)
    assert cli("decoder=sjd", "limit=6", "baseline=null") == 0
    clock, strftime = time.time, time.strftime
    year = 365 * 86400
    monkeypatch.setattr(time, "time", lambda: clock() - year)
    monkeypatch.setattr(
        time, "strftime", lambda form, *rest: strftime(form, *rest or (time.localtime(clock() - year),))
    )
    assert cli("decoder=sjd", "limit=10", "baseline=null") == 0
    monkeypatch.setattr(time, "time", lambda: clock() + year)
    monkeypatch.setattr(time, "strftime", strftime)
    assert cli(*JOB) == 0
    assert content(cli.runs_dir) == expected
    (path,) = run_folders(cli.runs_dir)
    run = RunFolder(path)
    assert [entry["launch"] for entry in run.provenance()] == [0, 1, 2]
    assert run.provenance()[1]["time"] < run.provenance()[0]["time"]
    assert all(seconds >= 0 for record in run.records() for seconds in record["seconds"].values())
    assert run.metrics["latency_s_median"] > 0
    assert np.isfinite(run.metrics["images_per_s"])
    assert json.loads((path / evaluation_job.NOTE).read_text())["n_images"] == 14
