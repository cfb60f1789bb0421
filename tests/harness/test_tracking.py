"""W&B: offline by itself, one run per job, readable, and never the end of a run."""

from __future__ import annotations

import getpass
import os
import pwd
import re
import shlex
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest

from harness.home import ensure_home
from harness.tracking import About, NoTracker, WandbTracker, has_account
from sjd2.errors import UserError
from sjd2.files import ROOT, cache_root, find
from tests.helpers.cli import Cli
from tests.helpers.forked import Forked
from tests.helpers.process_state import restored
from tests.helpers.wandb_file import offline_runs, read

NOT_ROOT = "the test acts as another user, which only root may, and who cannot enter this checkout's folder"


@pytest.fixture(autouse=True)
def _service() -> Iterator[None]:
    """Wandb's process outlives the test that started it; what it leaves in the environment does not."""
    yield
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a container's user: no entry in passwd, no HOME."""

    def unknown(_: int) -> None:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_configdir())  # no new cache of fonts, which takes seconds
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("nameless")
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
    assert any(
        file.is_relative_to(run.path / "wandb") for file in run.path.rglob("*.table.json")
    )  # not in the home folder
    assert not [name for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR") if name in os.environ]
    assert not Path("~").exists()


@pytest.mark.usefixtures("plain")
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
@pytest.mark.usefixtures("plain")
def test_one_run_per_job_of_a_multirun(cli: Cli) -> None:
    assert cli("-m", "decoder=ar,jacobi,sjd", "limit=2", "logger=wandb") == 0
    runs = [read(path) for path in offline_runs(cli.runs_dir)]
    assert len({run.id for run in runs}) == len(runs) == 3
    (sweep,) = (cli.runs_dir / "sweeps").iterdir()
    assert {run.group for run in runs} == {sweep.name}


@pytest.mark.usefixtures("plain")
def test_a_failed_run_is_closed_so_that_the_next_opens_its_own(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr("harness.job.score", lambda *_: 1 / 0)
    assert cli("decoder=ar", "limit=2", "logger=wandb") == 1
    assert wandb.run is None


@pytest.mark.usefixtures("plain")
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
    tracker.table(1, "t", ["a"], [[1]])
    tracker.summary({"a": 1})  # is tried again: a lost table costs no final metrics
    assert real.summary["a"] == 1
    assert capsys.readouterr().out.count("W&B lacks some of this run: [Errno 28]") == 1
    tracker.log(2, {"loss": 0.5})
    tracker.log(3, {"loss": 0.5})
    assert capsys.readouterr().out == "W&B is off from here on.\n"
    real.finish()
    monkeypatch.setattr("wandb.init", lambda **_: 1 / 0)
    tracker.start(About(id="x", name="x", kind="sample", config={}, folder=tmp_path))
    tracker.summary({"a": 1})
    tracker.finish(failed=False)
    assert capsys.readouterr().out == "W&B is off: division by zero\n"


@pytest.mark.parametrize(
    "settings", [{"project": "a/b"}, {"tags": [""]}, {"tags": ["x" * 65]}, {"entity": 3}, {"group": ["a"]}]
)
def test_settings_that_wandb_refuses_are_reported_at_once(settings: dict) -> None:
    (key,) = settings
    with pytest.raises(UserError, match=f"wandb refuses logger.{key}="):
        WandbTracker(**settings).check()


@pytest.mark.usefixtures("nameless")
def test_what_lies_in_a_home_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError):
        Path("~").expanduser()
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    assert not has_account()
    assert str(cache_root()).endswith("sjd2")
    with pytest.raises(UserError, match="home folder that this user does not have; give the whole path"):
        find("~/weights")
    with restored():
        ensure_home()  # what a command does first
        assert os.access(Path.home(), os.W_OK)
        assert getpass.getuser() == str(os.getuid())
        os.environ["HOME"] = "/proc"
        del os.environ["TRITON_CACHE_DIR"]
        monkeypatch.setattr("os.access", lambda path, _: str(path) != "/proc")  # which lets root do anything
        ensure_home()
        assert os.environ["HOME"] == "/proc"  # read-only, but models and accounts may lie in it
        assert Path(os.environ["TRITON_CACHE_DIR"]).parent.is_dir()


@pytest.mark.full
@pytest.mark.skipif(bool(os.geteuid()) or any(not p.stat().st_mode & 0o001 for p in ROOT.parents), reason=NOT_ROOT)
def test_another_user_with_a_home_that_is_read_only(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The final metrics reach W&B, its tables lie in the run folder."""
    import wandb
    from wandb.sdk.data_types._private import MEDIA_TMP

    monkeypatch.setenv("HOME", "/proc")
    assert cli("decoder=sjd", "limit=4", "baseline=null", "logger=wandb") == 0  # what it imports is imported
    wandb.teardown()  # its service and its folder for tables are this user's
    Path(MEDIA_TMP.name).chmod(0o777)
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o777)
        monkeypatch.chdir(place)
        cli.runs_dir = Path(place) / "runs"
        process = Forked(cli, "decoder=sjd", "limit=4", "baseline=null", "logger=wandb", user=54321)
        assert process.wait() == 0, process.output
        assert "lacks some" not in process.output
        (path,) = offline_runs(cli.runs_dir)
        assert read(path).summary["n_images"] == 4
        assert any("wandb" in str(file.relative_to(cli.runs_dir)) for file in cli.runs_dir.rglob("*.table.json"))


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
