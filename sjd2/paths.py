"""Where files are: a relative path is looked up from the working folder first, then from the project's root."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_WHOLE = 256 * 2**20  # bytes; larger files are told apart by size, head and tail


def find(path: str | Path) -> Path:
    """Return the existing file or folder that `path` names, or `path` itself where there is none."""
    path = Path(path).expanduser()
    if not path.is_absolute() and not path.exists() and (ROOT / path).exists():
        return ROOT / path
    return path


def digest(*paths: Path | None, suffixes: tuple[str, ...] = (".safetensors", ".json", ".ckpt", ".pt", ".bin")) -> str:
    """Return 12 hex digits over the contents of files (or of the weight and config files of folders)."""
    total = hashlib.blake2b(digest_size=6)
    for path in paths:
        if path is None:
            continue
        files = sorted(f for f in path.iterdir() if f.suffix in suffixes) if path.is_dir() else [path]
        for file in files:
            total.update(file.name.encode())
            total.update(_content(file))
    return total.hexdigest()


def _content(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as handle:
        if size <= _WHOLE:
            return hashlib.file_digest(handle, "blake2b").digest()
        head = handle.read(2**20)
        handle.seek(-(2**20), 2)
        return hashlib.blake2b(size.to_bytes(8, "little") + head + handle.read()).digest()
