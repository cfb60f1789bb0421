"""Lock files: one process, or the ranks of one launch, in a folder at a time; a killed process leaves no stale lock."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sjd2.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no fcntl: there the lock falls back on the process id it names
    fcntl = None


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = False, shared: bool = False, what: str = "run folder") -> Iterator[None]:
    """Hold the lock file `path`; raises `UserError` naming the process that holds it, or waits for it with `wait`.

    shared: others may `join` it, and it is held until the last of them leaves. what: the folder's name in messages.
    The operating system drops an flock with its process, so a killed run leaves no stale lock. Where the file system
    has no flock, the process id in the file decides: a lock of this machine whose process is gone is taken over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        reported = False
        while not _acquire(file):
            holder = _holder(path)
            if not wait:
                raise UserError(
                    f"{what} {path.parent} is in use by {holder}; wait for it or stop it "
                    f"(if that process is gone, delete {path})."
                )
            if not reported:
                print(f"waiting for {path.parent.name}, which {holder} is writing", flush=True)
                reported = True
            time.sleep(0.5)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}))
        file.flush()
        if shared:
            _flock(file, exclusive=False)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a full disk must not hide the error that ended the run
                file.truncate(0)


@contextlib.contextmanager
def join(path: Path) -> Iterator[None]:
    """Hold a lock that another process has taken as `shared`; raises `UserError` if a third one has taken it since."""
    with path.open("a+") as file:
        if _flock(file, exclusive=False) is False:
            raise UserError(
                f"run folder {path.parent} is in use by {_holder(path)}, which is not of this launch; wait for it or stop it."
            )
        yield


def _flock(file: Any, *, exclusive: bool) -> bool | None:
    """Try to take the flock and return whether it was free; None where the file system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:  # this file system has no flock
        return None


def _acquire(file: Any) -> bool:
    """Try to take the lock and return whether it was free; without flock, by the process id in the file."""
    if (free := _flock(file, exclusive=True)) is not None:
        return free
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return True
    return owner["host"] == socket.gethostname() and not alive(owner["pid"])


def alive(pid: int) -> bool:
    """Return whether a process of this machine is running."""
    if os.name == "nt":  # os.kill would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _holder(path: Path) -> str:
    """Describe the process that holds the lock, for messages."""
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
