"""Step compression by groups of prompts: the sets' own categories, what the shapes show, thirds of the entropy."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from evaluation.run_folder import RunFolder
from sweeps.runs import read_run
from sweeps.tables import figures
from sweeps.tables.breakdown import ENTROPY, breakdown_tables, breakdowns
from sweeps.tables.rows import make_rows
from tests.helpers.table_runs import ar, cells, make, table

SHAPES = (
    "one small blue circle on a plain teal background",
    "three small blue circles on a plain teal background",
    "a small blue square left of a small purple circle on a plain teal background",
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw_plots", lambda *_args, **_settings: figures.Plots())


def rewritten(path: Path, **columns: list) -> Path:
    """Give the records of a run other values, one per image."""
    lines = []
    for number, record in enumerate(RunFolder(path).records()):
        change = {key: values[number] for key, values in columns.items()}
        lines.append(json.dumps(record | change) + "\n")
    (path / "samples.jsonl").write_text("".join(lines))
    return path


def known(path: Path, facts: list[dict]) -> Path:
    """Let a run know of its prompts."""
    lines = [json.dumps({"prompt": "-", "metadata": fact}) + "\n" for fact in facts]
    (path / "prompts.jsonl").write_text("".join(lines))
    return path


def test_categories_of_a_prompt_set(tmp_path: Path) -> None:
    facts = [{"Category": name, "Challenge": "Basic"} for name in ("Animals", "Food", "Animals", "Food")]
    forwards = {"forwards": [4, 8, 8, 8], "accepted": [[4] * 4, *[[2] * 8] * 3]}
    run = known(rewritten(make(tmp_path, "sjd"), **forwards), facts)
    text, _ = table(tmp_path, run, known(ar(tmp_path), facts), detail=True)
    shown = cells(text[text.index("by category") - 30 :], "sjd")
    assert shown["Animals (2 prompts)"] == "3.00 ± 1.00"  # 4 and 2
    assert shown["Food (2 prompts)"] == "2.00"
    assert "by challenge" not in text  # one group only
    lines = list(csv.DictReader((tmp_path / "out" / "breakdown.csv").open()))
    (line,) = [line for line in lines if (line["label"], line["group"]) == ("sjd", "Animals")]
    assert (line["by"], line["images"], line["prompts"]) == ("category", "2", "2")
    assert (float(line["step_compression"]), float(line["step_compression_se"])) == (3.0, 1.0)
    usual, _ = table(tmp_path, run)
    assert "by category" not in usual


def test_thirds_of_the_entropy_are_of_lossless_runs(tmp_path: Path) -> None:
    nats = [16.0, 80.0, 48.0, 32.0, 64.0, 96.0]  # 1 to 6 per token
    base = rewritten(ar(tmp_path, n=6), nll=nats)
    lossy = rewritten(make(tmp_path, "gsd", n=6, lossless=False), nll=nats[::-1])
    rows = make_rows([read_run(path) for path in (base, lossy)], None)
    (found,) = [one for one in breakdowns(rows) if one.by == ENTROPY]
    assert found.groups == {"low": {0, 3}, "middle": {2, 4}, "high": {1, 5}}
    assert found.about["high"] == "5.00 to 6.00 nats"
    assert breakdown_tables(rows)[-1].header[1] == "low (1.00 to 2.00 nats, 2 prompts)"
    assert not [one for one in breakdowns(rows[1:]) if one.by == ENTROPY]


def test_shapes_are_grouped_by_what_they_show(tmp_path: Path) -> None:
    run = rewritten(make(tmp_path, "sjd", n=3), prompt=list(SHAPES))
    (found,) = breakdowns(make_rows([read_run(run)], None))
    assert found.groups == {"one object": {0}, "several of a kind": {1}, "two objects": {2}}
