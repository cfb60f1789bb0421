"""Prompt lists: the embedded model's held-out captions, or a txt, csv, json or jsonl file.

An image's id is (prompt index, repeat). Repeats come one after the other, so that `limit=` always asks for as many
different prompts as there are.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sjd2
from sjd2.errors import UserError

COLUMNS = ("prompt", "caption", "text", "Prompt")  # names of the prompt's column, tried in this order
FORMATS = (".txt", ".csv", ".json", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A list of prompts, each sampled `repeats` times.

    name: the prompt set; metrics that verify attributes ask for it.
    path: a file (txt: one per line; csv: a column called prompt, caption or text; json: a list of texts or objects, or
    {"annotations": [...]} as COCO has; jsonl: one per line). column: the prompt's column if called otherwise.
    """

    name: str
    path: str | None = None
    column: str | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise UserError(f"prompts.repeats must be 1 or more, got {self.repeats}.")

    @cached_property
    def texts(self) -> list[str]:
        """Return the prompts; raises UserError if the file is missing, unreadable or empty."""
        if self.name == "shapes":
            return read_prompts(Path(sjd2.__path__[0]) / "models" / "tiny" / "captions.txt")
        if self.path is None:
            raise UserError(f"prompts={self.name} needs a file: prompts.path=FILE ({', '.join(FORMATS)}).")
        return read_prompts(Path(self.path), self.column)

    @cached_property
    def digest(self) -> str:
        """Return 16 hex digits of the sha256 over the prompts in their order."""
        return hashlib.sha256(json.dumps(self.texts, ensure_ascii=False).encode()).hexdigest()[:16]

    def ids(self, limit: int | None = None) -> list[tuple[int, int]]:
        """Return the first `limit` image ids (prompt index, repeat), all of them for None."""
        ids = [(prompt, repeat) for repeat in range(self.repeats) for prompt in range(len(self.texts))]
        return ids[:limit]


def read_prompts(path: Path, column: str | None = None) -> list[str]:
    """Read a prompt file; empty lines are left out. Raises UserError naming the line or entry that is no prompt."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"cannot tell the format of prompts file '{path}'. Valid endings: {', '.join(FORMATS)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"prompts file '{path}' does not exist (looked in {Path.cwd()}).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"prompts file '{path}' is not UTF-8 at byte {error.start}; save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"prompts file '{path}' cannot be read: {error.strerror}.") from error
    readers = {".txt": _txt, ".csv": _csv, ".json": _json, ".jsonl": _jsonl}
    prompts = readers[path.suffix.lower()](text, path, column)
    if not prompts:
        raise UserError(f"prompts file '{path}' holds no prompt.")
    return prompts


def _txt(text: str, path: Path, column: str | None) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _csv(text: str, path: Path, column: str | None) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        return [_prompt(row, path, f"line {rows.line_num}", column) for row in rows if any(row.values())]
    except csv.Error as error:
        raise UserError(f"prompts file '{path}' is no csv at line {rows.line_num}: {error}.") from error


def _json(text: str, path: Path, column: str | None) -> list[str]:
    entries = _parse(text, path, "")
    if isinstance(entries, dict):
        lists = [value for value in entries.values() if isinstance(value, list)]
        entries = entries.get("annotations", entries.get("prompts", lists[0] if len(lists) == 1 else None))
    if not isinstance(entries, list):
        raise UserError(f"prompts file '{path}' must hold a list of prompts or an object with one under 'annotations'.")
    return [_prompt(entry, path, f"entry {i}", column) for i, entry in enumerate(entries)]


def _jsonl(text: str, path: Path, column: str | None) -> list[str]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_prompt(_parse(line, path, f" in line {n}"), path, f"line {n}", column) for n, line in lines]


def _parse(text: str, path: Path, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"prompts file '{path}' is no {path.suffix[1:]}{place}: {error}.") from error


def _prompt(entry: Any, path: Path, place: str, column: str | None) -> str:
    if isinstance(entry, dict):
        names = (column,) if column else COLUMNS
        found = next((name for name in names if entry.get(name)), None)
        if found is None:
            raise UserError(
                f"prompts file '{path}', {place}: no '{names[0]}' among its columns "
                f"({', '.join(str(name) for name in entry)}); name the right one with prompts.column=NAME."
            )
        entry = entry[found]
    if not isinstance(entry, str) or not entry.strip():
        raise UserError(f"prompts file '{path}', {place}: {entry!r} is no prompt.")
    return entry.strip()
