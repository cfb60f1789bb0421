"""Tables on a terminal: every number whole at any width, notes left to the file, Markdown through a pipe, JSON on demand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sweeps.tables.terminal import read_page, show
from tests.helpers.table_runs import ar, make, table

SCORES = {
    "fid": 12.345,
    "fid_extractor": "a network with a long name",
    "fid_reference": "4,000 images",
    "kid": -0.01234,
    "kid_std": 0.00456,
    "clip_score": 31.25,
    "clip_model": "another network",
}
NUMBER = re.compile(r"[-+]?\d[\d.,]*\d|\d")


@pytest.fixture
def page(tmp_path: Path) -> tuple[str, Path]:
    """Return a table with everything in it, and its file."""
    runs = tmp_path / "runs"
    job = {"status": "failed", "reason": "out of memory", "overrides": ["decoder=eagle", "decoder.window=48"]}
    wide = {"parts": {"window": 48, "schedule": {"highest": 12.5}}, "drafts": 7, "metrics": SCORES}
    run_dirs = [
        ar(runs, metrics=SCORES),
        make(runs, "sjd2", **wide),
        make(runs, "sjd2", lossless=False, metrics=SCORES),
    ]
    text, _ = table(tmp_path, *run_dirs, failed=(job,))
    return text, tmp_path / "out" / "table.md"


def shown(capsys: pytest.CaptureFixture[str], page: tuple[str, Path], output: str = "text") -> str:
    capsys.readouterr()
    show(*page, output)
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_number_is_cut(
    page: tuple[str, Path], width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = shown(capsys, page)
    body, _, files = out.rstrip("\n").rpartition("\n")
    assert max(map(len, body.splitlines())) <= width
    found = NUMBER.findall(body)
    rows = [row for shown_table in read_page(page[0])[0] for row in shown_table.rows]
    assert len(rows) == 3
    for cell in (cell for row in rows for cell in row):
        for number in NUMBER.findall(cell):
            assert number in found, f"{number} of '{cell}' at {width} columns\n{out}"
    assert "…" not in out
    assert "failed: out of memory" in " ".join(body.split())
    assert "Step compression is the mean" not in out
    assert re.fullmatch(rf"table, \d warnings?, \d notes: {re.escape(str(page[1]))}", files)


def test_costs_come_first_and_quality_second(
    page: tuple[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    blocks = re.split(r"\n\n+", shown(capsys, page))
    assert blocks[0].split(", ")[-2:] == ["N 4", "batch 2"]
    for title in ("decoder", "lossless", "passes", "compression", "latency", "speed-up"):
        assert title in blocks[1]
    assert "FID" not in blocks[1]
    assert "NLL" in blocks[2]
    assert "lossless" not in blocks[2]


@pytest.mark.parametrize("width", [60, 100])
def test_the_two_most_important_warnings_are_shown_in_a_line_each(
    tmp_path: Path, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text, _ = table(tmp_path, ar(tmp_path, n=3), make(tmp_path, "sjd", n=6, launch={"cpu_share": 0.26}))
    *_, first, second, files = shown(capsys, (text, tmp_path / "out" / "table.md")).splitlines()
    assert first.startswith("Warning: no speed-up for sjd: sjd got only 26 %")
    assert first.endswith(" ...")
    assert second.startswith("Warning: intervals and standard errors are too narrow:")
    assert max(map(len, (first, second))) <= width
    assert files.startswith("table, ")


def test_a_pipe_gets_markdown_and_the_file(page: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, file = page
    for output in ("auto", "markdown"):
        out = shown(capsys, page, output)
        assert out.startswith("## toy on shapes")
        assert "| ar | yes | 4 |" in out
        assert "![" not in out
        assert out.endswith(f"\n\ntable: {file}\n")
    show("## t\n\n| a |\n| :--- |\n| 1 |\n\n![grid](grid.png)\n")
    assert capsys.readouterr().out == "## t\n\n| a |\n| :--- |\n| 1 |\n"


def test_json_holds_every_number_unrounded(page: tuple[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    show(*page, "json")
    rows = json.loads(capfd.readouterr().out)
    assert [row["decoder"] for row in rows if row["status"] == "ok"] == ["ar", "sjd2", "sjd2"]
    assert {row["fid"] for row in rows if row["status"] == "ok"} == {12.345}
    assert rows[-1] == {"label": "eagle window=48", "status": "failed", "reason": "out of memory"}
