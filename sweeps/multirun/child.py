"""Run one job in a process of its own (Linux), so that its death is an exit code and the sweep goes on.

The process is forked from one that has imported the libraries but used neither a GPU nor threads. It dies with its parent,
and signals that reach the parent are handed on to it.
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
    """Say whether this process can: on other systems a fork is not safe once libraries are loaded."""
    return sys.platform == "linux" and threading.current_thread() is threading.main_thread()


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process and return its exit code, or minus the number of the signal that ended it.

    Raises Interrupted, KeyboardInterrupt if this process was told to stop meanwhile; the child was told too, and has ended.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the parent can hand them on
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        code = 1
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                code = _code(work)
        finally:
            os._exit(code)  # whatever happens, the child never returns into its parent's code
    with _handing_on(pid) as sent:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        try:
            status = os.waitpid(pid, 0)[1]
        except KeyboardInterrupt:
            _stop(pid)
            raise
    if sent:
        raise Interrupted(128 + sent[0])
    return os.waitstatus_to_exitcode(status)


def _code(work: Callable[[], None]) -> int:
    try:
        work()
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException:  # the top of this process: nobody above could report it
        traceback.print_exc()
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


@contextlib.contextmanager
def _handing_on(pid: int) -> Iterator[list[int]]:
    """Send the signals of a scheduler on to the child; yields those that came."""
    sent: list[int] = []

    def hand_on(number: int, _frame: Any) -> None:
        sent.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield sent
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(pid: int, patience_s: float = 5.0) -> None:
    """Wait for a child that Ctrl-C has reached too (a terminal sends it to all); interrupt it if it has not."""
    for number in (None, signal.SIGINT, signal.SIGKILL):
        if number is not None:
            os.kill(pid, number)
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
            time.sleep(0.05)
    os.waitpid(pid, 0)
