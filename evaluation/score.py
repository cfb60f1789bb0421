"""Score a run: every metric reads the records and images of its folder, their values meet in metrics.json.

A metric is any object with the members of `Metric`; a new one is `evaluation/x.py` and an entry in a yaml of
`conf/evaluation/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from evaluation.run_folder import Id, RunFolder
from sjd2.files import read_lines, write_atomically

SCORES_FILE = "scores.jsonl"
NOTE = ".scored"  # the settings that metrics.json was made with, so that a finished run is not scored again


class Metric(Protocol):
    """Something measured on a run. `keys`: all it may write; `protocol`: one sentence on how the values come about."""

    keys: tuple[str, ...]

    @property
    def protocol(self) -> str:
        """Say in one sentence how the values come about."""

    def check(self) -> None:
        """Raise UserError if a file or library is missing; called before any image is made, so it must be cheap."""

    def score(self, run: RunFolder) -> dict[str, Any]:
        """Return flat values under `keys`; what does not apply to the run is absent."""


def score(run: RunFolder, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Measure a run and write metrics.json.

    Values of metrics that are not asked for now stay where they are of the same number of images, else they go: one
    file never mixes two N.
    """
    (run.path / NOTE).unlink(missing_ok=True)
    n_images = len(run.records())
    old = run.metrics if run.metrics.get("n_images") == n_images else {}
    protocol: dict[str, str] = dict(old.get("protocol", {}))
    out = {key: value for key, value in old.items() if key not in ("n_images", "protocol")}
    for name, metric in metrics.items():
        out = {key: value for key, value in out.items() if key not in metric.keys}
        protocol.pop(name, None)
        values = metric.score(run)
        if foreign := values.keys() - set(metric.keys):
            raise TypeError(f"metric '{name}' wrote {sorted(foreign)}, which its `keys` do not list.")
        out |= values
        if values:
            protocol[name] = metric.protocol
    result = {"n_images": n_images, **out, "protocol": protocol}
    write_atomically(run.path / "metrics.json", (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    return result


# ---------------------------------------------------------------------------------------------- values of single images
def read_scores(run: RunFolder) -> dict[Id, dict[str, float]]:
    """Read scores.jsonl, one line per image: {id: {"clip": ..., "alignment": ...}}; empty if there is none."""
    rows, _ = read_lines(run.path / SCORES_FILE)
    return {(row["id"][0], row["id"][1]): {key: value for key, value in row.items() if key != "id"} for row in rows}


def keep_scores(run: RunFolder, columns: Mapping[str, Mapping[Id, float]]) -> None:
    """Write columns {name: {id: value}} into scores.jsonl, so that two runs can be compared image by image."""
    rows = read_scores(run)
    for row in rows.values():
        for name in columns:
            row.pop(name, None)
    for name, values in columns.items():
        for key, value in values.items():
            rows.setdefault(key, {})[name] = value
    lines = (json.dumps({"id": list(key), **rows[key]}, allow_nan=False) + "\n" for key in sorted(rows) if rows[key])
    write_atomically(run.path / SCORES_FILE, "".join(lines).encode())
