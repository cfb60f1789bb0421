"""W&B: offline by itself, one run per job, readable, and never the end of a run."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path

import pytest

from harness.tracking import About, NoTracker, WandbTracker, has_account
from sjd2.errors import UserError
from tests.helpers.cli import Cli
from tests.helpers.wandb_file import offline_runs, read


def test_offline_without_an_account_and_everything_is_in_it(cli: Cli) -> None:
    assert cli("decoder=sjd", "limit=8", "logger=wandb", "logger.tags=[a]") == 0
    assert cli.out.count("W&B writes offline") == 1
    run = cli.run("sjd")
    (path,) = offline_runs(cli.runs_dir)  # one job, one W&B run: the AR baseline has none of its own
    assert path.is_relative_to(run.path / "wandb")
    mirror = read(path)
    assert mirror.id == run.config.identity.id
    assert mirror.kind == "sample"
    assert mirror.config["decoder"]["window"] == 16
    assert [step for step, _ in mirror.curve("sampling/tokens_per_forward")] == [4, 8]
    keys = {key.partition(".")[0] for row in mirror.history for key in row}
    assert keys >= {"grid", "acceptance", "images", "samples", "accepted_per_forward"}
    assert mirror.summary["n_images"] == 8
    assert mirror.summary["step_compression"] == pytest.approx(run.metrics["step_compression"])
    images = [p.name for p in path.parent.rglob("*.png")]
    assert any(name.startswith("grid") for name in images)
    assert len(images) == 10  # grid, acceptance, the eight of the run


def test_the_hint_is_a_command_and_a_finished_run_is_not_tracked_again(cli: Cli) -> None:
    command = ("decoder=ar", "limit=2", "logger=wandb")
    assert cli(*command) == 0
    (path,) = offline_runs(cli.runs_dir)
    (hint,) = re.findall(r"to upload it: (.+)", cli.out)
    program, login, both, again, sync, folder = shlex.split(hint)
    assert (login, both, again, sync) == ("login", "&&", program, "sync")
    assert Path(folder).resolve() == path.parent
    for changed, runs in ((), 1), (("evaluation=tiny",), 2), (("evaluation=tiny", "limit=3"), 3):
        assert cli(*command, *changed) == 0
        assert len(offline_runs(cli.runs_dir)) == runs


@pytest.mark.full
def test_one_run_per_job_of_a_multirun(cli: Cli) -> None:
    assert cli("-m", "decoder=ar,jacobi,sjd", "limit=2", "logger=wandb") == 0
    runs = [read(path) for path in offline_runs(cli.runs_dir)]
    assert len({run.id for run in runs}) == len(runs) == 3
    (sweep,) = (cli.runs_dir / "sweeps").iterdir()
    assert {run.group for run in runs} == {sweep.name}


def test_a_failed_run_is_closed_so_that_the_next_opens_its_own(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr("harness.job.score", lambda *_: 1 / 0)
    assert cli("decoder=ar", "limit=2", "logger=wandb") == 1
    assert wandb.run is None


def test_logger_none_leaves_nothing(cli: Cli) -> None:
    assert cli("decoder=ar", "limit=2", "logger=none") == 0
    assert not list(cli.runs_dir.rglob("wandb*"))
    assert "W&B" not in cli.out + cli.err


def test_an_account_without_a_server_ends_offline_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracker = WandbTracker(timeout=2.0)
    began = time.monotonic()
    tracker.start(About(id="x", name="x", kind="sample", config={}, folder=tmp_path))
    tracker.log(1, {"loss": 0.5})
    tracker.finish(failed=False)
    assert time.monotonic() - began < 60
    assert capsys.readouterr().out.count("W&B writes offline") == 1
    assert len(offline_runs(tmp_path)) == 1


def test_a_terminal_is_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    tracker = WandbTracker()
    tracker.start(About(id="x", name="x", kind="sample", config={}, folder=tmp_path))
    tracker.finish(failed=False)
    assert len(offline_runs(tmp_path)) == 1


def test_wandb_mode_of_the_environment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = WandbTracker()
    tracker.start(About(id="x", name="x", kind="sample", config={}, folder=tmp_path))
    tracker.log(1, {"loss": 0.5})
    tracker.finish(failed=False)
    assert offline_runs(tmp_path) == []


def test_a_tracker_that_breaks_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tracker = WandbTracker(mode="offline")
    tracker.start(About(id="x", name="x", kind="sample", config={}, folder=tmp_path))
    real = tracker._run

    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(real), "log", broken)
    tracker.log(1, {"loss": 0.5})
    tracker.summary({"a": 1})
    assert capsys.readouterr().out.count("W&B is off from here on") == 1
    real.finish()


def test_has_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_account()
    (tmp_path / "netrc").write_text("machine github.com login a password b\n")
    assert not has_account()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert has_account()
    (tmp_path / "netrc").write_text("nonsense here")
    assert not has_account()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert has_account()


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="timeout must be more than 0"):
        WandbTracker(timeout=0)
    NoTracker().check()
