"""Multiruns on a real Slurm cluster of one node: `python -m pytest -m slurm -n 0`; it is started and stopped here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from evaluation.run_folder import RunFolder, run_folders
from sweeps.multirun import jobs
from tests.helpers.cli import ROOT
from tests.helpers.slurm_cluster import Cluster, lacking, running

PLUGIN = "hydra_plugins.hydra_submitit_launcher"
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(lacking(accounts=True)), reason=f"not installed: {', '.join(lacking(accounts=True))}"),
    pytest.mark.skipif(not find_spec("hydra_plugins") or not find_spec(PLUGIN), reason="pip install -e '.[slurm]'"),
]
SLURM = (
    "hydra/launcher=slurm",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=1",
    "hydra.launcher.timeout_min=30",
)
QUICK = ("model=tiny", "evaluation=none", "logger=none", "batch_size=2", "baseline=null")
TOY = ("--config-dir", str(ROOT / "tests" / "conf"), "model=toy", "evaluation=none", "logger=none", "batch_size=4")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm"), accounts=True) as found:
        yield found


@pytest.fixture(scope="module")
def small_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that keeps no accounts."""
    with running(tmp_path_factory.mktemp("small"), accounts=False) as found:
        yield found


def start(cluster: Cluster, runs_dir: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    words = [*arguments, f"runs_dir={runs_dir}", "runtime.grace_s=20", *SLURM]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "-m", *words],
        env=os.environ | cluster.environment | environment,
        cwd=runs_dir.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def records(runs_dir: Path) -> dict[str, int]:
    return {path.name: len(RunFolder(path).records()) for path in run_folders(runs_dir)}


def running_jobs(runs_dir: Path) -> dict[int, dict]:
    """Return the jobs that run and have made images, by number."""
    found = {}
    for path in runs_dir.glob("sweeps/*/*/status.json"):
        job = json.loads(path.read_text())
        if job["status"] == "running":
            found[int(path.parent.name)] = job
    return found


def ended(runs_dir: Path) -> list[dict]:
    (folder,) = (runs_dir / "sweeps").iterdir()
    return jobs.statuses(folder)


def test_a_job_killed_hard_is_a_row_and_the_others_go_on(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    command = (*QUICK, "decoder=ar,sjd,scd", "limit=8")
    process = start(cluster, tmp_path / "runs", *command)
    wait_for(
        lambda: 0 in running_jobs(tmp_path / "runs") and any("-ar-" in name for name in records(tmp_path / "runs")),
        process,
    )
    os.kill(running_jobs(tmp_path / "runs")[0]["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 1, output
    assert "the launcher gave up" in output
    found = ended(tmp_path / "runs")
    assert [job["status"] for job in found] == ["running", "ok", "ok"]
    assert found[0]["reason"].startswith("died (signal 9")
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    table = (folder / "table.md").read_text()
    assert "died (signal 9" in table
    assert "| sjd |" in table
    assert "| scd |" in table

    again = start(cluster, tmp_path / "runs", *command)  # skips what is there, resumes what was cut
    output, _ = again.communicate(timeout=900)
    assert again.returncode == 0, output
    assert set(records(tmp_path / "runs").values()) == {8}
    assert sorted(len(RunFolder(path).provenance()) for path in run_folders(tmp_path / "runs")) == [1, 1, 2]


def test_a_job_before_its_limit_goes_back_into_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    process = start(
        cluster, tmp_path / "runs", *TOY, "decoder=ar,sjd", "limit=24", "baseline=null", TOY_SECONDS_PER_BATCH="3"
    )
    wait_for(lambda: len(records(tmp_path / "runs")) and running_jobs(tmp_path / "runs"), process)
    number, job = next(iter(running_jobs(tmp_path / "runs").items()))
    cluster.ask("scancel", "--signal=USR2", job["slurm"])  # what Slurm does `signal_delay_s` before the limit
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert [job["status"] for job in ended(tmp_path / "runs")] == ["ok", "ok"]
    assert set(records(tmp_path / "runs").values()) == {24}
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    run = RunFolder(json.loads((folder / str(number) / "status.json").read_text())["run_dir"])
    assert len(run.provenance()) == 2
    first = [record for record in run.records() if record["launch"] == 0]
    assert len(first) % 4 == 0  # the batch in hand was finished
    log = "".join(path.read_text() for path in folder.glob(".submitit/*/*_log.*"))
    assert "SIGUSR2: finishing the batch in hand" in log
    assert "Requeued job" in log


def test_a_cancelled_job_is_a_row(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    process = start(
        cluster, tmp_path / "runs", *TOY, "decoder=ar,sjd", "limit=40", "baseline=null", TOY_SECONDS_PER_BATCH="3"
    )
    wait_for(lambda: any("-sjd-" in name for name in records(tmp_path / "runs")), process)
    cluster.ask("scancel", running_jobs(tmp_path / "runs")[1]["slurm"])
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 1, output
    first, second = ended(tmp_path / "runs")
    assert first["status"] == "ok"
    assert second["status"] in ("stopped", "running")
    assert "was stopped" in second["reason"] or "was cancelled in Slurm" in second["reason"]


def test_a_cluster_without_accounts_ends_too(
    small_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit alone would wait for ever for a job that leaves no result where sacct knows nothing."""
    for name, value in small_cluster.environment.items():
        monkeypatch.setenv(name, value)
    process = start(
        small_cluster, tmp_path / "runs", *TOY, "decoder=ar,sjd", "limit=12", "baseline=null", TOY_SECONDS_PER_BATCH="3"
    )
    wait_for(lambda: running_jobs(tmp_path / "runs") and records(tmp_path / "runs"), process)
    number, job = next(iter(running_jobs(tmp_path / "runs").items()))
    os.kill(job["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 1, output
    assert "keeps no accounts" in output
    found = ended(tmp_path / "runs")
    assert found[number]["reason"].startswith("died (signal 9")
    assert found[1 - number]["status"] == "ok"
