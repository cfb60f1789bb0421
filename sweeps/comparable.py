"""Decide which runs may be compared, and with what.

Two runs stand in one table if they answered the same prompts with the same sampling parameters and the same model.
A speed-up needs more: everything that decides a time must be equal (`SPEED_KEYS`, hardware and threads).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from sweeps.labels import set_labels
from sweeps.runs import Machine, Run

SPEED_KEYS = ("sampling", "sampler", "batch_size", "refill", "dtype")  # besides model, hardware and threads
NO_BASELINE = "no AR baseline found"


def groups(runs: Iterable[Run], named: Collection[str] = ()) -> list[list[Run]]:
    """Split runs into tables by model, prompts and sampling parameters; labelled, AR first, lossless before lossy.

    named: decoder settings that labels always show, e.g. those that failed jobs set as well.
    """
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(run.group, []).append(run)
    for members in found.values():
        set_labels(members, named)
        members.sort(key=lambda run: (not run.is_ar, not run.lossless, run.decoder, _natural(run.label)))
    return list(found.values())


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Sort window=8 before window=16."""
    parts = re.findall(r"\d+\.?\d*|\D+", text)
    return [(0, float(part), "") if part[0].isdigit() else (1, 0.0, part) for part in parts]


def same_weights(run: Run, other: Run) -> bool:
    """Return whether two runs of a table have exactly the same weights, adapter included."""
    return run.identity.get("digest") == other.identity.get("digest")


def same_but_adapter(run: Run, other: Run) -> bool:
    """Return whether `other` is `run`'s model without its adapter."""
    only_run_has_one = run.adapter is not None and other.adapter is None
    return only_run_has_one and run.model == other.model and run.files == other.files


def obstacles(run: Run, other: Run, machine: Machine | None) -> list[str]:
    """Return what makes the times of two runs incomparable; empty if nothing does."""
    named = [key for key in SPEED_KEYS if run.setting(key) != other.setting(key)]
    if not (same_weights(run, other) or same_but_adapter(run, other)):
        named.append("model weights")
    if not run.timed(machine).keys() & other.timed(machine).keys():
        named.append("hardware, threads or images")
    return named


def baseline(run: Run, runs: Iterable[Run], machine: Machine | None) -> tuple[Run | None, list[str]]:
    """Return the AR run with equal settings, of several the one that `run` took turns with, else that of most images.

    If there is none, return None and what the nearest AR run differs in.
    """
    ranked = sorted(
        ((obstacles(run, other, machine), not same_weights(run, other), -_in_turns(run, other), -len(other.images), index,
          other) for index, other in enumerate(runs) if other.is_ar),
        key=lambda entry: (len(entry[0]), *entry[1:5]),
    )  # fmt: skip
    if not ranked:
        return None, [NO_BASELINE]
    return (ranked[0][5], []) if not ranked[0][0] else (None, ranked[0][0])


def _in_turns(run: Run, other: Run) -> int:
    """Return how many images of `run` were timed in turns with those of another."""
    return sum((image.turns, key) in other.in_turns for key, image in run.images.items() if image.turns)


def quality_reference(run: Run, runs: Iterable[Run]) -> Run | None:
    """Return the AR run to compare quality with: the same model, the nearest settings, the most images."""
    fit = [r for r in runs if r.is_ar and r is not run and (same_weights(run, r) or same_but_adapter(run, r))]
    fit = [r for r in fit if len({key[0] for key in r.images.keys() & run.images.keys()}) > 1]
    keys = (*SPEED_KEYS, "seed")
    return min(
        fit,
        key=lambda r: (not same_weights(run, r), sum(run.setting(k) != r.setting(k) for k in keys), -len(r.images)),
        default=None,
    )


def table_machine(runs: Iterable[Run]) -> Machine | None:
    """Return the machine whose times a table shows: that of most runs (AR counts twice), then of most images."""
    weight: Counter[Machine] = Counter()
    images: Counter[Machine] = Counter()
    for run in runs:
        timed = Counter(image.machine for image in run.images.values() if image.machine is not None)
        images.update(timed)
        weight.update(dict.fromkeys(timed, 2 if run.is_ar else 1))
    return max(weight, key=lambda machine: (weight[machine], images[machine]), default=None)


def common_prompts(run: Run, other: Run) -> int:
    """Return the number of prompts for which both runs have an image."""
    return len({key[0] for key in run.images.keys() & other.images.keys()})
