"""Commands in processes of their own that are forked from the test's: they start at once, for libraries are loaded."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

from harness.cli import main
from tests.helpers.cli import Cli


class Forked:
    """A command under way; `output` is what it has printed. Signals reach it as they would from a scheduler or a shell."""

    def __init__(self, cli: Cli, *arguments: str, user: int | None = None, **environment: str) -> None:
        self.log = Path(tempfile.mkstemp(dir=Path.cwd(), suffix=".log")[1])
        self.code: int | None = None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(cli.arguments(*arguments), environment, user)

    def _be(self, arguments: list[str], environment: dict[str, str], user: int | None) -> None:
        code = 70
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            os.environ.update(environment)
            if user is not None:
                os.setuid(user)
            sys.argv = arguments
            GlobalHydra.instance().clear()
            try:
                code = main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def poll(self) -> int | None:
        """Return the exit code, minus the signal's number, or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = 120.0) -> int:
        """Return the exit code; one that does not end is killed."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"did not end in {seconds} s: {self.output}")
            time.sleep(0.01)
        return self.code

    def send(self, number: int) -> None:
        """Send a signal to this process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def until(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        """Wait until something is true of it; fails where it ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)
