"""The part of a run that a command asked for: `limit=2` tabulates two images of a run that holds eight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.run_folder import Id, Snapshot
from evaluation.score import Metric, score_part
from sjd2.files import read_json, write_atomically

if TYPE_CHECKING:
    from harness.plan import Plan

Parts = dict[Path, tuple[set[Id], dict[str, Any]]]  # by run folder: its images, and their metrics
KEPT = "parts.json"  # of a job of a multirun, whose table is made elsewhere


def parts_of(plans: list[Plan], limit: int | None, metrics: Mapping[str, Metric]) -> Parts:
    """Return the images that `limit` asks for, and their metrics, of those runs that have more."""
    found: Parts = {}
    for plan in plans:
        ids = plan.prompts.ids(limit)
        if plan.run.metrics.get("n_images", 0) > len(ids):  # all of `ids` are there, so the others are more
            found[plan.run.path] = (set(ids), score_part(Snapshot(plan.run, set(ids)), metrics))
    return found


def keep_parts(job: Path, parts: Parts) -> None:
    """Write the parts of a job of a multirun into its folder."""
    if parts:
        content = [[str(path.absolute()), sorted(ids), values] for path, (ids, values) in parts.items()]
        write_atomically(job / KEPT, json.dumps(content).encode())


def read_parts(sweep: Path) -> Parts:
    """Return the parts of all jobs of a multirun."""
    kept = [entry for file in sorted(sweep.glob(f"[0-9]*/{KEPT}")) for entry in read_json(file, [])]
    return {Path(path): ({(prompt, repeat) for prompt, repeat in ids}, values) for path, ids, values in kept}
