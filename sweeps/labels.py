"""Name runs in a table: the decoder, its parts if not the usual ones, and the settings in which runs differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

import yaml

from evaluation.part_names import KEPT, PARTS, part_choices
from sjd2.config import conf_folders
from sweeps.runs import Run, flatten_settings, path_tail

RUN_WIDE = (
    "batch_size",
    "seed",
    "dtype",
    "refill",
    "sampler",
    "repeats",
)  # of a run, not of its decoder
UNNAMED = ("_target_", "name", "lossless", "breaks", *PARTS)


def set_labels(runs: Sequence[Run], named: Collection[str] = ()) -> None:
    """Give each run of a table its label; no two runs share one. named: decoder settings that it always includes."""
    differing = [key for key in RUN_WIDE if len({_run_wide(r)[key] for r in runs}) > 1]
    for run in runs:
        rivals = [other for other in runs if other.decoder == run.decoder]
        words = [*_parts(run, rivals), *_settings(run, rivals, () if run.is_ar else named)]
        words += [f"{key}={_short(_run_wide(run)[key])}" for key in differing]
        if run.identity["decoder"].get("rule") == "paper" and "rule=paper" not in words:
            words.append("rule=paper")
        run.label = " ".join([run.decoder, *words])
    counts = Counter(run.label for run in runs)
    for run in runs:
        if counts[run.label] > 1:
            run.label += f" {run.identity['id'][:4]}"


def swept(jobs: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the decoder settings that jobs of a multirun override, from their status.json."""
    words = (str(text).lstrip("+").partition("=")[0] for job in jobs for text in job.get("overrides") or ())
    return {word.removeprefix("decoder.") for word in words if word.startswith("decoder.")}


def _parts(run: Run, rivals: Sequence[Run]) -> list[str]:
    """Return e.g. `verifier=relaxed` for parts that are not the decoder's usual ones, or that differ if it has none."""
    usual, words = _usual(run.decoder), []
    for part in PARTS:
        mine = _option(run, part)
        differs = mine != usual[part] if part in usual else len({_option(other, part) for other in rivals}) > 1
        if mine and differs:
            words.append(f"{part}={mine}")
    return words


def _settings(run: Run, rivals: Sequence[Run], named: Collection[str]) -> list[str]:
    """Return the settings in which runs of one decoder differ; those of a part only among runs with that part."""
    mine, words = _own(run), []
    for key in mine:
        part = key.partition(".")[0]
        alike = [o for o in rivals if part not in PARTS or _option(o, part) == _option(run, part)]
        if key in named or len({_own(other).get(key) for other in alike}) > 1:
            words.append(f"{key}={_short(mine[key])}")
    return words


def _own(run: Run) -> dict[str, str]:
    """Return the settings of a run's decoder as text, and its adapter or weights."""
    decoder = {key: value for key, value in run.identity["decoder"].items() if key not in UNNAMED}
    for part in PARTS:
        node = run.identity["decoder"].get(part)
        decoder |= {part: {k: v for k, v in node.items() if k != "_target_"}} if isinstance(node, dict) else {}
    return {key: str(value) for key, value in flatten_settings(decoder).items()} | {
        "adapter": "none" if run.adapter is None else path_tail(run.adapter),
        "weights": str(run.identity.get("digest")) if run.adapter is None else "",
    }


def _option(run: Run, part: str) -> str:
    """Return the name of a part's yaml, e.g. exact; the class name if it has no yaml; '' without such a part."""
    node = run.identity["decoder"].get(part)
    target = node.get("_target_") if isinstance(node, dict) else None
    if target is None:
        return ""
    return part_choices(part).get(target) or (run.config.get(KEPT) or {}).get(part) or str(target)


@cache
def _usual(decoder: str) -> dict[str, str]:
    """Return the parts that a decoder's yaml chooses, including those of the decoder it builds on."""
    files = (folder / "decoder" / f"{decoder}.yaml" for folder in conf_folders())
    file = next((file for file in files if file.is_file()), None)
    chosen: dict[str, str] = {}
    for entry in yaml.safe_load(file.read_text()).get("defaults", []) if file is not None else []:
        if isinstance(entry, str):
            chosen |= _usual(entry)
        else:
            chosen |= {key.removeprefix("override "): value or "" for key, value in entry.items()}
    return chosen


def _run_wide(run: Run) -> dict[str, str]:
    others = {"sampler": run.setting("sampler"), "repeats": run.identity["prompts"].get("repeats")}
    return {key: str(others[key] if key in others else run.identity.get(key)) for key in RUN_WIDE}


def _short(text: str) -> str:
    return text[:8] if re.fullmatch(r"[0-9a-f]{12,}", text) else text
