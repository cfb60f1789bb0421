"""Prompt lists: the embedded model's held-out captions, or a txt, csv, tsv, json or jsonl file.

An image's id is (prompt index, repeat). Repeats come one after the other, so that `limit=` always asks for as many
different prompts as there are. The published prompt sets, which know more of a prompt than its text, are in
prompt_sets.py; what they know is kept in the run folder as prompts.jsonl, where metrics find it (`metadata_of`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import eq
from pathlib import Path
from typing import Any, overload

from evaluation.run_folder import RunFolder
from sjd2.config import instantiate
from sjd2.errors import UserError
from sjd2.files import ROOT, read_lines, read_text, split_lines, write_atomically

COLUMNS = ("prompt", "caption", "text", "Prompt")  # names of the prompt's column, tried in this order
GROUPS = ("category",)  # columns by which tables group prompts
FORMATS = (".txt", ".csv", ".tsv", ".json", ".jsonl")
KEPT = "prompts.jsonl"
MOST_IMAGES = 10_000_000  # of one run; a mistyped number is refused before it takes all memory
KIND = "prompts file"  # what messages call the file

Facts = dict[str, Any]  # what a prompt set holds of one prompt besides its text


@dataclass(frozen=True, eq=False)
class ImageIds(Sequence[tuple[int, int]]):
    """The first `count` ids (prompt index, repeat) of a list of prompts, a repeat of all prompts after the other."""

    prompts: int
    count: int

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, place: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, place: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, place: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        found = range(self.count)[place]
        if isinstance(found, range):
            return [(n % self.prompts, n // self.prompts) for n in found]
        return found % self.prompts, found // self.prompts

    __hash__ = None  # type: ignore[assignment]  # it is equal to lists

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    def place(self, key: tuple[int, int]) -> int:
        """Return where an id stands."""
        return key[1] * self.prompts + key[0]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A list of prompts, each sampled `repeats` times; the first `skip` are left out.

    name: the prompt set; metrics that verify attributes ask for it.
    path: a file (txt: one per line; csv, tsv: a column called prompt, caption or text; json: a list of texts or
    objects, or {"annotations": [...]} as COCO has; jsonl: one per line). column: the prompt's column if called otherwise.
    """

    name: str
    path: str | None = None
    column: str | None = None
    repeats: int = 1
    skip: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise UserError(f"prompts.repeats must be 1 or more, got {self.repeats}.")
        if self.skip < 0:
            raise UserError(f"prompts.skip must be 0 or more, got {self.skip}.")

    def read(self) -> list[tuple[str, Facts]]:
        """Read the prompts and what is known of each; raises UserError if the file is missing, unreadable or empty."""
        if self.name == "shapes":
            texts = read_prompts(ROOT / "sjd2" / "models" / "tiny" / "captions.txt")
        elif self.path is None:
            raise UserError(f"prompts={self.name} needs a file: prompts.path=FILE ({', '.join(FORMATS)}).")
        else:
            entries = read_entries(Path(self.path), (self.column,) if self.column else COLUMNS)
            return [(text.strip(), {key: row[key] for key in GROUPS if row.get(key)}) for text, row in entries]
        return [(text, {}) for text in texts]

    @cached_property
    def _entries(self) -> list[tuple[str, Facts]]:
        entries = self.read()
        if self.skip >= len(entries):
            raise UserError(
                f"prompts.skip={self.skip} leaves none of the {len(entries)} prompts of prompts={self.name}."
            )
        return entries[self.skip :]

    @cached_property
    def texts(self) -> list[str]:
        """Return the prompts; raises UserError if the file is missing, unreadable or empty."""
        return [text for text, _ in self._entries]

    @cached_property
    def metadata(self) -> list[Facts]:
        """Return what the set holds of each prompt besides its text, {} for nothing."""
        return [facts for _, facts in self._entries]

    @cached_property
    def digest(self) -> str:
        """Return 16 hex digits of the sha256 over the prompts in their order."""
        return hashlib.sha256(json.dumps(self.texts, ensure_ascii=False).encode()).hexdigest()[:16]

    def ids(self, limit: int | None = None) -> ImageIds:
        """Return the first `limit` image ids (prompt index, repeat), all of them for None; none is made before it is used.

        Raises UserError for a limit of more images than a run folder can hold; None is for those who use a part of them.
        """
        total = len(self.texts) * self.repeats
        count = total if limit is None else min(limit, total)
        if limit is not None and count > MOST_IMAGES:
            raise UserError(f"limit={limit} asks for {count:,} images; a run has at most {MOST_IMAGES:,}.")
        return ImageIds(len(self.texts), count)

    def wanted(self, limit: int | None) -> ImageIds:
        """Return the ids of the images that a run makes; raises UserError if they are more than a run folder can hold."""
        total = len(self.texts) * self.repeats
        if limit is None and total > MOST_IMAGES:
            raise UserError(
                f"{len(self.texts):,} prompts with prompts.repeats={self.repeats} are {total:,} images; give limit=."
            )
        return self.ids(limit)

    def keep(self, run: RunFolder) -> None:
        """Write what the set holds of its prompts into the run folder, for scoring later and elsewhere."""
        if any(self.metadata):
            lines = [{"prompt": text, "metadata": facts} for text, facts in self._entries]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_atomically(run.path / KEPT, text.encode())


def metadata_of(run: RunFolder) -> dict[int, Facts]:
    """Return what is known of each prompt of a run, by prompt index: from prompts.jsonl, else from the prompts' file.

    Empty where nothing is known: a plain list of prompts, or a file that is gone or is another one now.
    """
    if (run.path / KEPT).is_file():
        lines, _ = read_lines(run.path / KEPT)
        return {index: line["metadata"] for index, line in enumerate(lines)}
    settings, identity = run.config.get("prompts"), run.config.get("identity")
    if settings is None or identity is None or "_target_" not in settings:
        return {}
    try:
        prompts = instantiate(settings)
        same = prompts.digest == identity.prompts.digest
    except UserError:
        return {}
    return {index: facts for index, facts in enumerate(prompts.metadata) if facts} if same else {}


# ---- files


def read_prompts(path: Path, column: str | None = None) -> list[str]:
    """Read a prompt file; empty lines are left out. Raises UserError naming the line or entry that is no prompt."""
    return [text.strip() for text, _ in read_entries(path, (column,) if column else COLUMNS)]


def read_entries(path: Path, columns: tuple[str, ...]) -> list[tuple[str, Facts]]:
    """Read a prompt file: the text of each entry as it stands and, where entries have columns, all of them.

    columns: names of the text's column, tried in this order. Raises UserError naming the line that is no prompt.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"cannot tell the format of prompts file '{path}'. Valid endings: {', '.join(FORMATS)}.")
    readers = {".txt": _txt, ".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _jsonl}
    entries = readers[path.suffix.lower()](read_text(path, KIND), path)
    if not entries:
        raise UserError(f"prompts file '{path}' holds no prompt.")
    return [
        (_prompt(entry, path, place, columns), entry if isinstance(entry, dict) else {}) for place, entry in entries
    ]


def parse(text: str, path: Path, place: str = "") -> Any:
    """Parse JSON; raises UserError naming the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"prompts file '{path}' is no {path.suffix[1:]}{place}: {error}.") from error


def _txt(text: str, path: Path) -> list[tuple[str, Any]]:
    return [(f"line {number}", line) for number, line in enumerate(split_lines(text), 1) if line.strip()]


def _csv(text: str, path: Path) -> list[tuple[str, Any]]:
    kind, entries, ended = path.suffix.lower()[1:], [], False

    def lines() -> Iterator[str]:
        nonlocal ended
        yield from io.StringIO(text, newline="")
        ended = True  # asked for one more line; in the middle of an entry only where a quote is open

    rows = csv.DictReader(lines(), delimiter="\t" if kind == "tsv" else ",")
    last = 0
    try:
        for row in itertools.chain([rows.fieldnames or ()], rows):
            if row and ended:
                raise UserError(
                    f"prompts file '{path}' is no {kind}: a quote of the entry at line {last + 1} is never closed."
                )
            last = rows.line_num
            if isinstance(row, dict) and any(row.values()):
                entries.append((f"line {last}", row))
    except csv.Error as error:
        raise UserError(f"prompts file '{path}' is no {kind} at line {rows.line_num}: {error}.") from error
    return entries


def _json(text: str, path: Path) -> list[tuple[str, Any]]:
    entries = parse(text, path)
    if isinstance(entries, dict):
        lists = [value for value in entries.values() if isinstance(value, list)]
        entries = entries.get("annotations", entries.get("prompts", lists[0] if len(lists) == 1 else None))
    if not isinstance(entries, list):
        raise UserError(f"prompts file '{path}' must hold a list of prompts or an object with one under 'annotations'.")
    return [(f"entry {i}", entry) for i, entry in enumerate(entries)]


def _jsonl(text: str, path: Path) -> list[tuple[str, Any]]:
    lines = [(number, line) for number, line in enumerate(split_lines(text), 1) if line.strip()]
    return [(f"line {n}", parse(line, path, f" in line {n}")) for n, line in lines]


def _prompt(entry: Any, path: Path, place: str, columns: tuple[str, ...]) -> str:
    if isinstance(entry, dict):
        found = next((name for name in columns if entry.get(name)), None)
        if found is None and any(name in entry for name in columns):
            raise _empty(path, place)
        if found is None:
            raise UserError(
                f"prompts file '{path}', {place}: no '{columns[0]}' among its columns "
                f"({', '.join(str(name) for name in entry)}); name the right one with prompts.column=NAME."
            )
        entry = entry[found]
    if isinstance(entry, str) and not entry.strip():
        raise _empty(path, place)
    if not isinstance(entry, str):
        raise UserError(f"prompts file '{path}', {place}: {entry!r} is no prompt.")
    try:
        entry.encode()
    except UnicodeEncodeError as error:  # JSON may escape one
        half = f"\\u{ord(entry[error.start]):04x}"
        raise UserError(f"prompts file '{path}', {place}: {half} is half a surrogate pair, no character.") from error
    return entry


def _empty(path: Path, place: str) -> UserError:
    return UserError(
        f"prompts file '{path}': {place} has an empty prompt; fill it in, or delete the {place.split(maxsplit=1)[0]}."
    )
