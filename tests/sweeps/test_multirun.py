"""Multiruns: jobs that fail or die are rows, the table comes in every case, and the same command resumes."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from evaluation.run_folder import RunFolder, run_folders
from harness import job as evaluation_job
from harness import sample as sampling
from harness.signals import Interrupted
from sjd2.decoding.generate import generate
from sweeps.multirun import callback, child, jobs, slurm
from sweeps.multirun.callback import Tables
from tests.helpers.cli import Cli
from tests.helpers.forked import Forked

SLOW = {"TOY_SECONDS_PER_BATCH": "0.3"}


def sweeps(cli: Cli) -> list[Path]:
    return sorted((cli.runs_dir / "sweeps").glob("*"))


def status(sweep: Path, number: int) -> dict:
    return json.loads((sweep / str(number) / "status.json").read_text())


def records(cli: Cli) -> int:
    return sum(len(RunFolder(path).records()) for path in run_folders(cli.runs_dir))


# ---- jobs that die


def break_jobs(monkeypatch: pytest.MonkeyPatch, breaking: Callable[[], None], window: int) -> None:
    """Make every job of one window break after its warm-up."""

    def broken(model, decoder, cond, seeds, *, sampling, on_step=None, graphs=None):
        if decoder.window == window and any(seeds):
            breaking()
        return generate(model, decoder, cond, seeds, sampling=sampling, on_step=on_step, graphs=graphs)

    monkeypatch.setattr(sampling, "generate", broken)


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_a_job_that_dies_is_a_row_and_the_sweep_goes_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "died (signal 9: killed from outside, or out of memory); the same command resumes"
    command = ("-m", "decoder=sjd", "decoder.window=4,6,8", "limit=6", "baseline=null")
    break_jobs(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL), window=6)
    assert cli(*command) == 1
    (sweep,) = sweeps(cli)
    assert [status(sweep, n)["status"] for n in range(3)] == ["ok", "failed", "ok"]
    assert status(sweep, 1)["reason"].startswith(reason)
    assert f"error: job 1 {reason}" in cli.err
    table = (sweep / "table.md").read_text()
    assert reason in table
    assert "window=6" in table
    assert {status(sweep, n)["pid"] for n in range(3)} == {os.getpid()}  # the jobs' parent; the test's process lives

    monkeypatch.undo()
    assert cli(*command) == 0  # skips what is there, makes the rest
    assert cli.out.count("all 6 images are there") == 2
    assert cli.out.count("weights are loaded") == 1
    assert [s["status"] for s in jobs.statuses(sweeps(cli)[1])] == ["ok"] * 3
    assert "failed" not in (sweeps(cli)[1] / "table.md").read_text()


@pytest.mark.usefixtures("plain")
def test_without_isolation_jobs_share_the_process(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    make = evaluation_job.make_images
    monkeypatch.setattr(evaluation_job, "make_images", lambda *given: [seen.append(os.getpid()), make(*given)][1])
    cli("-m", "decoder=ar,sjd", "limit=1", "baseline=null", "runtime.isolate=false")
    assert seen == [os.getpid()] * 2
    cli("-m", "decoder=ar,sjd", "limit=1", "baseline=null")
    assert len(seen) == 2


@pytest.mark.usefixtures("plain")
def test_a_finished_run_is_not_scored_again(cli: Cli) -> None:
    command = ("decoder=ar", "limit=2", "evaluation=none")
    assert cli(*command) == 0
    run = cli.run("ar")
    figures = run.metrics | {"fid": 1.5}
    (run.path / "metrics.json").write_text(json.dumps(figures))
    assert cli(*command) == 0
    assert run.metrics["fid"] == 1.5
    (run.path / "metrics.json").write_text(json.dumps(figures | {"step_compression": 7}))
    assert cli("stage=score", f"run_dir={run.path}") == 0  # asked for
    assert run.metrics["step_compression"] == 1
    (run.path / "metrics.json").write_text(json.dumps(figures | {"step_compression": 7}))
    assert cli(*command, "+evaluation.metrics.again=${evaluation.metrics.speed}") == 0  # other settings
    assert run.metrics["step_compression"] == 1


# ---- sweeps that are cut


def cut(cli: Cli, number: int) -> tuple[Path, int]:
    """Start a sweep of three jobs, end it within its second job by a signal; returns its folder and its exit code."""
    process = Forked(cli, "-m", "decoder=sjd", "decoder.window=4,6,8", "limit=8", "baseline=null", **SLOW)
    process.until(lambda: records(cli) >= 12)
    process.send(number)
    code = process.wait()
    (sweep,) = sweeps(cli)
    return sweep, code


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_a_killed_sweep_is_tabulated_later_and_goes_on(cli: Cli) -> None:
    sweep, code = cut(cli, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (sweep / "table.md").exists()
    assert cli("stage=table", f"run_dir={sweep}") == 0
    table = (sweep / "table.md").read_text()
    assert "died: killed or out of memory" in table
    assert jobs.WAITING in table
    assert "| sjd" in table
    assert (
        len([line for line in table.splitlines() if "window=8" in line]) == 1
    )  # the job that never started has its name
    before = {path.name: len(RunFolder(path).records()) for path in run_folders(cli.runs_dir)}
    time.sleep(0.7)
    assert before == {
        path.name: len(RunFolder(path).records()) for path in run_folders(cli.runs_dir)
    }  # no job lives on
    assert cli("-m", "decoder=sjd", "decoder.window=4,6,8", "limit=8", "baseline=null") == 0
    assert cli.out.count("all 8 images are there") == 1
    assert cli.out.count(" of 8 images are there, resuming") == 1


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_sigterm_ends_the_job_in_hand_and_the_sweep(cli: Cli) -> None:
    sweep, code = cut(cli, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert status(sweep, 1)["status"] == "stopped"
    assert not (sweep / "2").exists()
    assert records(cli) % 4 == 0  # whole batches
    assert [s["status"] for s in jobs.statuses(sweep)] == ["ok", "stopped", "failed"]


@pytest.mark.usefixtures("plain")
def test_ctrl_c_says_how_to_get_the_table(cli: Cli) -> None:
    process = Forked(cli, "-m", "decoder=sjd", "decoder.window=4,6", "limit=8", "baseline=null", **SLOW)
    process.until(lambda: records(cli) >= 4)
    (job,) = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(job, signal.SIGINT)  # a terminal sends it to both
    process.send(signal.SIGINT)
    assert process.wait() == 130
    (sweep,) = sweeps(cli)
    assert f"stage=table run_dir={sweep}" in process.output
    assert "stopped; the same command resumes where this one ended" in process.output
    assert status(sweep, 0)["status"] == "stopped"
    assert "Traceback" not in process.output


@pytest.mark.full
def test_a_launcher_that_gives_up_still_leaves_a_table(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    make, asked = Plugins.instantiate_launcher, []

    def instantiate(self, **parts):
        launcher = make(self, **parts)
        launch = launcher.launch

        def give_up(job_overrides, initial_job_idx):
            launch(job_overrides, initial_job_idx)
            (sweep,) = sweeps(cli)
            (sweep / "1" / "status.json").write_text(json.dumps(status(sweep, 1) | {"status": "running", "pid": -1}))
            raise RuntimeError("A worker process was unexpectedly terminated\nby the system")

        launcher.launch = give_up
        return launcher

    monkeypatch.setattr(Plugins, "instantiate_launcher", instantiate)
    monkeypatch.setattr(jobs, "alive", lambda pid: asked.append(pid) or len(asked) < 3)  # it runs on for a moment
    assert cli("-m", "decoder=ar,sjd", "limit=2", "baseline=null") == 1
    assert len(asked) >= 3
    assert "the launcher gave up (A worker process was unexpectedly terminated by the system)" in cli.err
    assert "bug" not in cli.err
    (sweep,) = sweeps(cli)
    assert "died: killed or out of memory" in (sweep / "table.md").read_text()
    assert "| ar |" in (sweep / "table.md").read_text()
    assert (sweep / "grid.png").is_file()


def test_a_sweep_that_cannot_start_says_why(cli: Cli) -> None:
    assert cli("-m", "decoder=ar,sdj", "limit=2") == 1
    assert "unknown decoder 'sdj'" in cli.err
    assert "gave up" not in cli.err


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_two_sweeps_never_share_a_folder(cli: Cli) -> None:
    folder = cli.runs_dir / "sweeps" / "mine"  # as two that start within one second, or after the clock was set back
    first = Forked(cli, "-m", "decoder=ar,sjd", "limit=8", "baseline=null", f"hydra.sweep.dir={folder}", **SLOW)
    first.until(lambda: (folder / "0" / "status.json").is_file())
    assert cli("-m", "decoder=ar", "limit=2", f"hydra.sweep.dir={folder}") == 1
    assert f"sweep folder {folder} is in use by process {first.pid}" in cli.err
    assert first.wait() == 0
    assert (
        cli("-m", "decoder=ar", "limit=2", f"hydra.sweep.dir={folder}") == 0
    )  # later: what became of its jobs is forgotten
    assert [s["status"] for s in jobs.statuses(folder)] == ["ok"]


@pytest.mark.usefixtures("plain")
def test_jobs_follow_from_what_hydra_was_asked(cli: Cli, tmp_path: Path) -> None:
    assert cli("-m", "experiment=quick", "decoder=ar,sjd", "limit=1", "baseline=null", "model.rows=1") == 0
    (sweep,) = sweeps(cli)
    planned = jobs.planned_jobs(sweep)
    assert len(planned) == 2
    for number, words in enumerate(planned):
        assert set(status(sweep, number)["overrides"]) == set(words)
    assert jobs.is_sweep(sweep)
    assert not jobs.is_sweep(run_folders(cli.runs_dir)[0])
    assert jobs.planned_jobs(tmp_path) == []
    OmegaConf.save({"hydra": {"sweeper": {"_target_": "optuna.Sweeper"}}}, tmp_path / "multirun.yaml")
    assert jobs.planned_jobs(tmp_path) == []


# ---- processes of their own


@pytest.mark.parametrize(
    ("work", "code"),
    [
        (lambda: None, 0),
        (lambda: sys.exit(3), 3),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -9),
        (lambda: [faulthandler.disable(), os.kill(os.getpid(), signal.SIGSEGV)], -11),
        (lambda: 1 / 0, 1),
        (lambda: signal.raise_signal(signal.SIGINT), 130),
    ],
    ids=["ends", "exit", "killed", "segfault", "error", "interrupted"],
)
def test_exit_codes_of_children(work: Callable[[], None], code: int, capfd: pytest.CaptureFixture) -> None:
    assert child.in_child(work) == code


def test_signals_are_handed_on(tmp_path: Path) -> None:
    def work() -> None:
        signal.signal(signal.SIGTERM, lambda *_: (tmp_path / "received").touch() or sys.exit(7))
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(30)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as end:
        child.in_child(work)
    assert end.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "received").exists()
    assert signal.getsignal(signal.SIGTERM) == before


# ---- what Slurm says

SCONTROL = "JobId=7 JobName=run JobState={} Reason=x Dependency=(null) Requeue=1 ExitCode={} DerivedExitCode=0:0"


@pytest.mark.parametrize(
    ("state", "code", "accounts", "reason"),
    [
        ("RUNNING", "0:0", "", "is still running (running)"),
        ("PENDING", "0:9", "", "is still running (pending)"),  # back in the queue
        ("COMPLETING", "0:9", "", "is still running"),
        ("FAILED", "137:0", "FAILED|9:0\nFAILED|9:0\nCANCELLED|0:9", "died (signal 9"),
        ("FAILED", "137:0", None, "died (signal 9"),  # a cluster without accounts
        ("FAILED", "0:11", None, "died (signal 11, SIGSEGV)"),
        ("FAILED", "3:0", "FAILED|3:0", "ended without a status (failed in Slurm)"),
        ("OUT_OF_MEMORY", "0:125", "", "ran out of memory in Slurm"),
        ("TIMEOUT", "0:0", "", "ran into its time limit in Slurm"),
        ("CANCELLED", "0:15", "", "was cancelled in Slurm"),
        ("NODE_FAIL", "1:0", "", "lost its node in Slurm"),
        (None, None, "TIMEOUT|0:0\nCANCELLED|0:15", "ran into its time limit in Slurm"),  # forgotten by the controller
        (None, None, "CANCELLED by 1000|0:0", "was cancelled in Slurm"),
        (None, None, None, jobs.KILLED),
    ],
)
def test_reasons_from_slurm(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str | None,
    code: str | None,
    accounts: str | None,
    reason: str,
) -> None:
    answers = {"scontrol": SCONTROL.format(state, code) if state else None, "sacct": accounts}
    for name, text in answers.items():
        script = f"cat <<'END'\n{text}\nEND\n" if text is not None else "exit 1\n"
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "3").mkdir()
    written = {
        "status": "running",
        "reason": None,
        "overrides": ["decoder=ar"],
        "pid": 1,
        "host": "elsewhere",
        "slurm": "7",
    }
    (tmp_path / "3" / "status.json").write_text(json.dumps(written))
    (found,) = jobs.statuses(tmp_path)
    assert found["reason"].startswith(reason)
    # one that a signal stopped runs on if Slurm has it again, and else keeps its own words
    (tmp_path / "3" / "status.json").write_text(json.dumps(written | {"status": "stopped", "reason": "was stopped."}))
    (found,) = jobs.statuses(tmp_path)
    again = "is still running" in reason
    assert found["status"] == ("running" if again else "stopped")
    assert found["reason"].startswith(reason if again else "was stopped.")


def test_the_queue_is_asked_and_forgotten_jobs_are_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def squeue(script: str) -> None:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "squeue").chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm.queued([]) == []
    assert slurm.queued(["1_0"]) is None  # no squeue here
    squeue("echo $*; echo RUNNING")
    assert "--jobs=1_0,1_1" in slurm.queued(["1_0", "1_1"])
    squeue("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.queued(["1_0"]) == []
    squeue("echo 'Unable to contact slurm controller' >&2; exit 1")
    assert slurm.queued(["1_0"]) is None
    (tmp_path / ".submitit" / "12_1").mkdir(parents=True)
    assert slurm.submitted(tmp_path) == ["12_1"]


def test_without_accounts_an_empty_queue_ends_the_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "submitted", lambda _: ["1_0"])
    answers = iter([None, ["RUNNING"], [], ["COMPLETING"], [], [], []])
    monkeypatch.setattr(slurm, "queued", lambda _: next(answers))
    monkeypatch.setattr(callback, "QUIET_S", -1.0)  # at the first empty answer
    monkeypatch.setattr(Tables, "sweep", tmp_path)
    monkeypatch.setattr(Tables, "gave_up", False)
    interrupts = []
    monkeypatch.setattr(callback._thread, "interrupt_main", lambda: interrupts.append(len(list(answers))))
    callback._watch(tmp_path, poll_s=0)
    assert Tables.gave_up
    assert interrupts == [4]  # a controller that does not answer, and a running job, are waited for
