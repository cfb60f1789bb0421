"""Run one job in its own process (Linux), so that its death is an exit code and the sweep continues.

The process is forked from one that has imported the libraries but used neither a GPU nor threads. It dies with its parent,
and signals that reach the parent are forwarded to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from harness.signals import SIGNALS, Interrupted

PR_SET_PDEATHSIG = 1  # prctl(2)


def can_isolate() -> bool:
    """Return whether this process may fork: on other systems that is not safe once libraries are loaded."""
    return sys.platform == "linux" and threading.current_thread() is threading.main_thread()


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process and return its exit code, or minus the number of the signal that ended it.

    Raises Interrupted or KeyboardInterrupt if this process is stopped meanwhile; the child is stopped too, and has ended.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the parent can forward them
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        code = 1
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                code = _code(work)
        finally:
            os._exit(code)  # the child must never return into its parent's code
    with _forwarding(pid) as received:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        try:
            status = os.waitpid(pid, 0)[1]
        except KeyboardInterrupt:
            _stop(pid)
            raise
    if received:
        raise Interrupted(128 + received[0])
    return os.waitstatus_to_exitcode(status)


def _code(work: Callable[[], None]) -> int:
    try:
        work()
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException:  # the top of this process: nothing above could report it
        traceback.print_exc()
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


@contextlib.contextmanager
def _forwarding(pid: int) -> Iterator[list[int]]:
    """Forward the signals of a scheduler to the child; yields those received."""
    received: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(pid: int, patience_s: float = 5.0) -> None:
    """Wait for a child that Ctrl-C normally reached too (a terminal sends it to both); interrupt it if not."""
    for number in (None, signal.SIGINT, signal.SIGKILL):
        if number is not None:
            os.kill(pid, number)
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
            time.sleep(0.05)
    os.waitpid(pid, 0)
