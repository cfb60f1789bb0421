"""Tables of run folders: comparisons that must not be made, the notes that name them, and published numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.run_folder import RunFolder
from sweeps.runs import with_baselines
from sweeps.tables import figures, published
from tests.helpers.runs import forget_likelihood
from tests.helpers.table_runs import TOKENS, ar, cells, make, table


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no plots in tests about numbers."""
    if "with_plots" not in request.fixturenames:
        monkeypatch.setattr(figures, "draw_plots", lambda *_args, **_settings: figures.Plots())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch_size": 4}, "batch_size"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"refill": True}, "refill"),
        ({"law": {"sampler": "gumbel"}}, "sampler"),
        ({"hardware": "Another CPU, 2 threads"}, "hardware, threads or images"),
        ({"threads": 8}, "hardware, threads or images"),
    ],
)
def test_no_speedup_against_an_ar_run_of_other_settings(tmp_path: Path, change: dict, reason: str) -> None:
    text, rows = table(tmp_path, ar(tmp_path / "runs"), make(tmp_path / "runs", "sjd", **change))
    ours = next(row for row in rows if row["decoder"] == "sjd")
    assert ours["speedup"] == ""
    assert f"the nearest AR run differs in {reason}." in text
    label = ours["label"]
    assert cells(text, label)["speed-up"] == "–"
    assert cells(text, label)["NLL/token (Δ to AR)"].startswith(
        "2.0"
    )  # the prompts are the same, so this still compares


def test_the_right_ar_run_is_chosen(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    fast = ar(runs, batch_size=4, latency=100.0)
    _, rows = table(tmp_path, fast, ar(runs), make(runs, "sjd"), make(runs, "sjd", batch_size=4))
    found = {(row["decoder"], row["batch_size"]): row["speedup"] for row in rows}
    assert float(found["sjd", "2"]) == 3
    assert float(found["sjd", "4"]) == pytest.approx(100.5 / 1.5)


def test_times_come_from_one_hardware_only(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    other = make(runs, "scd", hardware="Another CPU, 2 threads")
    text, rows = table(tmp_path, ar(runs), make(runs, "sjd"), other)
    ours = next(row for row in rows if row["decoder"] == "scd")
    assert (ours["latency_s_median"], ours["images_per_s"], ours["hardware"], ours["n_timed"]) == ("", "", "", "0")
    assert cells(text, "scd")["latency s"] == ""
    assert "timings of scd cover 0 images" in text


def test_a_run_resumed_on_other_hardware_is_timed_on_the_common_part(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    path = make(runs, "sjd", n=2)
    run = RunFolder(path)
    launch = run.launch({"hardware": "Another CPU", "threads": 2})
    for i, record in ((2, run.records()[0]), (3, run.records()[1])):
        run.append(record | {"id": [i, 0], "launch": launch, "seconds": dict.fromkeys(record["seconds"], 0.001)})
    text, rows = table(tmp_path, ar(runs), path)
    ours = rows[1]
    assert (ours["n"], ours["n_timed"], ours["speedup_images"]) == ("4", "2", "2")
    assert float(ours["latency_s_median"]) == 1
    assert float(ours["speedup"]) == 4  # the first two images of both
    assert "timings of sjd cover 2 images" in text


def test_traced_images_count_in_no_time(tmp_path: Path) -> None:
    path = make(tmp_path / "runs", "sjd")
    RunFolder(path).write_trace((3, 0), [(0.1, 16)])
    _, rows = table(tmp_path, path)
    assert rows[0]["n_timed"] == "3"
    assert float(rows[0]["latency_s_median"]) == 1


def test_a_likelihood_that_is_missing_is_averaged_nowhere(tmp_path: Path) -> None:
    runs, lossy = tmp_path / "runs", make(tmp_path / "runs", "sjd")
    forget_likelihood(RunFolder(lossy), 2)
    text, rows = table(tmp_path, ar(runs), lossy)
    assert cells(text, "sjd")["NLL/token (Δ to AR)"] == "–"
    assert (rows[1]["nll_per_token"], rows[1].get("nll_per_token_difference", "")) == ("", "")
    assert "Warning: sjd: no NLL, since that of 1 images was not finite" in text
    assert rows[0]["nll_per_token"]


def test_different_n_are_compared_on_the_common_images(tmp_path: Path) -> None:
    text, rows = table(tmp_path, ar(tmp_path / "runs", n=3), make(tmp_path / "runs", "sjd", n=6, nll=40.0))
    ours = rows[1]
    assert (ours["speedup_images"], ours["n_compared"]) == ("3", "3")
    assert cells(text, "sjd")["NLL/token (Δ to AR)"].endswith("(+0.500 [–])")  # three prompts give no interval
    assert float(ours["speedup"]) == 4  # of 4, 4, 5 and 1, 1, 2
    assert float(ours["nll_per_token_difference"]) == pytest.approx(8 / TOKENS)
    assert "Warning: runs have different N (3, 6)" in text


def test_different_extractors_are_named(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    a = ar(runs, metrics={"fid": 1.0, "fid_extractor": "net a"})
    text, _ = table(tmp_path, a, make(runs, "sjd", metrics={"fid": 2.0, "fid_extractor": "net b"}))
    assert cells(text, "sjd")["FID ↓"] == "2.00 (net b)"
    assert "FID and KID with different extractors are not comparable" in text


def test_an_adapter_is_marked_and_ar_with_it_preferred(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    ours = make(runs, "sjd2", model={"adapter": "weights/sjd2"})
    text, rows = table(tmp_path, ar(runs), ours)
    assert cells(text, "sjd2")["speed-up"] == "3.00×† [2.00, 5.00]"
    assert "the same model without one" in text
    text, rows = table(tmp_path, ar(runs), ours, ar(runs, model={"adapter": "weights/sjd2"}, latency=9.0))
    row = next(row for row in rows if row["decoder"] == "sjd2")
    assert float(row["speedup"]) == pytest.approx(9.5 / 1.5)
    assert "†" not in text


@pytest.mark.parametrize("change", [{"law": {"temperature": 0.5}}, {"prompts": "p2"}, {"model": {"rows": 8}}])
def test_what_does_not_compare_stands_in_two_tables(tmp_path: Path, change: dict) -> None:
    text, rows = table(tmp_path, ar(tmp_path / "runs"), make(tmp_path / "runs", "sjd", **change))
    assert text.count("| decoder |") == 2
    assert all(row["speedup"] == "" for row in rows if row["decoder"] == "sjd")
    assert "no speed-up for sjd: no AR baseline found." in text


def test_baselines_beside_runs_are_found(tmp_path: Path) -> None:
    base, ours = ar(tmp_path), make(tmp_path, "sjd")
    ar(tmp_path, seed=7)
    assert with_baselines([ours]) == [ours.resolve(), base.resolve()]


def test_published_figures_are_read() -> None:
    rows = published.read()
    assert len(rows) > 200
    first = rows[0]
    assert (first.method, first.steps, first.step_compression, first.latency_s, first.fid) == (
        "AR",
        2357,
        1.0,
        None,
        30.8,
    )
    found = published.select("lumina", ["sjd2"])
    assert {row.model for row in found} <= {row.model for row in rows if row.model.startswith("Lumina")}
    assert any(row.step_compression == 4.02 and row.fid == 31.4 for row in found)
    assert not any("single prompt" in row.dataset or row.method.startswith("SJD +") for row in found)
    assert published.select("tiny", ["sjd2"]) == []
    assert not any("2.0" in row.model for row in published.select("lumina", ["ar", "sjd"]))
    assert {row.latency_s for row in published.select("lumina2", ["ar", "sjd"])} == {694, 324}
    assert {row.geneval_overall for row in published.select("simplear-1.5b", ["ar"])} >= {0.61, 0.63}


def test_published_figures_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    ours = make(tmp_path / "runs", "sjd2", model={"name": "lumina"})
    text, rows = table(tmp_path, ours, published=True)
    assert "| SJD2 | Lumina-mGPT (768 px) | COCO2017 val (5k) | 592 | 4.02 |" in text
    assert "context, not rows to subtract from" in text
    assert len(rows) == 1  # the CSV holds our runs only
    text, _ = table(tmp_path, make(tmp_path / "runs", "sjd2"), published=True)
    assert "has no numbers for this model" in text
