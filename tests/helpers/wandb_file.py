"""Read what an offline W&B run wrote: a LevelDB log of protobuf records. The format is internal to wandb 0.31."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = struct.Struct("<IHB")  # crc32, length, kind: 1 whole, 2 first, 3 middle, 4 last


@dataclass
class Offline:
    """One offline run: what `wandb sync` would upload."""

    id: str = ""
    group: str = ""
    kind: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False  # whether its exit record is there

    def curve(self, key: str) -> list[tuple[int, Any]]:
        """Return (step, value) of one logged key."""
        return [(row["_step"], row[key]) for row in self.history if key in row]


def offline_runs(folder: Path) -> list[Path]:
    """Return the offline runs below a folder, oldest first."""
    return sorted(folder.rglob("offline-run-*/run-*.wandb"))


def read(path: Path, *, patience: float = 20.0) -> Offline:
    """Read one .wandb file; waits for its last record, since W&B's own process closes the file after `finish` returns."""
    until = time.monotonic() + patience
    while not (run := _parse(path)).complete and time.monotonic() < until:
        time.sleep(0.05)
    return run


def _parse(path: Path) -> Offline:
    from wandb.proto import wandb_internal_pb2 as protocol

    run = Offline()
    for data in _records(path.read_bytes()):
        record = protocol.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.group, run.kind = record.run.run_id, record.run.run_group, record.run.job_type
            run.config |= _items(record.run.config.update)
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "summary":
            run.summary |= _items(record.summary.update)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "exit":
            run.complete = True
    return run


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + HEADER.size <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER.size:
            at += left
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        if kind == 0:
            return
        parts = parts * (kind in (3, 4)) + data[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in (1, 4):
            yield parts
