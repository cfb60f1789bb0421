"""Columns that only columns=all and the report show: acceptance, percentiles, time to the first row, energy."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from evaluation.run_folder import RunFolder
from sweeps.report.cells import main_grid
from sweeps.runs import read_run
from sweeps.tables import figures
from sweeps.tables.latency import first_row
from sweeps.tables.rows import make_rows
from tests.helpers.table_runs import ar, cells, make, table

DRAFTS = {"tests": [3, 2, 1], "accepts": [2, 1, 1], "accepted": 12}
HEADINGS = ("accept rate", "accept length", "p95 s", "p99 s", "first row s", "J/image")


def with_records(path: Path, **more: object) -> Path:
    """Add keys to all records of a run."""
    run = RunFolder(path)
    lines = [json.dumps(record | more) + "\n" for record in run.records()]
    (path / "samples.jsonl").write_text("".join(lines))
    return path


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw_plots", lambda *_args, **_settings: figures.Plots())


def test_all_columns_of_a_run_and_of_an_old_one(tmp_path: Path) -> None:
    new = with_records(make(tmp_path, "sjd"), drafts=DRAFTS, energy_j=12.5)
    text, (base, ours) = table(tmp_path, new, ar(tmp_path), detail=True)
    shown, old = cells(text, "sjd"), cells(text, "ar")
    assert shown["accept rate"] == "0.667"  # 4 of 6
    assert shown["accept length"] == "5.00"  # 1 + 12 accepted in 3 passes after the prefill
    assert (shown["p95 s"], shown["p99 s"]) == ("–", "–")
    assert "p95 below 20 timed images; p99 below 100 timed images" in text
    assert shown["J/image"] == "12.5"
    assert [old[key] for key in HEADINGS[:2]] == ["", ""]
    assert old["J/image"] == "–"
    assert float(ours["accept_rate"]) == pytest.approx(4 / 6)
    assert float(ours["latency_s_p95"]) == 2
    assert "latency_s_p99" not in ours
    assert float(ours["energy_j_mean"]) == 12.5
    assert base["accept_rate"] == base["energy_j_mean"] == ""
    depths = list(csv.DictReader((tmp_path / "out" / "depths.csv").open()))
    assert [(line["depth"], line["tests"], line["accepted"]) for line in depths] == [
        ("1", "12", "8"), ("2", "8", "4"), ("3", "4", "4"),
    ]  # fmt: skip
    usual, _ = table(tmp_path, new, ar(tmp_path))
    assert not set(HEADINGS) & cells(usual, "sjd").keys()
    grid = main_grid(make_rows([read_run(new)], ("Some CPU, 2 threads", 2)), None)
    assert set(HEADINGS) <= set(grid.header)


def test_percentiles_are_shown_of_enough_images(tmp_path: Path) -> None:
    text, _ = table(tmp_path, make(tmp_path, "sjd", n=20, latency=[2.0] * 10), detail=True)
    assert (cells(text, "sjd")["p95 s"], cells(text, "sjd")["p99 s"]) == ("2", "–")
    assert "p95 below" not in text


def test_the_first_row_takes_its_share_of_the_passes(tmp_path: Path) -> None:
    # a grid of 4 x 4, images after 0.25 s of prefill; AR needs 3 of its 15 passes for the first row
    base = read_run(ar(tmp_path, latency=[3.25, 3.25]))
    assert first_row(base, base.images) == pytest.approx(0.25 + 3 * 3 / 15)
    fast = read_run(make(tmp_path, "sjd", latency=[1.0, 1.0]))  # 1, 3, ... tokens: the first pass completes it
    assert first_row(fast, fast.images) == pytest.approx(0.25 + 0.75 / 3)
    fast.images[1, 0].forwards = 6  # the slowest image of a batch decides how long a pass takes
    assert first_row(fast, {key: fast.images[key] for key in ((0, 0), (1, 0))}) == pytest.approx(0.25 + 0.75 / 5)


def test_no_first_row_where_rows_grow_at_once(tmp_path: Path) -> None:
    parts = {"_target_": "baselines.zipar.ZipAR", "window_size": 2}
    run = read_run(make(tmp_path, "zipar", lossless=False, parts=parts))
    assert first_row(run, run.images) is None
