"""The published prompt sets, each from files that the user has: COCO, PartiPrompts, GenEval 1 and 2, DPG-Bench, T2I-CompBench.

Prompts are the texts as they stand in the files, blanks at their ends included: the codes that define the protocols
pass them on so, and a blank changes the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.prompts import KIND, Facts, Prompts, parse, read_entries
from sjd2.errors import UserError, choose
from sjd2.files import find, read_text, split_lines

CAPTIONS = ("first", "longest", "sjd")
ORDERS = ("id", "annotations")
GENEVAL_KEYS = ("tag", "include", "prompt")


# ----------------------------------------------------------------------------------------------------------------- COCO
@dataclass(frozen=True, kw_only=True)
class Coco(Prompts):
    """One caption per image of COCO 2014 or 2017; metadata: image_id, caption_id, file_name.

    path: captions_<split>.json, or a folder with it or with annotations/ around it. split: val2017, val2014, ...
    caption: which of an image's captions. 'first': the first in the file. 'longest': the longest in characters, the
    first of equal ones (LANTERN's preprocess.py). 'sjd': what SJD's evaluation does, see `choose_captions`.
    order: of the images. 'id': ascending image ids (SJD). 'annotations': as the captions first name them (LANTERN).
    """

    split: str = "val2017"
    caption: str = "longest"
    order: str = "id"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("prompts.caption", self.caption, CAPTIONS)
        choose("prompts.order", self.order, ORDERS)

    @property
    def file(self) -> Path:
        """The annotation file; raises UserError where there is none."""
        name = f"captions_{self.split}.json"
        if self.path is None:
            raise UserError(
                f"prompts={self.name} needs COCO's captions: prompts.path=FOLDER, where {name} or annotations/{name} "
                f"lies (unpack annotations_trainval{self.split[-4:]}.zip of cocodataset.org)."
            )
        path = find(self.path)
        if path.is_file() and path.suffix != ".json":
            raise UserError(
                f"'{path}' is no annotation file of COCO ({name}); for a list of prompts of your own take prompts=file."
            )
        if not path.is_dir():
            return path
        there = [file for file in (path / name, path / "annotations" / name) if file.is_file()]
        if not there:
            raise UserError(
                f"folder {path} has neither {name} nor annotations/{name}; give prompts.path=FOLDER or FILE."
            )
        return there[0]

    def read(self) -> list[tuple[str, Facts]]:
        """Read the chosen captions; raises UserError if the file is missing, or is another one of COCO's."""
        names, captions = read_coco(self.file)
        images = sorted(names)
        chosen = choose_captions([[c["caption"] for c in captions.get(image, [])] for image in images], self.caption)
        entries = {}
        for image, index in zip(images, chosen, strict=True):
            if index is None:
                continue
            mine = captions[image]
            if index >= len(mine):
                raise UserError(
                    f"image {image} of '{self.file}' has {len(mine)} captions, but prompts.caption=sjd has come to ask "
                    f"for number {index + 1}; take prompts.caption=longest."
                )
            facts = {"image_id": image, "caption_id": mine[index].get("id"), "file_name": names[image]}
            entries[image] = (mine[index]["caption"], facts)
        order = captions if self.order == "annotations" else images
        return [entries[image] for image in order if image in entries]


def choose_captions(captions: Sequence[Sequence[str]], how: str) -> list[int | None]:
    """Choose one caption of each image: captions of each image, images by ascending id -> their index; None: no caption.

    'sjd' is what dataset_tools/dataset_templates.py of tyshiwo1/Accelerating-T2I-AR-with-SJD computes (class
    MSCOCOPromptBench): the longest length met so far is kept from image to image, so an image whose captions set no new
    record gets the *index* of the last record's caption. A caption must be strictly longer to set one. From the longest
    caption of all on, every image uses the same index (in val2017 every image from the 2,572nd on gets its fourth caption).
    The index may lie beyond an image's captions; that code would stop there.
    """
    if how == "first":
        return [0 if own else None for own in captions]
    if how == "longest":
        return [max(range(len(own)), key=lambda i, own=own: len(own[i])) if own else None for own in captions]
    chosen: list[int | None] = []
    record, index = 0, 0
    for own in captions:
        for i, text in enumerate(own):
            if len(text) > record:
                record, index = len(text), i
        chosen.append(index)
    return chosen


def read_coco(path: Path) -> tuple[dict[int, str], dict[int, list[dict[str, Any]]]]:
    """Read a caption file of COCO -> {image id: file name}, {image id: its annotations in the file's order}.

    Raises UserError if it is another kind of file, e.g. the instances_*.json beside it.
    """
    content = parse(read_text(path, KIND), path)
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise UserError(
            f"'{path}' is no annotation file of COCO (no 'images' and 'annotations'); for a plain list of captions take "
            "prompts=file."
        )
    captions: dict[int, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
            kind = ", ".join(sorted(annotation)) if isinstance(annotation, dict) else type(annotation).__name__
            raise UserError(
                f"'{path}' holds annotations without a caption ({kind}); give captions_*.json, which lies beside it."
            )
        captions.setdefault(annotation["image_id"], []).append(annotation)
    if not captions:
        raise UserError(f"'{path}' holds no caption; the test splits of COCO have none, take val2017 or val2014.")
    return {image["id"]: image["file_name"] for image in content["images"]}, captions


# ----------------------------------------------------------------------------------------------------------- other sets
@dataclass(frozen=True, kw_only=True)
class PartiPrompts(Prompts):
    """PartiPrompts (1,632 prompts); metadata: Category, Challenge.

    path: PartiPrompts.tsv, or a csv with the same columns.
    """

    def read(self) -> list[tuple[str, Facts]]:
        """Read the prompts; raises UserError if the file is missing or has other columns."""
        path = _given(self, "PartiPrompts.tsv of google-research/parti")
        entries = read_entries(path, (self.column or "Prompt",))
        if not any(row.get("Category") for _, row in entries):
            raise UserError(f"'{path}' is not PartiPrompts: it has no column Category; other lists are prompts=file.")
        return [(text, {key: row[key] for key in ("Category", "Challenge") if row.get(key)}) for text, row in entries]


@dataclass(frozen=True, kw_only=True)
class GenEvalPrompts(Prompts):
    """GenEval (553 prompts); metadata: the whole line, which names what must be in the image.

    path: evaluation_metadata.jsonl.
    """

    def read(self) -> list[tuple[str, Facts]]:
        """Read the prompts; raises UserError if the file is missing or its lines are not GenEval's."""
        path = _given(self, "evaluation_metadata.jsonl of djghosh13/geneval (prompts/)")
        entries = read_entries(path, ("prompt",))
        for number, (_, line) in enumerate(entries, 1):
            if lacking := [key for key in GENEVAL_KEYS if key not in line]:
                raise UserError(
                    f"'{path}' is not GenEval's metadata: entry {number} has no '{lacking[0]}'; give its "
                    "evaluation_metadata.jsonl, not the list of prompts."
                )
        return entries


@dataclass(frozen=True, kw_only=True)
class GenEval2Prompts(Prompts):
    """GenEval 2 (800 prompts); metadata: the whole line: atom_count, vqa_list, skills.

    path: geneval2_data.jsonl.
    """

    def read(self) -> list[tuple[str, Facts]]:
        """Read the prompts; raises UserError if the file is missing or its lines are not GenEval 2's."""
        path = _given(self, "geneval2_data.jsonl of facebookresearch/GenEval2")
        entries = read_entries(path, ("prompt",))
        if lacking := next((n for n, (_, line) in enumerate(entries, 1) if "vqa_list" not in line), None):
            raise UserError(
                f"'{path}' is not GenEval 2's data: entry {lacking} has no 'vqa_list'; see prompts=geneval."
            )
        return entries


@dataclass(frozen=True, kw_only=True)
class CompBench(Prompts):
    """T2I-CompBench's validation prompts (300 in each category); metadata: category.

    path: the folder examples/dataset of Karine-Huang/T2I-CompBench; every <category>_val.txt in it is read. category: only
    this one.
    """

    category: str | None = None

    def read(self) -> list[tuple[str, Facts]]:
        """Read the prompts, category by category; raises UserError if there is no such file."""
        path = _given(self, "the folder examples/dataset of Karine-Huang/T2I-CompBench")
        files = sorted(path.glob("*_val.txt")) if path.is_dir() else []
        names = {file.stem.removesuffix("_val"): file for file in files}
        if not names:
            raise UserError(f"'{path}' has no <category>_val.txt: prompts.path is examples/dataset of T2I-CompBench.")
        if self.category is not None:
            names = {self.category: names[choose("prompts.category", self.category, names)]}
        return [
            (text, {"category": name})
            for name, file in names.items()
            for line in split_lines(read_text(file, KIND))
            if (text := line.split("\t")[0].strip())
        ]


@dataclass(frozen=True, kw_only=True)
class DpgBench(Prompts):
    """DPG-Bench (1,065 long prompts); metadata: item_id, the name that its scoring asks an image to have.

    path: the folder of txt files, one prompt each, or dpg_bench.csv, which has a line per question. Sorted by item_id.
    """

    def read(self) -> list[tuple[str, Facts]]:
        """Read the prompts; raises UserError if there are none."""
        path = _given(self, "the folder dpg_bench/prompts of TencentQQGYLab/ELLA, or its dpg_bench.csv")
        if path.is_dir():
            inner = [folder for folder in (path, path / "prompts") if any(folder.glob("*.txt"))]
            texts = {file.stem: read_text(file, KIND).strip() for file in inner[0].glob("*.txt")} if inner else {}
        else:
            texts = {}
            for text, row in read_entries(path, (self.column or "text",)):
                if "item_id" not in row:
                    raise UserError(f"'{path}' has no column 'item_id', so it is not dpg_bench.csv; see prompts=file.")
                texts.setdefault(row["item_id"], text.strip())
        texts = {item: text for item, text in texts.items() if text}
        if not texts:
            raise UserError(f"'{path}' holds no prompt: prompts.path is the folder of DPG-Bench's txt files.")
        return [(texts[item], {"item_id": item}) for item in sorted(texts)]


def _given(prompts: Prompts, what: str) -> Path:
    """Return the path that the user gave; raises UserError if there is none."""
    if prompts.path is None:
        raise UserError(f"prompts={prompts.name} needs prompts.path=PATH: {what}.")
    return find(prompts.path)
