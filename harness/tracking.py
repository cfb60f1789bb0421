"""Weights & Biases as a mirror of what is on the disk; it never prompts, never hangs and never ends a run.

Online only where an account is found (WANDB_API_KEY, an identity token or netrc) and the server answers within
`timeout` seconds; else the run is written offline into the run folder and one line says so. What wandb raises, whatever
it is, costs what it was asked for and nothing else; the next call is tried again.
"""

from __future__ import annotations

import importlib
import netrc
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import numpy as np

from harness.console import say
from sjd2.errors import UserError, choose

HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # where wandb's releases look for an account
MODES = ("auto", "online", "offline")
STAGING = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")  # where wandb puts tables before they are uploaded
MOST_FAILURES = 3  # of W&B's calls before it is left alone: each may have waited for a server
NO_ACCOUNT = "no account was found (WANDB_API_KEY, netrc)"


@dataclass(frozen=True, kw_only=True)
class About:
    """What a tracker has to know of a run: `kind` is the job type, `group` the multirun it belongs to."""

    id: str
    name: str
    kind: str
    config: Mapping[str, Any]
    folder: Path
    group: str | None = None


class Tracker(Protocol):
    """What a run reports to; every call may do nothing."""

    def check(self) -> None: ...
    def start(self, about: About) -> None: ...
    def log(self, step: int, values: Mapping[str, Any]) -> None: ...
    def images(self, step: int, name: str, files: Sequence[tuple[Path, str]]) -> None: ...
    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...
    def histogram(self, step: int, name: str, values: Sequence[float]) -> None: ...
    def summary(self, values: Mapping[str, Any]) -> None: ...
    def finish(self, *, failed: bool) -> None: ...


class NoTracker:
    """`logger=none`: the run folder is the only record."""

    def check(self) -> None:
        """Accept: there is nothing to check."""

    def start(self, about: About) -> None:
        """Do nothing."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def images(self, step: int, name: str, files: Sequence[tuple[Path, str]]) -> None:
        """Do nothing."""

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Do nothing."""

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Do nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self, *, failed: bool) -> None:
        """Do nothing."""


class WandbTracker:
    """One W&B run per job. Its id is the run's identity, so that launches that resume a run are joined by the server.

    project, entity, group, tags, notes: as in wandb.init. mode: auto, online or offline.
    timeout: seconds to wait for the server. system_metrics: whether wandb samples CPU and GPU while images are timed.
    """

    def __init__(
        self,
        *,
        project: str = "sjd2",
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        mode: str = "auto",
        timeout: float = 15.0,
        system_metrics: bool = False,
    ) -> None:
        choose("logger.mode", mode, MODES)
        if timeout <= 0:
            raise UserError(f"logger.timeout must be more than 0 seconds, got {timeout}.")
        self.settings = {"project": project, "entity": entity, "tags": list(tags or ()), "notes": notes}
        self.group, self.mode, self.timeout, self.system_metrics = group, mode, timeout, system_metrics
        self._run: Any = None
        self._failures = 0
        self._placed: list[str] = []

    def check(self) -> None:
        """Raise UserError if wandb is not installed, or refuses a setting."""
        try:
            wandb = importlib.import_module("wandb")
        except Exception as error:  # not ImportError alone: wandb and what it needs run code of theirs
            raise UserError(f"logger=wandb cannot import wandb ({error}); install it or use logger=none.") from error
        names = {"project": "project", "entity": "entity", "tags": "run_tags", "notes": "run_notes"}
        given = {key: self.settings[key] for key in names} | {"group": self.group}
        for key, value in given.items():
            try:
                wandb.Settings(**{names.get(key, "run_group"): value or None})
            except Exception as error:  # pydantic's or wandb's own
                raise UserError(f"wandb refuses logger.{key}={value} ({_reason(error)}).") from error

    def start(self, about: About) -> None:
        """Open the W&B run of this job; its files lie in the run folder's wandb/."""
        try:
            self._start(about)
        except Exception as error:
            say(f"W&B is off: {_reason(error)}")

    def _start(self, about: About) -> None:
        import wandb

        about.folder.mkdir(parents=True, exist_ok=True)
        self._failures = 0
        # by itself wandb keeps tables in the home folder, which may be read-only, missing, or elsewhere when a run is synced
        self._release()
        self._placed = [name for name in STAGING if name not in os.environ]
        os.environ |= dict.fromkeys(self._placed, str((about.folder / "wandb").absolute()))
        options = {**self.settings, "id": about.id, "name": about.name, "job_type": about.kind}
        options |= {"group": self.group or about.group, "config": dict(about.config), "dir": str(about.folder)}
        options |= {"resume": "allow", "reinit": "finish_previous"}
        mode, reason = self._mode()
        if mode == "online":
            try:
                self._run = wandb.init(mode="online", settings=self._settings(), **options)
                return
            except Exception as error:
                reason = f"the server could not be used ({_reason(error)})"
                wandb.teardown()
        if mode == "disabled":
            return
        self._run = wandb.init(mode="offline", settings=self._settings(), **options)
        if reason:
            say(f"W&B writes offline to {about.folder / 'wandb'}: {reason}; to upload it: {self._upload()}")

    def _upload(self) -> str:
        """Return the command that uploads an offline run, as it may be pasted into a shell."""
        folder, beside = Path(self._run.dir).parent, Path(sys.executable).with_name("wandb")
        folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        program = "wandb" if shutil.which("wandb") else str(beside)  # the environment need not be activated
        return f"{shlex.quote(program)} login && {shlex.quote(program)} sync {shlex.quote(str(folder))}"

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one point to curves; steps count images (or training steps)."""
        self._do(lambda run, wandb: _log(run, values, step))

    def images(self, step: int, name: str, files: Sequence[tuple[Path, str]]) -> None:
        """Show image files with a caption each.

        They are no cells of a table: W&B keeps those outside the run folder, where an offline run loses them.
        """
        self._do(lambda run, wandb: _log(run, {name: [wandb.Image(str(p), caption=c) for p, c in files]}, step))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table of numbers and text."""
        data = [list(row) for row in rows]
        self._do(lambda run, wandb: _log(run, {name: wandb.Table(columns=list(columns), data=data)}, step))

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Show the distribution of values; at most 64 bins."""
        bins = min(64, max(1, len(set(values))))
        self._do(lambda run, wandb: _log(run, {name: wandb.Histogram(np.asarray(values), num_bins=bins)}, step))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write the run's final metrics."""
        self._do(lambda run, wandb: run.summary.update(dict(values)))

    def finish(self, *, failed: bool) -> None:
        """Close the run; also after errors, so that the next job of a multirun opens its own."""
        self._do(lambda run, wandb: run.finish(exit_code=int(failed)))
        self._run = None
        self._release()

    def _release(self) -> None:
        for name in self._placed:
            os.environ.pop(name, None)
        self._placed = []

    def _do(self, action: Any) -> None:
        """Act on the W&B run; if W&B fails, print so once and continue: a table it cannot take costs no final metrics."""
        if self._run is None:
            return
        import wandb

        try:
            action(self._run, wandb)
            return
        except Exception as error:  # a mirror: the disk is the record
            self._failures += 1
            if self._failures == 1:
                say(f"W&B lacks some of this run: {_reason(error)}; the run folder has everything.")
        if self._failures == MOST_FAILURES:
            say("W&B is off from here on.")
            self._run = None

    def _mode(self) -> tuple[str, str | None]:
        """Return wandb's mode and, where the user has to know, why it is offline."""
        wish = os.environ.get("WANDB_MODE", "auto") if self.mode == "auto" else self.mode
        if wish in ("offline", "dryrun"):
            return "offline", None
        if wish == "disabled":
            return "disabled", None
        return ("online", None) if has_account() else ("offline", NO_ACCOUNT)

    def _settings(self) -> Any:
        import wandb

        wishes = {
            "init_timeout": self.timeout,
            "console": "off",
            "silent": True,
            "x_disable_stats": not self.system_metrics,
            "finish_timeout": 4 * self.timeout,
        }
        return wandb.Settings(**{key: value for key, value in wishes.items() if key in wandb.Settings.model_fields})


def _reason(error: Any) -> str:
    text = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)  # pydantic's own text has four lines
    return " ".join(text.split())[:160] or type(error).__name__


def _log(run: Any, values: Mapping[str, Any], step: int) -> None:
    # offline, a resumed run counts from 0 again, so steps are named; online, W&B drops what lies before its own next step.
    # not `run.step`: that asks W&B's process at every call, and a busy machine answers too late
    run.log(dict(values), step=max(step, run.starting_step))


def has_account() -> bool:
    """Return whether wandb would find a key without asking for one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    hosts = {*HOSTS, urlparse(os.environ.get("WANDB_BASE_URL", "")).netloc} - {""}
    for path in (Path(os.path.expanduser(file)) for file in files):  # Path.expanduser raises where there is no home
        try:
            if path.is_file() and hosts & set(netrc.netrc(str(path)).hosts):
                return True
        except (netrc.NetrcParseError, OSError):
            continue
    return False
