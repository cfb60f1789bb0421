"""The report in a real browser: nothing fails, nothing is asked of the network, the race runs, tables sort.

Needs Chromium or Chrome (`apt-get install chromium`), else these tests are skipped: `python -m pytest -m browser -n 0`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.run_folder import RunFolder
from sweeps.report.page import make_report
from tests.helpers.browser import BROWSER, Browser
from tests.helpers.table_runs import ar, make

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium"),
]

TRACES = {  # seconds, and tokens committed; the race is long enough to start in real time
    "ar": [(0.3 * step, step + 1) for step in range(1, 16)],
    "sjd": [(0.5, 4), (1.0, 8), (1.5, 16)],
}
HELP = """
    window.wait = (ms) => new Promise((done) => setTimeout(done, ms));
    window.race = document.querySelector(".race");
    window.find = (name) => race.querySelector(name);
    window.pixels = () => [...race.querySelectorAll("canvas")].map((canvas) => canvas.toDataURL()).join();
    window.clock = () => Number(find(".now").textContent);
    window.put = (name, value, event) => { find(name).value = value; find(name).dispatchEvent(new Event(event)); };
    window.table = document.querySelector("#table-0");
    window.order = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent.trim());
    undefined
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three runs, one of them lossy and without a trace, and a failed job."""
    root = tmp_path_factory.mktemp("report")
    paths = [
        ar(root / "runs", metrics={"fid": 3.0, "fid_extractor": "net"}),
        make(root / "runs", "sjd", metrics={"fid": 2.5, "fid_extractor": "net"}),
        make(root / "runs", "lantern", lossless=False, accepted=(1, 15)),
    ]
    for path, name in zip(paths, TRACES, strict=False):
        for image in range(4):
            pixels = np.random.default_rng(image).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / "images" / f"{image:05d}_0.png")
        for key in ((0, 0), (1, 0)):
            RunFolder(path).write_trace(key, TRACES[name], {"guesses": [[1, 2, -1]] * len(TRACES[name])})
    job = {"status": "failed", "reason": "the device is out of memory", "overrides": ["decoder=scd"]}
    return make_report(paths, root / "out", [job]).parent


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page(folder: Path, browser: Browser) -> Iterator[Browser]:
    """The report, opened anew; whatever a test does with it, it must not complain nor ask the network for anything."""
    browser.open(folder / "report.html")
    browser.run(HELP)
    yield browser
    assert browser.complaints == []
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "data"}
    assert len([url for url in browser.requests if url.startswith("file")]) == 1  # the page, and nothing beside it


def test_everything_is_there(page: Browser) -> None:
    assert page.run("[...document.images].filter((image) => !image.naturalWidth).length") == 0
    assert page.run("document.images.length") > 8
    assert page.run("document.documentElement.scrollWidth - innerWidth") <= 0
    named = "e.textContent.trim() || e.ariaLabel || e.closest('label')"
    assert page.run(f"[...document.querySelectorAll('button, select, input')].every((e) => {named})")
    assert page.run("document.querySelectorAll('svg').length") == 2
    assert page.run("document.querySelector('.staircases img').naturalHeight") == 16  # a row per position


def test_the_race_starts_when_it_is_seen_and_runs_in_real_time(page: Browser) -> None:
    page.run("race.scrollIntoView()")
    page.run("(async () => { while (clock() === 0) await wait(20); })()")
    assert page.run("find('.play').textContent") == "Pause"
    assert page.run("find('.pace').textContent") == "real time"
    # both clocks are read at a change of the one on the page
    measure = """(async () => {
        const next = async () => { const old = clock(); while (clock() === old) await wait(1); return performance.now(); };
        const [at, began] = [await next(), clock()];
        const early = pixels();
        await wait(800);
        const seconds = (await next() - at) / 1000;
        return [(clock() - began) / seconds, pixels() !== early];
    })()"""
    pace, moved = page.run(measure)
    assert pace == pytest.approx(1, abs=0.1)
    assert moved


def test_the_race_obeys_the_keys(page: Browser) -> None:
    page.run("race.scrollIntoView(); race.focus()")
    page.run("(async () => { while (clock() < 0.3) await wait(20); })()")
    page.press(" ")
    assert page.run("find('.play').textContent") == "Play"
    at, pixels = page.run("clock()"), page.run("pixels()")
    page.run("wait(300)")
    assert page.run("clock()") == at
    assert page.run("pixels()") == pixels
    for _ in range(5):
        page.press("ArrowRight")
    assert page.run("clock()") == pytest.approx(at + 5 * 4.5 / 50, abs=0.02)
    assert page.run("pixels()") != pixels
    for _ in range(5):
        page.press("ArrowLeft")
    assert page.run("pixels()") == pixels
    page.press("+")
    assert page.run("find('.rate-text').textContent") == "1.3×"
    page.press("r")
    page.run("wait(60)")
    assert page.run("find('.play').textContent") == "Pause"
    assert page.run("clock()") < at + 0.3


def test_the_race_obeys_its_controls_and_ends_as_it_was_measured(page: Browser) -> None:
    page.run("put('.seek', 0, 'input')")
    assert page.run("find('.play').textContent") == "Play"
    assert page.run("[...race.querySelectorAll('.passes')].map((passes) => passes.textContent)") == ["0", "0"]
    colours = """[...race.querySelectorAll("canvas")].map((canvas) => {
        const found = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return new Set(new Uint32Array(found.buffer)).size;
    })"""
    assert page.run(colours) == [1, 2]  # nothing is committed: blank, and what SJD has drafted
    page.run("put('.rate-slider', 1, 'input')")
    assert page.run("find('.pace').textContent") == "at 10× real time"
    page.run("find('.play').click()")
    page.run("(async () => { while (find('.play').textContent !== 'Play again') await wait(20); })()")
    read = "(name) => [...race.querySelectorAll('.lane')].map((lane) => lane.querySelector(name).textContent.trim())"
    end = {name: page.run(f"({read})('.{name}')") for name in ("who", "passes", "time", "rank", "rate")}
    assert end == {
        "who": ["ar", "sjd"],
        "passes": ["16", "4"],
        "time": ["in 4.50 s", "in 1.50 s"],
        "rank": ["2nd", "1st"],
        "rate": ["1.00 tokens per pass", "4.00 tokens per pass"],
    }
    assert page.run("find('.announcement').textContent") == "sjd finished first, in 1.50 seconds."
    final = page.run("pixels()")
    page.run("put('.heat', 1, 'change'); put('.seek', 1000, 'input')")
    page.run("wait(200)")
    assert page.run("pixels()") != final
    assert page.run("find('.full-prompt').textContent") == "a_shape 1 & <more>"


def test_the_finished_images_are_the_images_of_the_run(page: Browser, folder: Path) -> None:
    page.run("put('.seek', 1000, 'input')")
    page.run("wait(200)")
    shown = page.run(
        "(() => { const canvas = find('canvas');"
        "const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
        "return [canvas.width / 32, [...all.data]]; })()"
    )
    scale, values = int(shown[0]), np.array(shown[1], np.uint8)
    shown = values.reshape(32 * scale, 32 * scale, 4)[scale // 2 :: scale, scale // 2 :: scale, :3]
    made = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    assert (shown == made).all()


def test_the_table_has_the_numbers_of_the_csv_and_sorts(page: Browser, folder: Path) -> None:
    with (folder / "table.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "ok"]
    shown = page.run(
        "[...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => [table.tHead.rows[0]"
        ".cells[cell.cellIndex].dataset.key, cell.dataset.value, cell.innerText.trim()]))"
    )
    for row, cells in zip(rows, shown, strict=True):
        for key, value, text in cells:
            assert value == row[key], key
            if key in ("forwards_mean", "step_compression", "speedup", "fid") and value:
                assert float(re.match(r"[\d.]+", text)[0]) == pytest.approx(float(value), abs=0.05)
    assert page.run("order()") == ["ar", "sjd", "lantern"]
    press = "table.querySelector('[data-key={}] button').click()"
    page.run(press.format("step_compression"))
    assert page.run("order()") == ["lantern", "sjd", "ar"]
    page.run(press.format("step_compression"))
    assert page.run("order()") == ["ar", "sjd", "lantern"]
    page.run(press.format("fid"))
    assert page.run("order()") == ["ar", "sjd", "lantern"]  # 3.0, 2.5; without a score: last
    page.run(press.format("fid"))
    assert page.run("order()") == ["sjd", "ar", "lantern"]
    assert page.run("[...table.querySelectorAll('[aria-sort]')].map((e) => [e.dataset.key, e.ariaSort])") == [
        ["fid", "ascending"]
    ]
    assert page.run("table.tBodies[1].innerText").split() == [
        "scd",
        "failed:",
        "the",
        "device",
        "is",
        "out",
        "of",
        "memory",
    ]


def test_without_motion_it_stands_at_its_end_until_it_is_asked(browser: Browser, folder: Path) -> None:
    browser.open(folder / "report.html", media={"prefers-reduced-motion": "reduce"})
    browser.run(HELP)
    browser.run("race.scrollIntoView()")
    browser.run("wait(300)")
    assert browser.run("[clock(), find('.play').textContent]") == [4.5, "Play again"]
    assert browser.run("race.querySelectorAll('.lane.done').length") == 2
    browser.run("find('.play').click()")
    browser.run("wait(300)")
    assert 0 < browser.run("clock()") < 4


@pytest.mark.parametrize("width", [390, 820, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots(browser: Browser, folder: Path, width: int, scheme: str) -> None:
    browser.open(folder / "report.html", width=width, height=900, media={"prefers-color-scheme": scheme})
    assert browser.run("document.documentElement.scrollWidth") <= width
    path = browser.screenshot(folder / f"{scheme}-{width}.png")
    with Image.open(path) as image:
        assert image.size == (width, 900)
        pixels = np.asarray(image.convert("L"))
    assert len(np.unique(pixels)) > 60
    assert np.median(pixels) < 60 if scheme == "dark" else np.median(pixels) > 200
    assert browser.complaints == []
