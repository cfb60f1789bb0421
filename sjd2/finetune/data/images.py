"""Captioned images on disk, a folder or WebDataset shards (.tar), as parts that are read in order.

A shard is read with Python's own tarfile: each image is needed once, in the order of the file, so the shuffling and
pipelines of the webdataset library would have nothing to do.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sjd2.errors import UserError
from sjd2.files import split_lines

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
CAPTIONS = (".txt", ".caption", ".json")
KEYS = ("caption", "text")  # of a caption in JSON
NAMES = ("file_name", "image")  # of an image in a list of captions
LIST = "metadata.jsonl"  # as in Hugging Face's image folders
PART = 1024  # images of a folder that are tokenised together
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for damaged files
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredImage:
    """One image as it is on disk; data is None where it cannot be read, caption None where there is none."""

    name: str
    data: bytes | None
    caption: str | None


@dataclass(frozen=True)
class FolderPart:
    """A stretch of a folder's images: (name, bytes, caption) of each."""

    root: Path
    images: tuple[tuple[str, int, str | None], ...]

    def facts(self) -> Any:
        """Return what identifies this part, as JSON."""
        return [list(image) for image in self.images]

    def samples(self) -> Iterator[StoredImage]:
        """Read the images one by one."""
        for name, _, caption in self.images:
            yield StoredImage(name, _read(self.root / name), caption)


@dataclass(frozen=True)
class TarPart:
    """One shard: members of the same name up to the first dot are one sample."""

    path: Path

    def facts(self) -> Any:
        """Return what identifies this part, as JSON."""
        return [self.path.name, self.path.stat().st_size]

    def samples(self) -> Iterator[StoredImage]:
        """Read the images one by one. Raises `UserError` if the shard cannot be read."""
        key, found = None, {}
        try:
            with tarfile.open(self.path) as shard:
                for member in shard:
                    stem, _, ending = Path(member.name).name.partition(".")
                    here = str(Path(member.name).with_name(stem))
                    if not member.isfile() or stem == "":
                        continue
                    if here != key:
                        yield from _sample(key, found)
                        key, found = here, {}
                    if (opened := shard.extractfile(member)) is not None:
                        found["." + ending.lower()] = opened.read()
        except (OSError, tarfile.TarError, EOFError) as error:
            raise UserError(f"the shard {self.path} cannot be read: {error}; fetch it again or remove it.") from error
        yield from _sample(key, found)


Part = FolderPart | TarPart


def find_parts(images: str, captions: str | None = None) -> list[Part]:
    """List the images of a folder, or the shards of a folder, file or pattern; `captions` as in `read_captions`.

    What is left out is logged. Raises `UserError` if there are none.
    """
    shards = find_shards(images)
    if shards:
        _report_left_out(images, set(Path(images).expanduser().rglob("*")) - set(shards))
        return [TarPart(path) for path in shards]
    root = Path(images)
    if not root.is_dir():
        raise UserError(
            f"finetune.data.images={images} does not exist; give a folder of images with captions, or .tar shards."
        )
    there = sorted(root.rglob("*"))
    files = [path for path in there if path.suffix.lower() in (*IMAGES, *CAPTIONS) and path.is_file()]
    found = [path for path in files if path.suffix.lower() in IMAGES]
    if not found:
        raise UserError(f"finetune.data.images={images} holds no {', '.join(IMAGES)} and no .tar shards.")
    listed = read_captions(root, captions)
    _report_left_out(images, {path for path in there if path.name != LIST} - set(files))
    if alone := sorted((listed or {}).keys() - {path.relative_to(root).as_posix() for path in found}):
        logger.info("%s: %d captions name no image there, e.g. %s", images, len(alone), alone[0])
    beside = {path.with_suffix(""): path for path in files if path.suffix.lower() in CAPTIONS} if listed is None else {}
    rows = []
    for path in found:
        name = path.relative_to(root).as_posix()
        caption = listed.get(name) if listed is not None else _beside(beside.get(path.with_suffix("")))
        rows.append((name, path.stat().st_size, caption))
    return [FolderPart(root, tuple(rows[begin : begin + PART])) for begin in range(0, len(rows), PART)]


def _report_left_out(images: str, paths: Iterable[Path]) -> None:
    """Log how many files of which kinds are not read."""
    others = Counter(path.suffix or path.name for path in paths if not path.is_dir())
    if others:
        words = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
        logger.info("%s: left out: %s", images, words)


def find_shards(images: str) -> list[Path]:
    """Return the .tar files that `images` means: a file, a folder's, or those of a pattern with * ? []."""
    path = Path(images)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return sorted(Path(found) for found in glob.glob(str(path)) if found.endswith(".tar"))


def read_captions(root: Path, captions: str | None) -> dict[str, str] | None:
    """Read a list of captions: name of the image below `root` -> caption; None if there is no list.

    captions: .jsonl of {"file_name", "text"} (None: metadata.jsonl in the folder, if it is there), or .json: such a list, or
    one object of name: caption. The keys "image" and "caption" work too. Raises `UserError` for anything else.
    """
    path = Path(captions) if captions is not None else root / LIST
    if not path.is_file():
        if captions is not None:
            raise UserError(f"finetune.data.captions={captions} does not exist; give a .jsonl or .json file.")
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in split_lines(text) if line.strip()]
        else:
            rows = json.loads(text)
        if isinstance(rows, dict):
            return {name: _text(rows, (name,)) for name in rows}
        return {_first(row, NAMES): _text(row, KEYS) for row in rows}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f'the captions in {path} cannot be read ({error}); each line is {{"file_name": "a.jpg", "text": "..."}}.'
        ) from error


def pixels(data: bytes, height: int, width: int, smallest: int = 0) -> np.ndarray | None:
    """Decode an image, scale it (Lanczos) to cover height x width and crop its centre: uint8 [H, W, 3].

    None if its shorter side has fewer than `smallest` pixels. Transparent pixels become white. Raises one of BROKEN for
    damaged files.
    """
    with Image.open(io.BytesIO(data)) as file:
        image = ImageOps.exif_transpose(file)
        if min(image.size) < smallest:
            return None
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS))


def number(data: bytes) -> int:
    """Return a number made from the content alone; it decides what is held out."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _sample(key: str | None, found: dict[str, bytes]) -> Iterator[StoredImage]:
    """Yield the sample of a shard's members (suffix -> content), if one of them is an image."""
    data = next((found[ending] for ending in found if ending in IMAGES), None)
    if data is not None:
        text = next((_caption(found[ending], ending) for ending in CAPTIONS if ending in found), None)
        yield StoredImage(str(key), data, text)


def _beside(path: Path | None) -> str | None:
    return None if path is None else _caption(path.read_bytes(), path.suffix.lower())


def _caption(data: bytes, ending: str) -> str | None:
    """Return the caption in a text or JSON file, None if there is none."""
    try:
        text = data.decode("utf-8-sig")
        if ending == ".json":
            text = _text(json.loads(text), KEYS)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return " ".join(text.split()) or None


def _text(row: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Return the caption under the first of these keys. Raises KeyError, ValueError for what is no text."""
    text = _first(row, keys)
    text.encode()  # JSON may escape half a surrogate pair, which no tokeniser takes
    return text


def _first(row: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Return the first of these keys' values. Raises KeyError."""
    for key in keys:
        if row.get(key) is not None:
            return str(row[key])
    raise KeyError(" or ".join(keys))
