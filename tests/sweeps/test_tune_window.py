"""stage=tune tune=window: what is predicted, what is run, what is handed out."""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np
import pytest
import yaml

from evaluation.run_folder import run_folders
from sweeps.tune import window_search
from sweeps.tune.window_prediction import (
    Acceptance,
    Counts,
    TuneWindow,
    batch_overhead,
    expected_passes,
    predicted_passes,
)
from tests.helpers.cli import Cli

LENGTH = 60
SMALL = ("stage=tune", "tune=window", "decoder=scd", "tune.images=4", "tune.finals=4", "tune.rounds=1", "tune.passes=2")


def test_expected_passes_are_those_of_a_simulation() -> None:
    rates, rng = np.array([0.6, 0.9, 0.3]), np.random.default_rng(0)
    taken = []
    for _ in range(1000):
        left, passes = LENGTH - 1, 0
        while left > 0:
            hits = rng.random(3) < rates
            left -= 1 + int(np.cumprod(hits).sum())
            passes += 1
        taken.append(passes)
    assert expected_passes(rates, LENGTH) == pytest.approx(np.mean(taken), abs=4 * np.std(taken) / 1000**0.5)
    assert expected_passes(np.array([]), LENGTH) == LENGTH - 1  # AR
    assert expected_passes(np.ones(LENGTH), LENGTH) == 1


def counted(truth: Acceptance, depth: int) -> Counts:
    """Return what a long run would count if draft tokens fared as `truth` says."""
    passes = predicted_passes(truth, depth, LENGTH)
    accepted = passes * np.cumprod(truth.rates(depth, (LENGTH - 1) / passes))
    return Counts(np.concatenate([[passes], accepted[:-1]]), accepted, passes)


def test_two_runs_tell_depth_and_waiting_apart() -> None:
    settled = np.linspace(0.6, 0.9, 40)
    truth = Acceptance(settled, fresh=0.1, shortfall=0.55, speed=0.7)
    found = Acceptance.fit(counted(truth, 40), counted(truth, 7), length=LENGTH, free=1.0)
    for depth in (3, 5, 11, 23):
        passes = predicted_passes(truth, depth, LENGTH)
        assert predicted_passes(found, depth, LENGTH) == pytest.approx(passes, rel=0.03)
        # what the wide run alone would say of a narrow window
        alone = Acceptance(found.settled, fresh=1.0, shortfall=0.0, speed=1.0)
        assert depth > 5 or predicted_passes(alone, depth, LENGTH) < 0.85 * passes
    forced = Acceptance(settled, fresh=0.1, shortfall=0.55, speed=0.7, free=0.5)
    assert predicted_passes(forced, 7, LENGTH) < predicted_passes(truth, 7, LENGTH)


def test_a_batch_waits_for_its_slowest_row() -> None:
    records = [
        {"batch": batch, "forwards": forwards + 1, "seconds": {"prefill": 0.5}}
        for batch, forwards in ((0, 10), (0, 30), (1, 20), (1, 20))
    ]
    assert batch_overhead(records, refill=False) == (pytest.approx((1.5 + 1) / 2), 0.5)
    assert batch_overhead(records, refill=True) == (1.0, 0.0)
    assert TuneWindow(name="w", widths=[2, 4], images=5, finals=24).whole_batches(4) == (8, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("decoder=zipar",), "tune=window varies decoder.window, which decoder=zipar does not have"),
        (("decoder=ar",), "tune=window varies decoder.window, which decoder=ar does not have"),
        (("tune.widths=[8]",), "tune.widths must be two or more windows of 2 or more"),
        (("tune.widths=[99,77]", "decoder.window=4"), "needs windows that differ in reach"),
        (("tune.finals=5000",), "tune=window runs 4 + 5000 captions at batch_size=4"),
        (("tune.rounds=0",), "tune.rounds must be 1 or more"),
    ],
)
def test_wrong_settings_are_one_sentence_before_anything_loads(
    cli: Cli, arguments: tuple[str, ...], words: str
) -> None:
    given = {word.partition("=")[0] for word in arguments}
    assert cli(*(word for word in SMALL if word.partition("=")[0] not in given), *arguments) == 1
    assert words in cli.err
    assert "weights are loaded" not in cli.out


@pytest.mark.full
def test_a_search_predicts_checks_and_writes_the_best_window(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def cost(model: Any, decoder: Any, condition: Any, **more: Any) -> float:
        """Wide passes are free, so that the widest window is the best."""
        calls.append(decoder.window)
        return 0.01

    monkeypatch.setattr(window_search, "pass_seconds", cost)
    fast = {3: 2.0, 5: 1.0, 9: 0.5}
    monkeypatch.setattr(
        window_search.WindowSearch,
        "latencies",
        lambda self, run: dict.fromkeys(range(8), fast[run.config.decoder.window]),
    )
    busy = ["got only 20 % of its CPU"]
    monkeypatch.setattr(window_search, "disturbance", lambda launches: busy[0] if launches else "")
    command = (*SMALL, "tune.widths=[3,5,9,99]", "decoder.window=3", "batch_size=2", "limit=2")
    assert cli(*command) == 0, cli.err
    assert "window 99 is left out" in cli.out
    assert calls == [1, 3, 5, 9]
    out = cli.runs_dir / "tune-window"
    with (out / "windows.csv").open(newline="") as file:
        rows = {int(row["window"]): row for row in csv.DictReader(file)}
    assert list(rows) == [1, 3, 5, 9]
    assert float(rows[1]["passes"]) == 15  # of 16 tokens, AR's first one is the prefill's
    assert float(rows[9]["passes"]) < float(rows[3]["passes"]) < 15
    assert rows[1]["tokens_per_s_measured"] == ""
    assert [rows[w]["time_to_own"] for w in (3, 5, 9)] == ["", "0.5", "0.25"]
    text = (out / "windows.md").read_text()
    assert "| 3 (own) |" in text
    assert "timings of window 9 are inflated: the process got only 20 % of its CPU." in text
    assert f"window 9 looks best, but timings are inflated: remove {out}" in cli.out
    file = out / "decoder" / "scd-b2.yaml"
    assert not file.exists()
    assert json.loads((out / "passes.json").read_text())

    # once more: nothing is measured or made again
    made = {path.name: path.stat().st_mtime_ns for path in run_folders(out / "runs")}
    calls.clear()
    busy[0] = ""
    assert cli(*command) == 0, cli.err
    assert calls == []
    assert {path.name: path.stat().st_mtime_ns for path in run_folders(out / "runs")} == made
    assert "best window: 9, 0.250 [0.250, 0.250] of the time with 3" in cli.out
    assert yaml.safe_load(file.read_text())["window"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 16])
def test_the_prediction_for_the_embedded_model(cli: Cli, batch: int) -> None:
    """Passes of 16 images vary by 3 % on each side: four standard errors; seconds of a busy machine by a factor of two."""
    command = (
        *SMALL[:3],
        "model=tiny",
        f"batch_size={batch}",
        "tune.widths=[4,8,16,32,64]",
        "tune.rounds=2",
        "tune.images=16",
    )
    assert cli(*command, "tune.finals=16", "tune.checked=4") == 0, cli.err
    print(cli.out)
    with (cli.runs_dir / "tune-window" / "windows.csv").open(newline="") as file:
        run = [row for row in csv.DictReader(file) if row["tokens_per_s_measured"]]
    assert len(run) >= 4
    for row in run:
        assert float(row["passes"]) == pytest.approx(float(row["passes_measured"]), rel=0.12)
        assert 0.5 < float(row["tokens_per_s_predicted"]) / float(row["tokens_per_s_measured"]) < 2
