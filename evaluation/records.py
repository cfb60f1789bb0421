"""The run folder: what a run is (its identity), one line per image, and nothing lost or doubled when a run is killed.

    config.yaml       the resolved settings, and `identity`: what decides the tokens
    provenance.jsonl  per launch: git commit, package versions, hardware, dtype, weights, command; peak memory
    samples*.jsonl    one line per image (one file per rank)
    images/ tokens/   00012_0.png and .npy: prompt 12, repeat 0; traces/ with trace=N
    metrics.json, grid.png, acceptance.png, wandb/

An image and its tokens are on the disk before the line that names them, so a line never lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from sjd2.errors import UserError
from sjd2.paths import digest, find

try:
    import fcntl
except ImportError:  # Windows has no fcntl: there the lock falls back on the process id it names
    fcntl = None

Id = tuple[int, int]  # (prompt index, repeat)
NEEDED = {"id", "prompt", "launch", "batch", "tokens", "forwards", "accepted", "seconds", "image", "tokens_sha256"}
PATH_KEYS = ("weights", "adapter")  # settings that name files: the files' digest counts, not where they lie


class RunFolder:
    """One run on the disk: `<runs_dir>/<model>-<decoder>-<id>/`."""

    def __init__(self, path: str | Path) -> None:
        """Name the folder; nothing is read or written yet."""
        self.path = Path(path)
        self.damaged = 0  # unreadable lines met by the last records()

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Return the folder of a run that exists; raises UserError where there is none."""
        run = cls(path)
        if not (run.path / "config.yaml").is_file():
            raise UserError(
                f"'{path}' is no run folder (no config.yaml in it); give the folder that a run printed last."
            )
        return run

    # ---- what the run is

    @cached_property
    def config(self) -> DictConfig:
        """Return the resolved settings of the run's last launch, `identity` among them."""
        return OmegaConf.load(self.path / "config.yaml")

    @property
    def metrics(self) -> dict[str, Any]:
        """Return metrics.json, or {} before the run was scored."""
        return read_json(self.path / "metrics.json", {})

    def provenance(self) -> list[dict[str, Any]]:
        """Return one entry per launch, what it reported at its end merged in, in the order of the launches."""
        launches: dict[int, dict[str, Any]] = {}
        for line in read_lines(self.path / "provenance.jsonl")[0]:
            launches.setdefault(line["launch"], {}).update(line)
        return [launches[number] for number in sorted(launches)]

    def claim(self, settings: DictConfig, identity: dict[str, Any]) -> None:
        """Make the folder and write config.yaml; raises UserError if the folder already holds another run."""
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / "config.yaml").is_file():
            old = OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml")).get("identity") or {}
            if old.get("id") != identity["id"]:
                raise UserError(
                    f"run folder {self.path} holds another run ({_difference(old, identity)}); "
                    "leave run_dir out, or give another runs_dir."
                )
        write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(settings).encode())
        self.__dict__.pop("config", None)

    # ---- samples

    def records(self) -> list[dict[str, Any]]:
        """Return one record per image, sorted by id; a line that a kill cut short, or without a record's keys, is left out."""
        found: dict[Id, dict[str, Any]] = {}
        self.damaged = 0
        for path in sorted(self.path.glob("samples*.jsonl")):
            lines, damaged = read_lines(path)
            self.damaged += damaged
            for record in lines:
                if record.keys() >= NEEDED:
                    found.setdefault((record["id"][0], record["id"][1]), record)
                else:
                    self.damaged += 1
        return [found[key] for key in sorted(found)]

    def missing(self, ids: Iterable[Id]) -> list[Id]:
        """Return those of `ids` that have no record yet, in their order."""
        done = {tuple(record["id"]) for record in self.records()}
        return [key for key in ids if tuple(key) not in done]

    def images(self, ids: Iterable[Id] | None = None) -> Iterator[np.ndarray]:
        """Yield the images, uint8 [H, W, 3] RGB, in the order of records() (or of `ids`)."""
        records = self.records()
        if ids is not None:
            by_id = {tuple(record["id"]): record for record in records}
            records = [by_id[tuple(key)] for key in ids]
        for record in records:
            try:
                with Image.open(self.path / record["image"]) as image:
                    yield np.asarray(image.convert("RGB"))
            except OSError as error:
                raise UserError(f"cannot read {self.path / record['image']} ({error.strerror or error}).") from error

    def tokens(self, record: dict[str, Any]) -> np.ndarray:
        """Return the local token ids of one record, int32 [N]."""
        return np.load(self.path / "tokens" / f"{name(record['id'])}.npy")

    def traced(self, record: dict[str, Any]) -> bool:
        """Say whether this image was made under `trace=`: its times hold extra waits and count in no speed figure."""
        return (self.path / "traces" / f"{name(record['id'])}.json").is_file()

    def write_image(self, key: Id, image: np.ndarray, tokens: np.ndarray) -> dict[str, str]:
        """Put image [H, W, 3] uint8 and tokens [N] on the disk; returns the record's `image` and `tokens_sha256`."""
        self._folders()
        tokens = np.ascontiguousarray(tokens, dtype="<i4")
        picture, array = self.path / "images" / f"{name(key)}.png", self.path / "tokens" / f"{name(key)}.npy"
        with picture.open("wb") as file:
            Image.fromarray(image).save(file, format="PNG")
            _sync(file)
        with array.open("wb") as file:
            np.save(file, tokens)
            _sync(file)
        return {
            "image": picture.relative_to(self.path).as_posix(),
            "tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        }

    def write_trace(
        self, key: Id, trace: list[tuple[float, int]], details: dict[str, list[list[int]]] | None = None
    ) -> None:
        """Write one image's (seconds since the decoding began, tokens committed) per pass.

        details: more lists with one entry per pass, e.g. `guesses`; they go to a file of their own in traces/details/.
        """
        folder = self.path / "traces"
        for place, content in ((folder / "details", details), (folder, trace)):
            if content:
                place.mkdir(parents=True, exist_ok=True)
                write_atomically(place / f"{name(key)}.json", json.dumps(content).encode())

    def traces(self) -> list[Id]:
        """Return the ids of the images made under `trace=`, sorted."""
        found = [path.stem.split("_") for path in (self.path / "traces").glob("*_*.json")]
        return sorted((int(prompt), int(repeat)) for prompt, repeat in found)

    def trace(self, key: Id) -> tuple[list[tuple[float, int]], dict[str, list[list[int]]]]:
        """Return one image's (seconds, tokens committed) per pass, and the details that were kept of the passes."""
        folder = self.path / "traces"
        passes = read_json(folder / f"{name(key)}.json", [])
        return [(seconds, committed) for seconds, committed in passes], read_json(
            folder / "details" / f"{name(key)}.json", {}
        )

    def append(self, *records: dict[str, Any], rank: int | None = None) -> None:
        """Add records to samples.jsonl, or to the file of a rank, in one write that is on the disk when this returns."""
        append_lines(self.path / ("samples.jsonl" if rank is None else f"samples-{rank}.jsonl"), records)

    def launch(self, entry: dict[str, Any]) -> int:
        """Add a launch to provenance.jsonl and return its number, 0 for the first."""
        known = [
            *self.provenance(),
            *self.records(),
        ]  # a lost line of either must not lend its number to another launch
        number = 1 + max((line["launch"] for line in known if "launch" in line), default=-1)
        append_lines(self.path / "provenance.jsonl", [{"launch": number, **entry}])
        return number

    def close_launch(self, number: int, entry: dict[str, Any]) -> None:
        """Add what a launch knows at its end, e.g. peak memory."""
        append_lines(self.path / "provenance.jsonl", [{"launch": number, **entry}])

    def lock(self, *, wait: bool = False, shared: bool = False) -> contextlib.AbstractContextManager[None]:
        """Keep every other process out of the folder; with `wait` queue behind the one that is in it.

        shared: let those in that call `join`, the other ranks of this launch.
        """
        return lock(self.path / ".lock", wait=wait, shared=shared)

    def join(self) -> contextlib.AbstractContextManager[None]:
        """Enter a folder whose shared lock another rank of this launch holds; it is locked until all have left."""
        return join(self.path / ".lock")

    def _folders(self) -> None:
        for folder in ("images", "tokens"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)


def name(key: Id | list[int]) -> str:
    """Return the file name of one image without its ending: (prompt index, repeat) -> '00012_0'."""
    return f"{key[0]:05d}_{key[1]}"


def run_folders(runs_dir: str | Path) -> list[Path]:
    """Return the run folders below `runs_dir` that hold at least one image, sorted by name."""
    folders = (path.parent for path in Path(runs_dir).glob("*/config.yaml"))
    return sorted(folder for folder in folders if any(folder.glob("samples*.jsonl")))


# ---- identity


def identity(**parts: Any) -> dict[str, Any]:
    """Return `parts`, what decides a run's tokens, and `id`, ten hex digits of their hash.

    Metrics, logger, device and limit are no parts: they continue the same run. Equal numbers are one (3 and 3.0).
    """
    parts = _canonical(parts)
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:10], **parts}


def by_content(value: Any, *, covered: bool = False, key: str = "") -> Any:
    """Replace settings that name local files by the digest of their content: what counts is never where a file lies.

    covered: another digest holds the content of these files (or hub ids) already; then they only become "local".
    """
    if isinstance(value, dict):
        return {k: by_content(v, covered=covered, key=str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [by_content(v, covered=covered, key=key) for v in value]
    if key.endswith(PATH_KEYS) and covered:
        return "local"  # null too: some models know their own hub id, and the digest tells whether there is an adapter
    if isinstance(value, str) and key.endswith(PATH_KEYS) and find(value).exists():
        return digest(find(value))
    return value


def _canonical(value: Any) -> Any:
    """Make equal settings equal text: 3 and 3.0 are one number."""
    if isinstance(value, dict):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name the first setting in which two identities differ."""
    flat_old, flat_new = dict(_flatten(old)), dict(_flatten(new))
    for key in sorted(flat_old.keys() | flat_new.keys(), key=lambda key: (key in ("id", "digest"), key)):
        if flat_old.get(key) != flat_new.get(key):
            return f"{key}: {flat_old.get(key)} there, {flat_new.get(key)} asked for"
    return "its config.yaml names no identity"


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


# ---- files


def read_json(path: Path, default: Any) -> Any:
    """Return the content of a JSON file, `default` where there is none; raises UserError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run stage=score again.") from error


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a .jsonl file and the number of lines that are not one (a kill cuts the last line)."""
    if not path.is_file():
        return [], 0
    found, damaged = [], 0
    *lines, rest = path.read_bytes().split(b"\n")  # what follows the last newline was cut, even if it reads well
    for line in filter(None, lines):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # no JSON, no UTF-8, or no object
            damaged += 1
    return found, damaged + bool(rest)


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append objects to a .jsonl file in one write and wait for the disk; a cut last line is cleared first."""
    data = "".join(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n" for record in records).encode()
    if not data:
        return
    with path.open("ab") as file:
        _mend(path, file.tell())
        file.write(data)
        _sync(file)


def _mend(path: Path, size: int) -> None:
    """Cut off what follows the last newline of a file of `size` bytes, so that the next line starts on its own."""
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


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file at once: a reader, or a kill, meets the old content or the new, never half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            _sync(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


# ---- lock


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = False, shared: bool = False, what: str = "run folder") -> Iterator[None]:
    """Hold the lock file `path`; raises UserError naming the process that has it, or queues behind it with `wait`.

    shared: others may `join` it, and it is held until the last of them has left. what: the folder's name in messages.
    The operating system drops an flock with its process, so a killed run leaves no stale lock. Where the file system
    knows no flock, the process id in the file decides: a lock of this machine whose process is gone is taken over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        told = False
        while not _take(file):
            holder = _holder(path)
            if not wait:
                raise UserError(
                    f"{what} {path.parent} is in use by {holder}; wait for it or stop it "
                    f"(if that process is gone, delete {path})."
                )
            if not told:
                print(f"waiting for {path.parent.name}, which {holder} is making", flush=True)
                told = True
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
    """Hold a lock that another process has taken as `shared`; raises UserError if a third one has taken it since."""
    with path.open("a+") as file:
        if _flock(file, exclusive=False) is False:
            raise UserError(f"run folder {path.parent} is in use by {_holder(path)}, which is no rank of this launch.")
        yield


def _flock(file: Any, *, exclusive: bool) -> bool | None:
    """Say whether the flock was free; None where the file system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:  # this file system has no flock
        return None


def _take(file: Any) -> bool:
    if (free := _flock(file, exclusive=True)) is not None:
        return free
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return True
    return owner["host"] == socket.gethostname() and not alive(owner["pid"])


def alive(pid: int) -> bool:
    """Say whether a process of this machine runs."""
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
    try:
        owner = json.loads(path.read_text())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
