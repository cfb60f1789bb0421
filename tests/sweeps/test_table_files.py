"""What tables are written to: failed jobs, the end of a multirun, Markdown, LaTeX and plots."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from sjd2.errors import UserError
from sweeps.multirun import callback
from sweeps.runs import read_run
from sweeps.tables import figures, plots
from sweeps.tables.formats import Table, escape, latex, markdown
from sweeps.tables.plots import Point, pareto_front
from sweeps.tables.rows import make_rows
from sweeps.tables.table import make_tables
from sweeps.tables.terminal import show
from tests.helpers.separators import MARKUP
from tests.helpers.table_runs import CPU, ar, cells, make, table


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no plots in tests about numbers."""
    if "with_plots" not in request.fixturenames:
        monkeypatch.setattr(figures, "draw_plots", lambda *_args, **_settings: figures.Plots())


@pytest.fixture
def with_plots() -> None:
    """Let this test draw."""


def test_a_sweep_that_was_cut_names_what_it_sweeps(tmp_path: Path) -> None:
    jobs = [
        {"status": "failed", "reason": "window must be 1 or more.", "overrides": ["decoder=sjd", "decoder.window=-1"]},
        {"status": "failed", "reason": "has not started: it waits.", "overrides": ["decoder=sjd", "decoder.window=16"]},
    ]
    text = make_tables([make(tmp_path / "runs", "sjd")], tmp_path / "out", jobs)
    assert "| sjd window=9 | yes |" in text
    assert "| sjd window=-1 | failed: window must be 1 or more. |" in text
    assert "| sjd window=16 | has not started: it waits. |" in text


def test_failed_jobs_are_rows(tmp_path: Path) -> None:
    job = {"status": "failed", "reason": "window 999 exceeds | 144\ntokens.", "run_dir": None}
    job["overrides"] = ["decoder=sjd", "decoder.window=999", "seed=1"]
    text, rows = table(tmp_path, ar(tmp_path / "runs"), failed=(job,))
    assert "| sjd window=999 seed=1 | failed: window 999 exceeds \\| 144 tokens. |" in text
    assert rows[1] == dict.fromkeys(rows[1], "") | {
        "label": "sjd window=999 seed=1", "status": "failed", "reason": "window 999 exceeds | 144 tokens.",
    }  # fmt: skip
    assert "failed: window 999" in (tmp_path / "out" / "table.tex").read_text()


def test_only_failed_jobs(tmp_path: Path) -> None:
    text, rows = table(tmp_path, failed=({"status": "failed", "reason": "no weights.", "overrides": ["decoder=sjd2"]},))
    assert "| sjd2 | failed: no weights. |" in text
    assert len(rows) == 1


def test_an_unreadable_folder_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "config.yaml").write_text("decoder: {name: sjd}\n")
    text, _ = table(tmp_path, ar(tmp_path / "runs"), tmp_path / "runs" / "old")
    assert "| old | failed:" in text
    assert "no identity" in text
    assert cells(text, "ar")["N"] == "4"


def test_nothing_to_show_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder here has an image"):
        make_tables([], tmp_path)


def sweep(folder: Path, *jobs: dict[str, Any] | None) -> Path:
    for number, job in enumerate(jobs):
        (folder / str(number)).mkdir(parents=True)
        if job is not None:
            (folder / str(number) / "status.json").write_text(json.dumps(job))
    return folder


def ok(path: Path) -> dict[str, Any]:
    return {"status": "ok", "reason": None, "run_dir": str(path), "overrides": []}


def test_callback_tabulates_all_jobs_and_counts_the_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    ar(runs)  # made as a baseline, so no job names it
    ar(runs, batch_size=8)  # of other settings: stays out
    failed = {"status": "failed", "reason": "out of memory.", "run_dir": None, "overrides": ["decoder=scd"]}
    monkeypatch.setattr(callback.Tables, "failed", 0)
    folder = sweep(
        tmp_path / "sweep", ok(make(runs, "sjd")), failed, None, *(ok(make(runs, f"d{i}")) for i in range(9))
    )
    callback.Tables().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))
    assert callback.Tables.failed == 2
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [row["decoder"] for row in rows if row["status"] == "ok"] == ["ar", *(f"d{i}" for i in range(9)), "sjd"]
    assert [row["reason"] for row in rows if row["status"] == "failed"] == ["out of memory.", callback.KILLED]
    assert "out of memory." in capsys.readouterr().out
    assert callback.main([str(folder)]) == 1
    assert callback.main([str(folder / "nowhere")]) == 2


def test_callback_of_a_multirun_without_runs_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback.Tables, "failed", 0)
    folder = sweep(tmp_path / "sweep", ok(tmp_path))  # e.g. stage=bench: its folder is no run folder
    callback.Tables().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))
    assert callback.Tables.failed == 0
    assert not (folder / "table.md").exists()


def test_jobs_are_in_order_of_number(tmp_path: Path) -> None:
    folder = sweep(tmp_path, *({"status": "ok", "run_dir": None, "overrides": [str(i)]} for i in range(12)))
    assert [job["overrides"][0] for job in callback.statuses(folder)] == [str(i) for i in range(12)]


def test_failed_jobs_are_named_by_what_differs(tmp_path: Path) -> None:
    jobs = [["decoder=sjd", "limit=4", f"decoder.window={w}"] for w in (0, 8)]
    folder = sweep(
        tmp_path, *({"status": "failed", "reason": "x.", "run_dir": None, "overrides": o} for o in jobs), None
    )
    assert [job["overrides"] for job in callback.statuses(folder)] == [
        ["decoder=sjd", "decoder.window=0"], ["decoder=sjd", "decoder.window=8"], ["job 2"],
    ]  # fmt: skip


def test_latex_escapes() -> None:
    assert escape("a_b & 50% $x$ #1 {y} ~ ^ \\ <1>") == (
        r"a\_b \& 50\% \$x\$ \#1 \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{} \textless{}1\textgreater{}"
    )
    assert (
        escape("**lossy** 2.0 ± 0.1, 3×, Δ ↓ †")
        == r"\textbf{lossy} 2.0 $\pm$ 0.1, 3$\times$, $\Delta$ $\downarrow$ $\dagger$"
    )


def test_latex_table_has_as_many_cells_as_columns() -> None:
    text = latex(Table("t_1", ["a", "b", "c"], [["1", "2", "3"]], notes=["50 %"], failed=[("x_y", "it & that")]))
    assert r"\begin{tabular}{lrr}" in text
    assert r"1 & 2 & 3 \\" in text
    assert r"x\_y & \multicolumn{2}{p{0.7\linewidth}}{failed: it \& that} \\" in text
    assert r"50 \%" in text
    assert text.count("{") == text.count("}")


def test_a_users_part_keeps_its_name_where_its_yaml_is_not(tmp_path: Path) -> None:
    path = make(tmp_path / "runs", "sjd", parts={"verifier": {"_target_": "mine.parts.Own"}})
    assert "| sjd verifier=mine:Own |" in table(tmp_path, path)[0]  # made before run folders kept the names
    config = OmegaConf.load(path / "config.yaml")
    OmegaConf.save(OmegaConf.merge(config, {"part_names": {"verifier": "own"}}), path / "config.yaml")
    assert "| sjd verifier=own |" in table(tmp_path, path)[0]


def test_markdown_rows_are_one_line_each() -> None:
    text = markdown(Table("t", ["a", "b"], [["x|y", "1\n2"]], failed=[("j", "r")]))
    assert "| x\\|y | 1 2 |\n| j | failed: r |\n" in text


@pytest.mark.parametrize("text", MARKUP)
def test_a_text_of_a_user_is_shown_as_it_stands(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cell, a note, the title and a reason; as a reader of Markdown sees it, on a terminal, in LaTeX."""
    wanted = " ".join(text.split())
    made = Table(text, ["a", text], [["1", text], ["2", "**lossy**"]], [f"{text}: x", "**x**: y"], [("job", text)])
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown(made))
    seen = [
        "".join("**" if child.type.startswith("strong") else child.content for child in token.children)
        for token in tokens
        if token.type == "inline"
    ]
    cells = ["a", wanted, "1", wanted, "2", "**lossy**", "job", f"failed: {wanted}"]
    assert seen == [wanted, *cells, f"{wanted}: x".replace("`", ""), "**x**: y"]  # a note may show a command as code
    monkeypatch.setenv("COLUMNS", "300")
    show(markdown(made), tmp_path / "table.md", "text")
    assert capsys.readouterr().out.count(wanted) == 4  # all but the note, which the file has
    assert latex(made).replace(r"\{", "").replace(r"\}", "").count("{") == latex(made).count("}") - latex(made).count(
        r"\}"
    )


def test_pareto_front() -> None:
    a, b, c = Point("a", 1.0, 5.0, True), Point("b", 2.0, 3.0, True), Point("c", 3.0, 4.0, True)
    assert pareto_front([c, b, a], lower_is_better=True) == [a, b]
    assert pareto_front([c, b, a], lower_is_better=False) == [a]


def test_the_image_grid_takes_only_equal_seeds(tmp_path: Path) -> None:
    runs = [read_run(make(tmp_path, "sjd", n=2)), read_run(ar(tmp_path)), read_run(make(tmp_path, "sjd", seed=3))]
    alike, ids = figures.same_seeds(runs)
    assert alike == runs[:2]
    assert ids == [(0, 0), (1, 0)]


def test_accepted_counts_leave_the_prefill_out(tmp_path: Path) -> None:
    assert figures.accepted_counts(read_run(make(tmp_path, "sjd", n=2))) == {3: 2, 4: 2, 8: 2}


@pytest.mark.usefixtures("with_plots")
def test_plots_are_drawn_and_earlier_ones_are_removed(tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    known = {"fid": 2.0, "fid_extractor": "net a", "kid": 0.1, "kid_std": 0.02}
    text, _ = table(tmp_path, ar(runs, metrics=known), make(runs, "sjd", metrics=known | {"fid": 3.0}))
    for name in ("pareto", "grid", "acceptance", "accepted"):
        with Image.open(out / f"{name}.png") as plot:
            assert len(plot.convert("RGB").getcolors(10**7)) > 10
        assert f"({name}.png)" in text
    text, _ = table(tmp_path, ar(runs))  # nothing to compare any more
    assert {path.name for path in out.glob("*.png")} == {"grid.png"}
    assert "pareto" not in text


@pytest.mark.usefixtures("with_plots")
def test_prompts_labels_and_titles_are_drawn_as_they_stand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Dollar signs are no mathematics; characters without a glyph are named."""
    caplog.set_level("INFO")
    texts = (*MARKUP, "_hidden from legends")
    points = [Point(text, place, 5.0, place % 2 == 0, 0.1) for place, text in enumerate(texts, 1)]
    plots.pareto({texts[0]: (points, True)}, tmp_path / "p.png", caption=texts[0])
    image = np.zeros((4, 4, 3), np.uint8)
    plots.comparison_grid({text: [image, None] for text in texts}, texts[:2], tmp_path / "g.png", note=texts[0])
    plots.acceptance_maps({text: np.ones(4) for text in texts[:4]}, 2, 2, tmp_path / "m.png")
    plots.acceptance_histogram({text: {1: 2, 3: 1} for text in texts}, tmp_path / "h.png")
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert "no font here has" in caplog.text


@pytest.mark.usefixtures("with_plots")
@pytest.mark.parametrize("counts", [{1: 5, 2: 20, 3: 10, 4: 1}, {1: 1000, 2: 20, 4: 1}, {1: 7}])
def test_ticks_are_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[int, int]) -> None:
    """10^-1 is drawn as mathematics, also at ticks that the final layout adds; token counts are whole."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (save(self, *args, **kw), drawn.append(self)))
    plots.acceptance_histogram({"sjd_$x$": counts}, tmp_path / "h.png")
    (axes,) = drawn[0].axes
    shown = [text for text in axes.yaxis.get_ticklabels(which="both") if "$" in text.get_text()]
    assert shown
    assert all(text.get_parse_math() for text in shown)
    assert not any(text.get_parse_math() for text in axes.get_legend().get_texts())
    assert all(text.get_text().replace("−", "").isdigit() for text in axes.xaxis.get_ticklabels())


@pytest.mark.usefixtures("with_plots")
def test_a_plot_that_cannot_be_drawn_costs_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no room for axes")

    monkeypatch.setattr(figures, "comparison_grid", broken)
    bad = make(tmp_path / "runs", "scd")
    line = (bad / "samples.jsonl").read_text().replace('"prefill"', '"pre"')
    (bad / "samples.jsonl").write_text(line)
    text, rows = table(tmp_path, ar(tmp_path / "runs"), make(tmp_path / "runs", "sjd"), bad)
    assert "Skipped grid.png: no room for axes" in text
    assert "(accepted.png)" in text
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]
    assert "its files cannot be read (KeyError: 'prefill')" in text


def test_the_pareto_plot_mixes_neither_networks_nor_n(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict] = []
    monkeypatch.setattr(figures, "pareto", lambda panels, *_args, **_settings: drawn.append(panels))
    for first, second in (({"fid_extractor": "a"}, {"fid_extractor": "b"}), ({}, {"n": 6}), ({}, {})):
        runs = [
            ar(tmp_path, metrics={"fid": 1.0} | first),
            make(tmp_path, "sjd", n=second.pop("n", 4), metrics={"fid": 2.0} | second),
        ]
        figures._pareto(make_rows([read_run(path) for path in runs], (CPU, 2)), tmp_path / "x.png", "t")
        for path in runs:
            shutil.rmtree(path)
    assert [list(panels) for panels in drawn] == [[figures.LIKELIHOOD]] * 2 + [["FID"]]


def test_acceptance_counts_the_passes_that_a_draft_token_waited(tmp_path: Path) -> None:
    # window 9 has 8 draft tokens: after the prefill 1..8, of which 1..3 commit; then 4..11, of which 4..7; then 8..15
    waited = figures.mean_waiting(read_run(make(tmp_path, "sjd", n=2)))
    assert waited.tolist() == [0] * 4 + [1] * 4 + [2] + [1] * 3 + [0] * 4


def test_shell_completion_stays_quick() -> None:
    code = "import sys, sweeps.multirun.callback; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
