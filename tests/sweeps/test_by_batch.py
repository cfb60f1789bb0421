"""Throughput and latency against batch size: one table and one plot for runs that differ in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeps.comparable import groups, table_machine
from sweeps.runs import read_run
from sweeps.tables import figures
from sweeps.tables.by_batch import LATENCY, THROUGHPUT, batch_series, batch_table
from sweeps.tables.rows import Row, make_rows
from tests.helpers.table_runs import ar, cells, make, table


def rows(*paths: Path) -> list[Row]:
    runs = [read_run(path) for path in paths]
    (group,) = groups(runs)
    return make_rows(group, table_machine(group))


def test_a_row_per_decoder_and_a_column_per_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "PLOTS", {"batches": figures.PLOTS["batches"]})  # drawing takes seconds
    made = [ar(tmp_path, latency=[4.0, 4.0])]
    made += [make(tmp_path, "sjd", latency=[1.0 * size] * 2, batch_size=size) for size in (2, 4, 16)]
    found = rows(*made)
    grid = batch_table(found)
    assert grid is not None
    assert list(grid.header) == ["images/s (latency s) by batch size", "2", "4", "16"]
    assert [row[0] for row in grid.rows] == ["ar", "sjd"]
    assert grid.rows[0][2:] == ["", ""]
    assert grid.rows[1][1:] == ["0.667 (2)", "0.4 (4)", "0.118 (16)"]  # 2 images in latency + 1 s
    (throughput, x, first), (latency, _, second) = batch_series(found)
    assert (x, first, second) == ("batch size", THROUGHPUT, LATENCY)
    assert [point[0] for point in throughput["sjd"]] == [2, 4, 16]
    assert latency["sjd"] == [(2, 2), (4, 4), (16, 16)]
    text, _ = table(tmp_path, *made)
    assert "batches.png" in text
    assert (tmp_path / "out" / "batches.png").is_file()
    assert cells(text[text.index("| images/s (latency s)") :], "sjd")["4"].endswith("(4)")


def test_one_batch_size_has_neither(tmp_path: Path) -> None:
    found = rows(ar(tmp_path), make(tmp_path, "sjd"))
    assert batch_table(found) is None
    assert batch_series(found) == []
