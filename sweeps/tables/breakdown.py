"""Step compression by what the prompts are: their category, and how much the model leaves open (its entropy)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluation.acceptance import accept_rate
from evaluation.prompts import metadata_of
from evaluation.run_folder import Id
from sjd2.errors import UserError
from sjd2.models.tiny.scenes import attributes
from sweeps.runs import Run
from sweeps.tables.formats import Table
from sweeps.tables.rows import Row, likelihoods, standard_error

KEYS = {"Category": "category", "category": "category", "Challenge": "challenge", "tag": "task"}  # of prompts' metadata
TIERS = ("low", "middle", "high")
ENTROPY = "entropy tier"
MOST = 16  # groups in a table for readers; the CSV has all


@dataclass
class Breakdown:
    """One way to group prompts: `by` in words, {group: numbers of its prompts}, and what each group is beside its name."""

    by: str
    groups: dict[str, set[int]]
    about: dict[str, str] = field(default_factory=dict)

    def heading(self, name: str) -> str:
        """Return a group's heading: its name, what it is, and its number of prompts."""
        count = len(self.groups[name])
        parts = (self.about.get(name), f"{count} prompt" + "s" * (count != 1))
        return f"{name} ({', '.join(filter(None, parts))})"


def breakdowns(rows: Sequence[Row]) -> list[Breakdown]:
    """Return the groupings of a table's prompts that split them in two or more."""
    prompts = {key[0]: image.prompt for row in rows for key, image in row.run.images.items()}
    found = [*by_metadata(rows[0].run, prompts), by_entropy([row.run for row in rows])]
    return [one for one in found if one is not None and len(one.groups) > 1]


def by_metadata(run: Run, prompts: Mapping[int, str]) -> list[Breakdown]:
    """Group prompts by what their set knows of them; those of the shapes by what is in the picture."""
    facts = metadata_of(run.folder)
    found = [
        Breakdown(words, _grouped({prompt: known[key] for prompt, known in facts.items() if known.get(key)}, prompts))
        for key, words in KEYS.items()
    ]
    return found if facts else [Breakdown("content", _grouped(_contents(prompts), prompts))]


def _grouped(values: Mapping[int, Any], prompts: Mapping[int, str]) -> dict[str, set[int]]:
    groups: dict[str, set[int]] = {}
    for prompt in sorted(prompts.keys() & values.keys()):
        groups.setdefault(str(values[prompt]), set()).add(prompt)
    return dict(sorted(groups.items()))


def _contents(prompts: Mapping[int, str]) -> dict[int, str]:
    """Return what captions of the shapes describe; {} for other prompts."""
    found = {}
    for prompt, text in prompts.items():
        try:
            named = attributes(text)
        except UserError:
            return {}
        several = "one object" if named["count"] == "one" else "several of a kind"
        found[prompt] = "two objects" if named["relation"] != "none" else several
    return found


def by_entropy(runs: Sequence[Run]) -> Breakdown | None:
    """Group prompts into thirds by the NLL per token of the images that lossless decoders made of them.

    Its mean is the entropy of the model given the prompt, in nats per token, since these images are drawn from it. None
    without a lossless run, or below six prompts.
    """
    values: dict[int, list[float]] = {}
    for run in runs:
        for key, nats in likelihoods(run).items() if run.lossless else ():
            values.setdefault(key[0], []).append(nats)
    ranked = sorted((float(np.mean(found)), prompt) for prompt, found in values.items())
    if len(ranked) < 2 * len(TIERS):
        return None
    parts = dict(zip(TIERS, np.array_split(np.arange(len(ranked)), len(TIERS)), strict=True))
    groups = {tier: {ranked[place][1] for place in places} for tier, places in parts.items()}
    about = {tier: f"{ranked[places[0]][0]:.2f} to {ranked[places[-1]][0]:.2f} nats" for tier, places in parts.items()}
    return Breakdown(ENTROPY, groups, about)


def breakdown_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table for each grouping: a row per run, its step compression in each group."""
    made = []
    for one in breakdowns(rows):
        shown = dict(list(one.groups.items())[:MOST])
        header = [f"step compression by {one.by}", *(one.heading(name) for name in shown)]
        cells = [[row.run.label, *(_cell(_chosen(row, prompts)) for prompts in shown.values())] for row in rows]
        notes = ["± is the standard error over prompts; `breakdown.csv` has the number of images."]
        if len(shown) < len(one.groups):
            notes.append(f"The first {MOST} of {len(one.groups)} groups; breakdown.csv has all.")
        made.append(Table("", header, cells, notes))
    return made


def breakdown_lines(rows: Sequence[Row], title: str) -> list[dict[str, Any]]:
    """Return a line for each run and group of prompts, for the CSV."""
    lines = []
    for one in breakdowns(rows):
        for row in rows:
            for name, prompts in one.groups.items():
                values = _chosen(row, prompts)
                drafts = [image.drafts for key, image in row.run.images.items() if key[0] in prompts]
                known = [image for image in drafts if image is not None]
                line = {"table": title, "label": row.run.label, "by": one.by, "group": name, "images": len(values)}
                line |= {"prompts": len({key[0] for key in values})}
                line |= {"step_compression": float(np.mean(list(values.values()))) if values else None}
                line |= {"step_compression_se": standard_error(values)}
                lines.append(line | {"accept_rate": accept_rate(known) if len(known) == len(drafts) else None})
    return lines


def _chosen(row: Row, prompts: set[int]) -> dict[Id, float]:
    return {key: image.tokens / image.forwards for key, image in row.run.images.items() if key[0] in prompts}


def _cell(values: Mapping[Id, float]) -> str:
    if not values:
        return ""
    error = standard_error(values)
    return f"{np.mean(list(values.values())):.2f}" + (f" ± {error:.2f}" if error else "")
