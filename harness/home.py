"""A home folder and a name for users who have none, as in a container started under a bare uid.

Without them the home folder is asked for in vain by wandb, Triton, torch's compiler and others (pytorch issue 140765).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import tempfile
from pathlib import Path

CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}  # written by libraries that fail or warn without


def ensure_home() -> None:
    """Set HOME and USER where neither the environment nor passwd has them, and caches where HOME cannot be written.

    Call it before anything heavy is imported. A HOME that is there stays: models and accounts are looked for in it.
    """
    with contextlib.suppress(RuntimeError):
        if os.access(Path.home(), os.W_OK):
            return
    place = _temporary()
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(place)
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ["USER"] = str(os.getuid())
    for name, folder in CACHES.items():
        os.environ.setdefault(name, str(place / folder))


def _temporary() -> Path:
    """Return a folder of this user's own, the same for every command."""
    place = Path(tempfile.gettempdir()) / f"sjd2-home-{os.getuid()}"
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o700, exist_ok=True)
        if place.stat().st_uid == os.getuid() and os.access(place, os.W_OK):
            return place
    return Path(tempfile.mkdtemp(prefix="sjd2-home-"))
