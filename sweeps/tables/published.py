"""Read the published numbers of `published.csv`, to be shown beside ours, never among them.

Every paper has its own hardware, FID library and prompts, so a published value is context, not a row to subtract from.
The last column says where a number comes from: the `paper`, a third-party `note`, or `uncertain`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

CSV = Path(__file__).with_name("published.csv")
CALLED = {  # column of table.csv -> field of `Published` where the two names differ
    "forwards_mean": "steps",
    "latency_s_median": "latency_s",
    "speedup": "latency_speedup",
    "peak_memory_gb": "memory_gb",
}
# names in papers that begin like those of an older family -> names that do not
FAMILIES = {"lumina mgpt 2 0": "lumina2", "emu3 5": "emu35"}


@dataclass(frozen=True)
class Published:
    """One row of one published table; a number that its paper does not give is None."""

    method: str
    model: str
    dataset: str
    steps: float | None  # target-model passes per image
    step_compression: float | None  # tokens per pass
    latency_s: float | None
    latency_speedup: float | None  # against the paper's own AR run
    fid: float | None
    clip_score: float | None
    geneval_overall: float | None
    geneval_single_object: float | None
    geneval_two_object: float | None
    geneval_counting: float | None
    geneval_colors: float | None
    geneval_position: float | None
    geneval_color_attr: float | None
    memory_gb: float | None
    gflops_per_token: float | None
    hardware: str
    paper: str
    arxiv: str
    table: str
    confidence: str

    @classmethod
    def from_csv(cls, cells: Mapping[str, str]) -> Published:
        """Make a row from its cells; an empty number is None."""

        def number(name: str) -> float | None:
            return float(cells[name]) if cells[name] else None

        return cls(
            method=cells["method"],
            model=cells["model"],
            dataset=cells["dataset"],
            steps=number("steps"),
            step_compression=number("step_compression"),
            latency_s=number("latency_s"),
            latency_speedup=number("latency_speedup"),
            fid=number("fid"),
            clip_score=number("clip_score"),
            geneval_overall=number("geneval_overall"),
            geneval_single_object=number("geneval_single_object"),
            geneval_two_object=number("geneval_two_object"),
            geneval_counting=number("geneval_counting"),
            geneval_colors=number("geneval_colors"),
            geneval_position=number("geneval_position"),
            geneval_color_attr=number("geneval_color_attr"),
            memory_gb=number("memory_gb"),
            gflops_per_token=number("gflops_per_token"),
            hardware=cells["hardware"],
            paper=cells["paper"],
            arxiv=cells["arxiv"],
            table=cells["table"],
            confidence=cells["confidence"],
        )


def printed_field(name: str) -> str | None:
    """Return the field of `Published` that holds a column of table.csv; None if papers do not print it."""
    field = CALLED.get(name, name)
    return field if Published.__annotations__.get(field) == "float | None" else None


def read(path: Path = CSV) -> list[Published]:
    """Return every published row, in the order of the file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [Published.from_csv(cells) for cells in csv.DictReader(file)]


def _squash(text: str) -> str:
    return re.sub(r"[^a-z0-9+]+", " ", text.lower()).strip()


def _method(text: str) -> str:
    """Return the method without its settings: 'SJD-PAC L=64' -> 'sjd pac', 'SJD2 (tuned)' -> 'sjd2'."""
    return _squash(re.sub(r"\s*\(.*|\s+\S+=\S+.*", "", text))


def _family(model: str) -> str:
    """Return the first word of a model's name: 'Lumina-mGPT (768 px)' -> 'lumina', 'Lumina-mGPT-2.0-7B 768' -> 'lumina2'."""
    name = _squash(model)
    return next((own for printed, own in FAMILIES.items() if name.startswith(printed)), name.split(" ")[0])


def select(model: str, decoders: Iterable[str], rows: Iterable[Published] | None = None) -> list[Published]:
    """Return the rows of this model (`lumina`, `emu3` ...) and these decoders, without those of a single image."""
    names = {_squash(name.removesuffix("-paper")) for name in decoders}  # `sjd2-paper` is what papers call SJD2
    key = _family(model)
    kept = [
        row
        for row in (read() if rows is None else rows)
        if key and _family(row.model) == key and _method(row.method) in names and row.dataset != "single prompt"
    ]
    return sorted(kept, key=lambda row: (row.dataset, row.arxiv, row.table))
