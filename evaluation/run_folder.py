"""The run folder: what a run is (its identity), one line per image, and nothing lost or doubled when a run is killed.

    config.yaml       the resolved settings, and `identity`: what decides the tokens
    provenance.jsonl  per launch: git commit, package versions, hardware, dtype, weights, command; peak memory
    samples*.jsonl    one line per image (one file per rank)
    images/ tokens/   00012_0.png and .npy: prompt 12, repeat 0; traces/ with trace=N; no images/ with model.pixels=none
    timings*.jsonl    after retime=true: one line per image and retiming (evaluation/timings.py)
    metrics.json, grid.png, acceptance.png, wandb/

An image and its tokens are on the disk before the line that names them, so a line never lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from evaluation.identity import canonical, current_targets, difference, same
from sjd2.errors import UserError
from sjd2.files import append_lines, read_json, read_lines, sync, write_atomically
from sjd2.locks import join, lock

Id = tuple[int, int]  # (prompt index, repeat)
Record = dict[str, Any]  # one line of samples.jsonl
TIMED = {"id", "launch", "batch", "batch_rows", "seconds"}
NEEDED = {"id", "prompt", "launch", "batch", "tokens", "forwards", "accepted", "seconds", "tokens_sha256"}


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
        """Return the resolved settings of the run's last launch, `identity` among them; classes that have moved are found."""
        config = OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"))
        return DictConfig(current_targets(config))

    @property
    def settings(self) -> dict[str, Any]:
        """Return `config` as plain dictionaries and lists."""
        return cast(dict[str, Any], OmegaConf.to_container(self.config))

    @property
    def identity(self) -> dict[str, Any]:
        """Return what decides the run's tokens (evaluation/identity.py), {} where nothing says it."""
        if not (self.path / "config.yaml").is_file():
            return {}
        return canonical(self.settings.get("identity") or {})

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
        self.__dict__.pop("config", None)  # another process may have claimed it since
        if (self.path / "config.yaml").is_file() and not same(self.identity, identity):
            raise UserError(
                f"run folder {self.path} holds another run ({difference(self.identity, identity)}); "
                "leave run_dir out, or give another runs_dir."
            )
        write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(settings).encode())
        self.__dict__.pop("config", None)

    # ---- samples

    def records(self) -> list[Record]:
        """Return one record per image, sorted by id; a line that a kill cut short, or without a record's keys, is left out."""
        found: dict[Id, Record] = {}
        self.damaged = 0
        for path in sorted(self.path.glob("samples*.jsonl")):
            lines, damaged = read_lines(path)
            self.damaged += damaged
            for record in lines:
                if record.keys() >= NEEDED:
                    found.setdefault(record_id(record), record)
                else:
                    self.damaged += 1
        return [found[key] for key in sorted(found)]

    def missing(self, ids: Iterable[Id], records: Iterable[Record] | None = None) -> list[Id]:
        """Return those of `ids` that have no record yet, in their order; records: those of records(), if at hand."""
        done = set(map(record_id, self.records() if records is None else records))
        return [key for key in ids if tuple(key) not in done]

    def images(self, ids: Iterable[Id] | None = None) -> Iterator[np.ndarray]:
        """Yield the images of `ids`, uint8 [H, W, 3] RGB; None: of all records(), which reads samples.jsonl."""
        for key in map(record_id, self.records()) if ids is None else ids:
            with self._opened(key) as image:
                yield np.asarray(image.convert("RGB"))

    def image_size(self, key: Id) -> tuple[int, int]:
        """Return (height, width) of one image from its header; decodes nothing."""
        with self._opened(key) as image:
            return image.height, image.width

    @contextlib.contextmanager
    def _opened(self, key: Id) -> Iterator[Image.Image]:
        path = self.path / "images" / f"{name(key)}.png"
        try:
            with Image.open(path) as image:
                yield image
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror or error}).") from error

    def tokens(self, record: Record) -> np.ndarray:
        """Return the local token ids of one record, int32 [N]."""
        return np.load(self.path / "tokens" / f"{name(record['id'])}.npy")

    def traced(self, record: Record) -> bool:
        """Return whether this image was made under `trace=`: its times hold extra waits and count in no speed number."""
        return (self.path / "traces" / f"{name(record['id'])}.json").is_file()

    def write_image(self, key: Id, image: np.ndarray | None, tokens: np.ndarray) -> dict[str, str]:
        """Put image [H, W, 3] uint8, if there is one, and tokens [N] on the disk; returns the record's entries on them."""
        tokens, entries = as_stored(tokens), {}
        if image is not None:
            pixels = self.path / "images" / f"{name(key)}.png"
            with _opened_below(pixels) as file:
                Image.fromarray(image).save(file, format="PNG")
            entries = {"image": pixels.relative_to(self.path).as_posix()}
        with _opened_below(self.path / "tokens" / f"{name(key)}.npy") as file:
            np.save(file, tokens)
        return entries | {"tokens_sha256": digest_of(tokens)}

    def write_trace(
        self, key: Id, trace: list[tuple[float, int]], details: dict[str, list[list[int]]] | None = None
    ) -> None:
        """Write one image's (seconds since the decoding began, tokens committed) per pass.

        details: more lists with one entry per pass, e.g. `guesses` (draft tokens); they go to a file in traces/details/.
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

    def append(self, *records: Record, rank: int | None = None) -> None:
        """Add records to samples.jsonl, or to the file of a rank, in one write that is on the disk when this returns."""
        append_lines(self.path / ("samples.jsonl" if rank is None else f"samples-{rank}.jsonl"), records)

    def timings(self) -> list[Record]:
        """Return the lines of all retimings; those that a kill cut short are left out."""
        files = sorted(self.path.glob("timings*.jsonl"))
        return [line for path in files for line in read_lines(path)[0] if line.keys() >= TIMED]

    def append_timings(self, *timings: Record, rank: int | None = None) -> None:
        """Add what a retiming measured, as `append` adds records."""
        append_lines(self.path / ("timings.jsonl" if rank is None else f"timings-{rank}.jsonl"), timings)

    def launch(self, entry: dict[str, Any], records: Iterable[Record] | None = None) -> int:
        """Add a launch to provenance.jsonl and return its number, 0 for the first; records: those of records(), if at hand."""
        # a lost line of either must not lend its number to another launch
        known = [*self.provenance(), *(self.records() if records is None else records)]
        number = 1 + max((line["launch"] for line in known if "launch" in line), default=-1)
        append_lines(self.path / "provenance.jsonl", [{"launch": number, **entry}])
        return number

    def close_launch(self, number: int, entry: dict[str, Any]) -> None:
        """Add what a launch knows at its end, e.g. peak memory."""
        append_lines(self.path / "provenance.jsonl", [{"launch": number, **entry}])

    def lock(self, *, wait: bool = False, shared: bool = False) -> contextlib.AbstractContextManager[None]:
        """Keep every other process out of the folder; with `wait` queue for the one that is in it to leave.

        shared: let those in that call `join`, the other ranks of this launch.
        """
        return lock(self.path / ".lock", wait=wait, shared=shared)

    def join(self) -> contextlib.AbstractContextManager[None]:
        """Enter a folder whose shared lock another rank of this launch holds; it is locked until all have left."""
        return join(self.path / ".lock")


class Snapshot:
    """A run folder as it is now, for what reads it several times: samples.jsonl is parsed once, on first use."""

    def __init__(self, folder: RunFolder, ids: Collection[Id] | None = None) -> None:
        """Take the folder; of its images only those of `ids`, where they are given."""
        self.folder, self._ids = folder, None if ids is None else set(ids)

    @property
    def path(self) -> Path:
        """Return the folder's path."""
        return self.folder.path

    @cached_property
    def records(self) -> list[Record]:
        """Return one record per image, sorted by id."""
        return [record for record in self.folder.records() if self._ids is None or record_id(record) in self._ids]

    @cached_property
    def ids(self) -> list[Id]:
        """Return (prompt index, repeat) of every record, in their order."""
        return [record_id(record) for record in self.records]

    @cached_property
    def launches(self) -> list[dict[str, Any]]:
        """Return one entry per launch, as RunFolder.provenance does."""
        return self.folder.provenance()

    @cached_property
    def timings(self) -> list[Record]:
        """Return the lines of all retimings, as RunFolder.timings does."""
        return [line for line in self.folder.timings() if self._ids is None or record_id(line) in self._ids]

    @cached_property
    def drawn(self) -> bool:
        """Return whether the records have images; False for tokens alone (model.pixels=none)."""
        return not self.records or any("image" in record for record in self.records)

    @cached_property
    def image_size(self) -> tuple[int, int] | None:
        """Return (height, width) of the first image; None for a run without images."""
        return self.folder.image_size(self.ids[0]) if self.ids and self.drawn else None


@contextlib.contextmanager
def _opened_below(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file for writing, its folder made if need be; it is on the disk afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        yield file
        sync(file)


def record_id(record: Record) -> Id:
    """Return a record's id, which JSON holds as a list."""
    return record["id"][0], record["id"][1]


def as_stored(tokens: np.ndarray) -> np.ndarray:
    """Return tokens [N] as they lie on the disk: little-endian int32."""
    return np.ascontiguousarray(tokens, dtype="<i4")


def digest_of(tokens: np.ndarray) -> str:
    """Return a record's `tokens_sha256` of tokens [N]."""
    return hashlib.sha256(as_stored(tokens).tobytes()).hexdigest()


def name(key: Id | list[int]) -> str:
    """Return the file name of one image without its ending: (prompt index, repeat) -> '00012_0'."""
    return f"{key[0]:05d}_{key[1]}"


def run_folders(runs_dir: str | Path) -> list[Path]:
    """Return the run folders below `runs_dir` that hold at least one image, sorted by name."""
    folders = (path.parent for path in Path(runs_dir).glob("*/config.yaml"))
    return sorted(folder for folder in folders if any(folder.glob("samples*.jsonl")))


def run_folder(runs_dir: str | Path, stem: str, identity: dict[str, Any]) -> RunFolder:
    """Return the folder of the run that `identity` describes: `<stem>-<id>`, or one that an older release named otherwise."""
    usual = Path(runs_dir) / f"{stem}-{identity['id']}"
    if not usual.exists():
        for config in sorted(Path(runs_dir).glob(f"{stem}-*/config.yaml")):
            found = RunFolder(config.parent)
            if same(found.identity, identity):
                return found
    return RunFolder(usual)
