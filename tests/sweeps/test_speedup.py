"""Speed-ups: their intervals cover the truth, timings taken in turns cancel what slows both, and disturbed ones are blank."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation.bootstrap import median_of_ratios, ratio_of_medians
from evaluation.run_folder import RunFolder
from sweeps.comparable import groups, table_machine
from sweeps.compare.group import compare_folders
from sweeps.compare.pair import compare_pair
from sweeps.report.page import make_section
from sweeps.runs import read_runs
from sweeps.speedup import SpeedUp, speed_up
from sweeps.tables import figures
from tests.helpers.table_runs import ar, cells, make, table

TRUTH = 1.6
DISTURBED = {
    "cpu": ({"cpu_share": 0.52}, "got only 52 % of its CPU"),
    "shared": ({"gpu_shared": 0.4}, "shared its GPU for 40 % of the time"),
    "hot": ({"gpu_throttled": 0.3}, "had a throttled GPU for 30 % of the time"),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "draw_plots", lambda *_args, **_settings: figures.Plots())


def drifting(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds of AR and of a decoder TRUTH times as fast, on a machine whose speed changes from batch to batch."""
    drift = np.exp(0.3 * rng.normal(size=n))
    return TRUTH * drift * np.exp(0.02 * rng.normal(size=n)), drift * np.exp(0.06 * rng.normal(size=n))


@pytest.mark.parametrize("n", [8, 24])
def test_the_intervals_cover_the_truth(n: int) -> None:
    rng, hits, widths = np.random.default_rng(n), np.zeros(2), np.zeros(2)
    for trial in range(200):
        slow, fast = drifting(rng, n)
        ones = [1] * n
        in_turns = median_of_ratios(list(zip(slow, fast, ones, strict=True)), replicates=500, seed=trial)
        sides = (list(zip(side, ones, strict=True)) for side in (slow, rng.permutation(fast)))
        for i, (_, low, high) in enumerate((in_turns, ratio_of_medians(*sides, replicates=500, seed=trial))):
            assert low is not None
            assert high is not None
            hits[i] += low <= TRUTH <= high
            widths[i] += high - low
    assert (hits >= 0.92 * 200).all()
    assert widths[0] < widths[1] / 2  # the drift cancels in a pair


def test_one_timing_has_no_interval() -> None:
    assert ratio_of_medians([(3.0, 4)], [(2.0, 4)]) == (1.5, None, None)
    assert median_of_ratios([(3.0, 2.0, 4)]) == (1.5, None, None)
    assert SpeedUp(1.5, None, None, 4, 1, False).text() == "1.50×"


def test_timings_in_turns_are_compared_pair_by_pair(tmp_path: Path) -> None:
    slow, fast = drifting(np.random.default_rng(1), 12)
    turns = {"turns": "t"}
    runs = [
        ar(tmp_path, n=24, latency=slow.tolist(), launch=turns),
        make(tmp_path, "sjd", n=24, latency=fast.tolist(), launch=turns),
    ]
    text, rows = table(tmp_path, *runs)
    found = {key: float(rows[1][f"speedup{key}"]) for key in ("", "_low", "_high")}
    assert found[""] == pytest.approx(np.median(slow / fast))
    assert found["_low"] < TRUTH < found["_high"] < found["_low"] + 0.3
    assert (rows[1]["speedup_in_turns"], rows[1]["speedup_timings"], rows[1]["speedup_images"]) == ("True", "12", "24")
    assert "not timed in turns" not in text
    assert cells(text, "sjd")["speed-up"] == f"{found['']:.2f}× [{found['_low']:.2f}, {found['_high']:.2f}]"
    apart = make(tmp_path, "scd", n=24, latency=fast.tolist(), launch={"turns": "another"})
    text, rows = table(tmp_path, *runs, apart)
    assert rows[1]["speedup_in_turns"] == "False"
    assert "Warning: scd and AR were not timed in turns" in text
    pair, numbers = (
        compare_pair((runs[0], runs[1]), tmp_path / "two"),
        json.loads((tmp_path / "two/two.json").read_text()),
    )
    assert numbers["speedup"] == pytest.approx(found[""])
    assert f"Speed-up of B over A: {found['']:.2f}×" in pair


@pytest.mark.parametrize("who", ["ar", "sjd"])
@pytest.mark.parametrize("reason", DISTURBED)
def test_a_disturbed_launch_blanks_the_speedup_everywhere(tmp_path: Path, reason: str, who: str) -> None:
    entry, words = DISTURBED[reason]
    paths = [ar(tmp_path, n=16), make(tmp_path, "sjd", n=16)]
    RunFolder(paths[who == "sjd"]).close_launch(0, entry)
    RunFolder(paths[who == "ar"]).close_launch(0, {"cpu_share": 0.99})
    sentence = f"{who} {words}; retime=true in the command that made it times it again, when the machine is quieter"
    text, rows = table(tmp_path, *paths)
    assert (cells(text, "sjd")["speed-up"], rows[1].get("speedup", "")) == ("–", "")
    assert f"no speed-up for sjd: {sentence}" in text
    assert f"timings of {who} are inflated: the process {words}." in text
    (group,) = groups(read_runs(paths)[0])
    section = make_section(group)
    assert not any("speed of AR" in what for _, what, _ in section.tiles)
    assert any(sentence in note for note in section.notes)
    grouped = compare_folders(paths, tmp_path / "group")
    assert f"No speed-up for sjd: {sentence}." in grouped
    (group,) = json.loads((tmp_path / "group/compare.json").read_text())
    assert "speedup" not in group["against_ar"][0]
    assert f"latency: {sentence}" in compare_pair((paths[0], paths[1]), tmp_path / "two")
    assert "speedup" not in json.loads((tmp_path / "two/two.json").read_text())


def test_two_disturbed_runs_share_a_sentence(tmp_path: Path) -> None:
    paths = [ar(tmp_path, n=16), make(tmp_path, "sjd", n=16)]
    both = "times both again, when the machine is quieter."
    for path, share in zip(paths, (0.27, 0.26), strict=True):
        RunFolder(path).close_launch(0, {"cpu_share": share})
    text, _ = table(tmp_path, *paths)
    reason = "sjd got only 26 % and ar only 27 % of its CPU; retime=true in the command that made them"
    assert f"no speed-up for sjd: {reason} {both}" in text
    RunFolder(paths[0]).close_launch(0, {"cpu_share": 0.9, "gpu_shared": 0.4})
    text, _ = table(tmp_path, *paths)
    reason = "sjd got only 26 % of its CPU and ar shared its GPU for 40 % of the time; retime=true"
    assert f"{reason} in the command that made them {both}" in text


@pytest.mark.parametrize("entry", [{"cpu_share": 0.81}, {"gpu_shared": 0.05}, {"gpu_throttled": 0.01}])
def test_small_disturbances_blank_nothing(tmp_path: Path, entry: dict) -> None:
    _, rows = table(tmp_path, ar(tmp_path), make(tmp_path, "sjd", launch=entry))
    assert float(rows[1]["speedup"]) == 3


def test_a_retiming_replaces_disturbed_timings(tmp_path: Path) -> None:
    """The newest timings count: those of AR that this decoder took turns with, though another one's are newer."""
    paths = [ar(tmp_path, n=16, launch={"cpu_share": 0.3}), make(tmp_path, "sjd", n=16)]
    for session, sides in (("first", (8.0, 2.0)), ("second", (9.0, None))):
        for path, seconds in zip(paths, sides, strict=True):
            run = RunFolder(path)
            entry = {"hardware": "Some CPU, 2 threads", "threads": 2, "turns": session, "retime": session}
            entry |= {"retimed": True}
            if seconds is not None:
                number = run.launch(entry)
                parts = {"encode": 0.0, "prefill": 0.0, "decode": seconds, "image": 0.0}
                lines = [{"launch": number, "batch": i // 2, "batch_rows": 2, "seconds": parts} for i in range(12)]
                run.append_timings(*({"id": [i, 0], **line} for i, line in enumerate(lines)))
    text, rows = table(tmp_path, *paths)
    assert (rows[0]["latency_s_median"], rows[1]["latency_s_median"]) == ("9.0", "2.0")
    assert (rows[1]["speedup"], rows[1]["speedup_in_turns"], rows[1]["n_timed"]) == ("4.0", "True", "12")
    assert "inflated" not in text
    assert "were not timed again" in text
    runs, _ = read_runs(paths)
    found = speed_up(runs[1], runs[0], table_machine(runs))
    assert isinstance(found, SpeedUp)
    assert (found.low, found.high, found.timings) == (4.0, 4.0, 6)


def test_each_seed_is_compared_with_the_ar_run_it_took_turns_with(tmp_path: Path) -> None:
    paths = []
    for seed, seconds in ((0, 4.0), (1, 8.0)):
        launch = {"turns": f"of seed {seed}"}
        paths += [ar(tmp_path, n=16, seed=seed, latency=[seconds] * 16, launch=launch)]
        paths += [make(tmp_path, "sjd", n=16, seed=seed, latency=[seconds / 2] * 16, launch=launch)]
    text, rows = table(tmp_path, *paths)
    found = [(row["speedup"], row["speedup_in_turns"]) for row in rows if row["decoder"] == "sjd"]
    assert found == [("2.0", "True")] * 2
    assert "not timed in turns" not in text


def test_the_hero_number_counts_draft_passes_and_has_an_interval(tmp_path: Path) -> None:
    drafts = make(tmp_path, "eagle", n=8, drafts=12)  # 4 tokens per target pass, 1 per pass
    plain = make(tmp_path, "scd", n=8, accepted=(1, 3, 3, 4, 5))
    (group,) = groups(read_runs([ar(tmp_path, n=8), drafts, plain])[0])
    value, what, who = make_section(group).tiles[0]
    assert (value, who) == ("3.20 [3.20, 3.20]", "scd")
    assert "draft network counted too" in what
