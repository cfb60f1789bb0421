"""The report: one page that needs nothing beside it, whose numbers are those of table.csv, and the traces of its race."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.run_folder import RunFolder
from sjd2.errors import UserError
from sweeps.comparable import groups
from sweeps.report import gif, page
from sweeps.report.charts import axis
from sweeps.report.encode import image_uri
from sweeps.report.gif import LIMIT, pace
from sweeps.report.page import make_report
from sweeps.report.race import UNIT, in_a_row, make_race, race_json
from sweeps.report.trajectories import CHANGED, COMMITTED, FINAL, NOTHING, OTHER, classes, draft_table
from sweeps.runs import read_runs
from sweeps.tables.published import select
from tests.helpers.cli import Cli
from tests.helpers.table_runs import ar, make

EVIL = '<script>alert("x")</script> & "quotes" </script> $100_$ {{ 1 + 1 }} **b** 猫 $200'
AR = [(0.1 * step, step + 1) for step in range(1, 16)]
JUMPS = [(0.25, 4), (0.5, 8), (0.75, 16)]


class Page(HTMLParser):
    """The parts of a page that tests ask for: the tables' cells, the addresses, the scripts' data, all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tables, self.links, self.data, self.words = text, [], [], [], []
        self._data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        about = dict(attributes)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "srcset", "data")]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th") and self.tables[-1]:
            self.tables[-1][-1].append(about)
        self._data = tag == "script" and about.get("type") == "application/json"
        if self._data:
            self.data.append("")

    def handle_data(self, text: str) -> None:
        if self._data:
            self.data[-1] += text
        self.words.append(text)


def traced(path: Path, trace: list[tuple[float, int]], key: tuple[int, int] = (0, 0), **details: list) -> Path:
    """Give an image of a run a trace, and pixels that differ from patch to patch."""
    run = RunFolder(path)
    run.write_trace(key, trace, details or None)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path / "images" / f"{key[0]:05d}_{key[1]}.png")
    return path


def report(tmp_path: Path, *runs: Path, **settings: object) -> tuple[Page, list[dict[str, str]]]:
    """Return the page and the rows of the CSV beside it."""
    found = make_report(list(runs), tmp_path / "out", **settings)
    assert found == tmp_path / "out" / "report.html"
    return Page(found.read_text()), list(csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text())))


def checked(page: Page, rows: list[dict[str, str]]) -> set[str]:
    """Compare every number of the first table with the CSV; returns the columns that were compared."""
    head, *lines = page.tables[0]
    ok = [row for row in rows if row["status"] == "ok"]
    compared = set()
    for line, row in zip(lines[: len(ok)], ok, strict=True):
        for column, cell in zip(head, line, strict=True):
            assert cell["data-value"] == row.get(column["data-key"], ""), column  # of a dash there is no number
            compared.add(column["data-key"])
    return compared


# ---- the page


def test_the_page_needs_nothing_beside_it_and_has_the_numbers_of_the_csv(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    scores = {"fid": 3.25, "fid_extractor": "net abc", "kid": 0.01, "kid_std": 0.002, "clip_score": 31.5}
    found, rows = report(
        tmp_path,
        traced(ar(runs, metrics=scores), AR),
        traced(make(runs, "sjd", accepted=(1, 3, 4, 8), metrics=scores | {"fid": 3.5}), JUMPS),
        make(runs, "lantern", lossless=False, latency=3.0),
    )
    assert all(link.startswith(("data:", "#")) for link in found.links)
    assert len(found.links) > 8
    style = found.text[found.text.index("<style>") : found.text.index("</style>")]
    assert not re.search(r"url\(|@import", style)
    assert "default-src 'none'; img-src data:;" in found.text
    assert not re.search(r"https?://", found.text.replace("http://www.w3.org/2000/svg", ""))
    known = checked(found, rows)
    assert known >= {"label", "lossless", "n", "forwards_mean", "step_compression", "latency_s_median", "speedup"}
    assert known >= {"fid", "kid", "clip_score", "nll_per_token"}
    assert [row["lossless"] for row in rows] == ["True", "True", "False"]
    assert found.text.count('class="badge lossy"') >= 2  # in the table and in the image grid
    assert "pre>" not in found.text  # there is a race, so no command for one
    assert (tmp_path / "out" / "race.gif").is_file()


def test_prompts_labels_and_reasons_are_escaped(tmp_path: Path) -> None:
    path = traced(ar(tmp_path / "runs"), AR)
    file = path / "samples.jsonl"
    records = [json.loads(line) | {"prompt": EVIL} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    job = {"status": "failed", "reason": f"no {EVIL}", "overrides": ["decoder=sjd", f"x={EVIL}"]}
    found, rows = report(tmp_path, path, failed=[job])
    assert EVIL not in found.text
    assert '<script>alert("x")' not in found.text
    assert json.loads(found.data[0])["heats"][0]["prompt"] == EVIL
    assert html.escape(EVIL, quote=False) in found.text.replace("&#34;", '"')
    assert rows[-1]["reason"] == f"no {EVIL}"
    assert found.text.count("<script>") == 2  # the page's own


def test_one_run_without_traces_says_how_to_get_a_race(tmp_path: Path) -> None:
    found, rows = report(tmp_path, make(tmp_path / "runs", "sjd"))
    assert len(rows) == 1
    checked(found, rows)
    assert "python run.py model=toy decoder=sjd limit=4 trace=4 baseline=null runs_dir=runs/race" in found.text
    assert not found.data
    assert not (tmp_path / "out" / "race.gif").exists()


def test_failed_jobs_and_broken_folders_are_rows(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    broken = runs / "toy-broken"
    broken.mkdir(parents=True)
    (broken / "config.yaml").write_text("model: {}\n")
    job = {"status": "failed", "reason": "the device is out of memory", "overrides": ["decoder=scd", "batch_size=64"]}
    found, rows = report(tmp_path, ar(runs), broken, failed=[job])
    checked(found, rows)
    assert [row["status"] for row in rows] == ["ok", "failed", "failed"]
    assert "scd batch_size=64" in found.text
    assert "the device is out of memory" in found.text
    assert "toy-broken" in found.text
    alone, rows = report(tmp_path, failed=[job])
    assert "the device is out of memory" in alone.text
    assert len(rows) == 1


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make a run with: python run\.py"):
        make_report([], tmp_path)


def test_published_figures_stand_below_ours(tmp_path: Path) -> None:
    model = {"name": "lumina"}
    found, _ = report(tmp_path, ar(tmp_path / "runs", model=model), make(tmp_path / "runs", "sjd", model=model))
    values = {row.step_compression for row in select("lumina", {"sjd"}) if row.step_compression is not None}
    assert f"published {min(values):g} to {max(values):g}" in found.text
    assert "COCO2017 val (5k) (2510.08994, Table 1)" in found.text
    assert "Published numbers" in found.text


def test_a_table_of_the_paper_beside_ours(tmp_path: Path) -> None:
    found, _ = report(tmp_path, ar(tmp_path / "runs"), paper="Table 1")
    assert "SJD2 paper, Table 1 (ours: toy, not one of the paper&#39;s models)" in found.text


def test_windows_and_steps_become_an_ablation(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    paths = [
        make(runs, "sjd2", accepted=(1,) + (15 // steps,) * steps, parts={"window": window, "steps": steps})
        for window in (8, 16)
        for steps in (3, 5)
    ]
    found, _ = report(tmp_path, *paths)
    assert "Window and steps" in found.text
    grid = re.search(r'<table class="heat-table">.*?</table>', found.text, re.DOTALL)[0]
    assert [float(x) for x in re.findall(r"<td>([\d.]+)</td>", grid)] == [4.0, 4.0, 2.67, 2.67]
    without, _ = report(tmp_path, paths[0], ar(runs))
    assert "Window and steps" not in without.text
    another_seed = make(runs, "sjd2", seed=1, parts={"window": 16, "steps": 3})
    assert "Window and steps" not in report(tmp_path, paths[0], another_seed)[0].text


def test_two_tables_on_one_page(tmp_path: Path) -> None:
    found, rows = report(tmp_path, ar(tmp_path / "runs"), ar(tmp_path / "runs", law={"temperature": 0.5}))
    assert '<a href="#s1">' in found.text
    assert len({row["table"] for row in rows}) == 2


def test_a_heavy_page_gets_smaller_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = traced(ar(tmp_path / "runs"), AR)
    noise = np.random.default_rng(0).integers(0, 255, (640, 640, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path / "images" / "00000_0.png")
    large = len(report(tmp_path, path)[0].text)
    monkeypatch.setattr(page, "LIMIT", large - 1)
    assert len(report(tmp_path, path)[0].text) < 0.8 * large


def test_a_race_that_cannot_be_drawn_leaves_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(page, "write_gif", broken)
    monkeypatch.setitem(page.PARTS, "quality", broken)
    found, rows = report(tmp_path, traced(ar(tmp_path / "runs"), AR))
    checked(found, rows)
    assert found.data
    assert "Skipped quality: no font" in found.text


def test_unreadable_images_leave_the_numbers(tmp_path: Path) -> None:
    path = ar(tmp_path / "runs")
    (path / "images" / "00000_0.png").unlink()
    found, rows = report(tmp_path, path)
    checked(found, rows)
    assert "Skipped images: cannot read" in found.text


# ---- the race


def heats(*paths: Path) -> dict:
    (members,) = groups(read_runs(paths)[0])
    return race_json(make_race(members), 64)


def test_the_race_replays_the_traces(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    data = heats(traced(ar(runs), AR), traced(make(runs, "sjd"), JUMPS))
    assert (data["rows"], data["columns"]) == (4, 4)
    assert [lane["label"] for lane in data["lanes"]] == ["ar", "sjd"]
    base, ours = data["heats"][0]["lanes"]
    assert np.cumsum(ours["times"]) * UNIT == pytest.approx([0.25, 0.5, 0.75])
    assert np.cumsum(ours["cells"]).tolist() == [4, 8, 16]
    assert np.cumsum(base["times"])[-1] * UNIT == pytest.approx(1.5)
    assert ours["passes"] + len(ours["times"]) - 1 == 4  # all the passes of the record, the prefill the first
    assert base["passes"] + len(base["times"]) - 1 == 16
    assert "order" not in ours


def test_the_race_takes_the_prompts_that_most_runs_have_traced(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first = traced(traced(ar(runs), AR), AR, (1, 0))
    data = heats(first, traced(make(runs, "sjd"), JUMPS, (1, 0)), make(runs, "scd"))
    assert [heat["prompt"] for heat in data["heats"]] == ["a_shape 1 & <more>"]
    assert len(data["lanes"]) == 2


def test_forced_tokens_have_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sjd2.models.layout import TokenGrid
    from tests.helpers.toy_spec import ToySpec

    layout = TokenGrid(3, 3, 12, prefix=(20, 21), row_end=22, suffix=(23, 24))  # 2 + 3 x 4 + 2 = 16 tokens
    monkeypatch.setattr(ToySpec, "layout", layout)
    data = heats(traced(make(tmp_path / "runs", "sjd"), [(1.0, 2), (2.0, 6), (3.0, 9), (4.0, 16)]))
    assert np.cumsum(data["heats"][0]["lanes"][0]["cells"]).tolist() == [0, 3, 6, 9]


def test_rows_that_grow_at_once_keep_their_order(tmp_path: Path) -> None:
    rows = [[2, 1, 0, 0], [4, 3, 2, 1], [4, 4, 4, 4]]
    data = heats(traced(make(tmp_path / "runs", "zipar"), [(0.1, 3), (0.2, 10), (0.3, 16)], rows=rows))
    (lane,) = data["heats"][0]["lanes"]
    assert lane["order"] == [0, 1, 4, 2, 3, 5, 6, 8, 9, 12, 7, 10, 11, 13, 14, 15]
    assert np.cumsum(lane["cells"]).tolist() == [3, 10, 16]


def test_times_that_do_not_compare_are_named(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    paths = traced(ar(runs), AR), traced(make(runs, "sjd", hardware="Some GPU", threads=None, seed=3), JUMPS)
    notes = make_race(groups(read_runs(paths)[0])[0]).notes
    assert "Measured on Some CPU, 2 threads and on Some GPU, 2 images decoded together, float32." in notes[0]
    assert any("their times are not comparable" in note for note in notes)
    assert any("different seeds" in note for note in notes)
    alike = make_race(groups(read_runs(paths[:1])[0])[0]).notes
    assert not any(note.startswith("Warning") for note in alike)


def test_the_gif_is_the_race(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    report(tmp_path, traced(ar(runs), AR), traced(make(runs, "sjd"), JUMPS))
    path = tmp_path / "out" / "race.gif"
    assert path.stat().st_size < LIMIT
    with Image.open(path) as film:
        frames = []
        for number in range(film.n_frames):
            film.seek(number)
            frames.append((np.asarray(film.convert("RGB")), film.info["duration"]))
    seconds = sum(duration for _, duration in frames[:-1]) / 1000
    assert seconds == pytest.approx(1.5 / pace(1.5), rel=0.1)
    assert (frames[0][0] != frames[-1][0]).any()
    assert frames[-1][1] >= 2000


def test_a_gif_that_is_too_large_is_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [traced(ar(tmp_path / "runs"), AR)]
    race = make_race(groups(read_runs(paths)[0])[0])
    size = gif.write_gif(race, tmp_path / "a.gif").stat().st_size
    monkeypatch.setattr(gif, "LIMIT", size - 1)
    assert gif.write_gif(race, tmp_path / "b.gif").stat().st_size < size


def test_a_race_of_fitting_length_runs_in_real_time() -> None:
    assert [pace(seconds) for seconds in (0.8, 5.0, 100.0, 400.0)] == [0.1, 1, 10, 50]


@pytest.mark.parametrize(("count", "across"), [(1, 1), (5, 5), (6, 6), (7, 4), (8, 4)])
def test_lanes_in_rows_of_about_equal_length(count: int, across: int) -> None:
    assert in_a_row(count, 6) == across


# ---- trajectories and parts


def test_what_stood_at_each_position() -> None:
    table = draft_table([(0.1, 1), (0.2, 2), (0.3, 4)], [[7, 5, -1], [5, 6, 3], [-1, -1, -1]], 4)
    assert table.tolist() == [[-1, 7, 5, -1], [-1, -1, 5, 6], [-1] * 4]
    kinds = classes(table, np.array([9, 7, 5, 3]), [1, 2, 4])
    assert kinds.tolist() == [
        [COMMITTED, FINAL, FINAL, NOTHING],
        [COMMITTED, COMMITTED, FINAL, OTHER],
        [COMMITTED] * 4,
    ]
    changed = classes(np.array([[-1, 7], [-1, 6]]), np.array([1, 5]), [1, 1])
    assert changed[:, 1].tolist() == [OTHER, CHANGED]


def test_small_images_keep_every_pixel_and_large_ones_shrink() -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (48, 48, 3), dtype=np.uint8)

    def decoded(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(image_uri(image, 64).partition(",")[2]))))

    assert (decoded(pixels) == pixels).all()
    assert decoded(np.zeros((768, 512, 3), np.uint8)).shape == (64, 43, 3)


def test_axes_hold_their_values() -> None:
    for values in ([0.0], [3.0, 3.0], [-0.2, 0.3], [1e-4, 5e4]):
        found = axis("x", values, zero=True)
        assert all(0 <= found.place(value) <= 1 for value in values)
        assert 1 <= len(found.ticks) <= 8
    powers = axis("x", [0.004, 0.7], log=True)
    assert (powers.low, powers.high, powers.ticks) == (0.001, 1.0, (0.001, 0.01, 0.1, 1.0))


# ---- from the command line: traces as the decoders write them


@pytest.mark.full
def test_traces_of_real_decoders(cli: Cli) -> None:
    job = ("limit=2", "batch_size=2", "baseline=null")
    made = ("-m", "decoder=ar,scd", *job), ("decoder=zipar", "decoder.window_size=1", *job)
    assert all(cli(*command, "trace=2") == 0 for command in made), cli.out + cli.err
    for name in ("ar", "scd", "zipar"):
        run = cli.run(name)
        assert run.traces() == [(0, 0), (1, 0)]
        for record in run.records():
            key = (record["id"][0], record["id"][1])
            trace, details = run.trace(key)
            assert np.diff([committed for _, committed in trace]).tolist() == record["accepted"][2:]
            assert len(trace) == record["forwards"] - 1
            assert ("guesses" in details) == (name == "scd" and key == (0, 0))
            if "guesses" in details:
                follow(trace, details["guesses"], run.tokens(record))
            if name == "zipar":
                assert [sum(rows) for rows in details["rows"]] == [committed for _, committed in trace]
    assert cli("stage=report") == 0
    path = cli.runs_dir / "tables" / "all"
    assert cli.out.strip() == f"report: {path / 'report.html'}"
    found = Page((path / "report.html").read_text())
    assert "Token trajectories" in found.text
    data = json.loads(found.data[0])
    assert [lane["label"] for lane in data["lanes"]] == ["ar", "scd", "zipar"]
    assert [lane["lossless"] for lane in data["lanes"]] == [True, True, False]
    assert sorted(data["heats"][0]["lanes"][2]["order"]) == list(range(16))
    (sweep,) = (cli.runs_dir / "sweeps").iterdir()
    assert cli("stage=report", f"run_dir={sweep}") == 0
    assert (sweep / "report.html").is_file()
    tokens = [cli.run("scd").tokens(record).tolist() for record in cli.run("scd").records()]
    cli.runs_dir = cli.runs_dir.parent / "untraced"
    assert cli("decoder=scd", *job) == 0
    assert [cli.run("scd").tokens(record).tolist() for record in cli.run("scd").records()] == tokens


def follow(trace: list[tuple[float, int]], drafts: list[list[int]], tokens: np.ndarray) -> None:
    """Every token that a pass accepted was the draft token that the trace has for it; only the pass's last one was drawn."""
    seen = 0
    for (_, committed), row, (_, after) in zip(trace, drafts, trace[1:], strict=False):
        for place, draft in enumerate(row[: after - committed - 1]):
            assert draft in (-1, tokens[committed + place])  # -1: a slot that had just entered
            seen += draft >= 0
    assert seen


def test_the_stage_says_what_to_do(cli: Cli) -> None:
    assert cli("stage=report") == 1
    assert cli.err.strip().splitlines()[-1].startswith("error: no run folder in runs_dir=")
    assert "make one with: python run.py" in cli.err
