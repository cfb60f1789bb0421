"""Finding, hashing, reading and writing files.

Relative paths start at the working folder, else at the project's root; writes are atomic and on the disk when they return.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from sjd2.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
_HASHED_WHOLE = 256 * 2**20  # bytes; larger files are identified by size, head and tail


def find(path: str | Path) -> Path:
    """Return the existing file or folder that `path` names, or `path` itself if there is none."""
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:  # a container's user without an entry in passwd
        raise UserError(
            f"'{path}' is below a home folder that this user does not have; give the whole path."
        ) from error
    if not path.is_absolute() and not path.exists() and (ROOT / path).exists():
        return ROOT / path
    return path


def cache_root() -> Path:
    """Return where the user keeps files that can be made again (XDG_CACHE_HOME), in a folder of our own."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG rules have relative paths ignored
    return (Path(root) if Path(root).is_absolute() else Path(os.path.expanduser("~/.cache"))) / "sjd2"


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
        if size <= _HASHED_WHOLE:
            return hashlib.file_digest(handle, "blake2b").digest()
        head = handle.read(2**20)
        handle.seek(-(2**20), 2)
        return hashlib.blake2b(size.to_bytes(8, "little") + head + handle.read()).digest()


def read_json(path: Path, default: Any) -> Any:
    """Return the content of a JSON file, `default` if there is none; raises `UserError` if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run stage=score again.") from error


def read_text(path: Path, kind: str = "file") -> str:
    """Read a text file a user gave: UTF-8 with or without a byte order mark, line ends of any system as newlines.

    kind: what the error calls it. Raises `UserError` if the file is missing, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{kind} '{path}' does not exist (looked in {Path.cwd()}).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{kind} '{path}' is not UTF-8 at byte {error.start}; save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{kind} '{path}' cannot be read: {error.strerror}.") from error


def split_lines(text: str) -> list[str]:
    """Split text at newlines only, which it loses; a line's index + 1 is its number in an editor.

    Not `str.splitlines`: it also splits at U+2028, form feeds and six more characters that captions and prompts hold.
    """
    *lines, rest = text.replace("\r\n", "\n").split("\n")
    return [*lines, rest] if rest else lines


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a .jsonl file and the number of lines that are not one (a kill cuts the last line)."""
    if not path.is_file():
        return [], 0
    objects, damaged = [], 0
    *lines, rest = path.read_bytes().split(b"\n")  # what follows the last newline was cut, even if it parses
    for line in filter(None, lines):
        try:
            objects.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # no JSON, no UTF-8, or no object
            damaged += 1
    return objects, damaged + bool(rest)


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append objects to a .jsonl file in one write and wait for the disk; an incomplete last line is removed first."""
    data = "".join(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n" for record in records).encode()
    if not data:
        return
    with path.open("ab") as file:
        _remove_partial_line(path, file.tell())
        file.write(data)
        sync(file)


def _remove_partial_line(path: Path, size: int) -> None:
    """Remove what follows the last newline of a file of `size` bytes, so that the next record starts a line."""
    with path.open("rb+") as file:
        end = size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            block = file.read(end - start)
            if (at := block.rfind(b"\n")) >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def write_atomically(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Replace a file at once: a reader sees the old content or the new, also after a kill.

    content: bytes, or a function that writes them to an open file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            sync(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(file: Any) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())
