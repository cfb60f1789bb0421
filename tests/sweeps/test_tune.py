"""stage=tune: what is searched, what a cut search keeps, what it hands out."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
import yaml

from evaluation.run_folder import RunFolder
from sjd2.errors import UserError
from sweeps.tune import search as tune
from sweeps.tune import space as spaces
from sweeps.tune import study as studies
from sweeps.tune.verdict import amount
from tests.helpers.cli import Cli

SMALL = (
    *("stage=tune", "tune=scd", "decoder=scd", "tune.objective=passes", "tune.quality=nll", "tune.prompts=4"),
    *("tune.judge=4", "tune.early=2", "tune.random_trials=2", "tune.finals=4"),
)
# at this temperature many draft tokens are accepted, so a window of 1, which is AR, is beaten beyond noise
BEATEN = (*SMALL, "temperature=0.1", "decoder.window=1", "tune.space.decoder.window.high=16")


def test_a_space_is_flat_and_its_ranges_are_checked() -> None:
    nested = {"decoder": {"window": {"low": 2, "high": 8}, "refiner": {"coupling": ["gumbel", "maximal"]}}}
    assert spaces.flatten_space(nested) == {
        "decoder.window": {"low": 2, "high": 8},
        "decoder.refiner.coupling": ["gumbel", "maximal"],
    }
    for space, words in (
        ({}, "empty"),
        ({"decoder.window": [16]}, "two choices"),
        ({"decoder.window": {"low": 8, "high": 8}}, "low < high"),
        ({"decoder.window": {"low": 1, "high": 8, "steps": 2}}, "low and high"),
        ({"decoder.window": 16}, "list of choices"),
        ({"decoder.window": {"low": "a", "high": "b"}}, "range of numbers"),
        ({"decoder.window": {"low": 0, "high": 8, "log": True}}, "low > 0"),
        ({"decoder.window": {"low": 1, "high": 8, "step": 2, "log": True}}, "without step"),
        ({"decoder.window": {"low": 1, "high": 8, "step": 0}}, "a step between"),
    ):
        with pytest.raises(UserError, match=words):
            spaces.Tune(name="x", space=space)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"objective": "speed"}, "latency, passes"), ({"trials": 0}, "1 or more"), ({"hopeless": 1.0}, "more than 1")],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        spaces.Tune(name="x", space={"a": [1, 2]}, **settings)


def study_of(points: list[tuple[float, float, float]]) -> optuna.Study:
    """Make a study of trials (objective, quality, violation)."""
    study = optuna.create_study(directions=["minimize", "minimize"])
    for objective, quality, violation in points:
        study.add_trial(
            optuna.trial.create_trial(
                values=[objective, quality],
                user_attrs={"violation": violation, "run": "r", "lossless": True, "overrides": []},
            )
        )
    return study


def test_the_best_is_the_fastest_within_the_bound_and_the_front_is_brute_force() -> None:
    points = [(3.0, 0.0, 0.0), (1.0, 0.9, 0.5), (2.0, 0.1, -0.1), (2.5, 0.1, 0.0), (2.0, 0.3, 0.0)]
    study = study_of(points)
    assert studies.best_trial(study).values == [2.0, 0.1]
    beaten = {
        b for a, b in itertools.permutations([p[:2] for p in points], 2) if a[0] <= b[0] and a[1] <= b[1] and a != b
    }
    assert {tuple(t.values) for t in studies.pareto_trials(study)} == {p[:2] for p in points} - beaten
    assert studies.best_trial(study_of([(1.0, 1.0, 0.1)])) is None


def test_the_own_settings_are_no_trial_for_the_sampler_and_are_beaten_or_not() -> None:
    settings = spaces.Tune(name="x", space={"a": [1, 2]}, objective="passes")
    study = study_of([(3.0, 0.0, 0.0), (1.0, 0.9, 0.5)])  # the faster one is beyond the bound
    kept = {"violation": -1.0, "run": "r", "lossless": True, "overrides": [], "over": False}
    studies.add_own_trial(study, (2.0, 0.0), kept)
    assert studies.best_objective(study) == 2.0
    assert studies.best_trial(study).values[0] == 3.0
    assert len(studies.complete(study)) == 2
    assert len(studies.counted(study)) == 3
    assert studies.nothing_better(study, settings) == "2 passes per image, and the best of 2 other trials has 3"
    assert studies.trial_line(studies.own_trial(study), settings).startswith("the decoder's own settings: 2 passes")
    study.add_trial(study_of([(1.5, 0.0, 0.0)]).trials[0])
    assert studies.nothing_better(study, settings) is None
    none = study_of([(1.0, 0.9, 0.5)])
    studies.add_own_trial(none, (2.0, 0.0), kept | {"few": True})
    assert studies.trial_line(studies.own_trial(none), settings).endswith("kid –")
    assert "none of 1 other trials is within tune.bound=0.02" in studies.nothing_better(none, settings)


def test_an_amount_is_less_or_more() -> None:
    assert amount(0.477, 0.558, "latency") == "14.5 % less time"
    assert amount(0.8, 0.6, "latency") == "33.3 % more time"
    assert amount(35.26, 36.49, "passes") == "3.4 % fewer passes"


def test_a_cut_search_tries_again_what_it_had_in_hand(tmp_path: Path) -> None:
    settings = spaces.Tune(name="x", space={"a": {"low": 0, "high": 9}})
    study = studies.open_study(tmp_path, settings)
    study.tell(study.ask({"a": optuna.distributions.IntDistribution(0, 9)}), (1.0, 0.0))
    cut = study.ask()  # ... and killed here
    chosen = spaces.suggest(cut, settings.space)
    again = studies.open_study(tmp_path, settings)
    assert [trial.state.name for trial in again.trials] == ["COMPLETE", "FAIL", "WAITING"]
    assert spaces.suggest(again.ask(), settings.space) == chosen
    with pytest.raises(UserError, match="other settings"):
        studies.open_study(tmp_path, spaces.Tune(name="x", space={"a": {"low": 0, "high": 8}}))
    with pytest.raises(UserError, match="other settings"):  # another model, decoder, sampling or prompt list
        studies.open_study(tmp_path, settings, ("other run",))


def test_a_search_of_release_0_1_resumes_where_its_runs_are_found(tmp_path: Path) -> None:
    settings = spaces.Tune(name="x", space={"a": [1, 2]})
    study = studies.open_study(tmp_path, settings, ("ar of 0.1", "scd of 0.1"))
    (done,) = study_of([(1.0, 0.0, 0.0)]).trials
    study.add_trial(done)
    with pytest.raises(UserError, match="other settings"):
        studies.open_study(tmp_path, settings, ("ar", "scd"), found=lambda trial: trial.user_attrs["run"] == "other")
    again = studies.open_study(tmp_path, settings, ("ar", "scd"), found=lambda trial: trial.user_attrs["run"] == "r")
    assert len(again.trials) == 1
    with pytest.raises(UserError, match="other settings"):  # found, but the question is another
        studies.open_study(tmp_path, spaces.Tune(name="x", space={"a": [1, 3]}), ("z",), found=lambda trial: True)


@pytest.mark.parametrize(("objective", "moves"), [("passes", True), ("latency", False)])
def test_seconds_of_two_machines_do_not_mix(tmp_path: Path, objective: str, moves: bool) -> None:
    settings = spaces.Tune(name="t", space={"decoder": {"window": [8, 16]}}, objective=objective)
    studies.open_study(tmp_path, settings, ("run",), "a GPU")
    if moves:
        studies.open_study(tmp_path, settings, ("run",), "another GPU")
    else:
        with pytest.raises(UserError, match="other settings"):
            studies.open_study(tmp_path, settings, ("run",), "another GPU")


@pytest.mark.slow
def test_a_search_from_start_to_decoder(cli: Cli) -> None:
    asked = (*BEATEN, "tune.judge=24")
    assert cli(*asked, "tune.trials=4") == 0, cli.err
    out = cli.runs_dir / "tune-scd"
    rows = list(csv.DictReader((out / "trials.csv").open()))
    assert len(rows) == 4
    assert [row["state"] for row in rows].index("own") == 0
    assert RunFolder(out / "runs" / rows[0]["run"]).config.decoder.window == 1
    whole = [row for row in rows if row["state"] == "complete"]
    assert whole
    assert all(row["within"] == "True" for row in whole)  # SCD is lossless, whatever four captions say
    assert "finals: " in cli.out
    decoder = yaml.safe_load((out / "decoder" / "scd-tuned.yaml").read_text())
    assert str(decoder["window"]) in {row["decoder.window"] for row in whole}
    assert "judged on 24 other images" in cli.out
    assert "fewer passes). The difference is significant" in " ".join(cli.out.split())
    assert (out / "judged" / "table.md").is_file()
    assert (out / "pareto.png").is_file()

    made = {path: path.stat().st_mtime_ns for path in out.rglob("images/*.png")}
    assert cli(*asked, "tune.trials=4") == 0  # nothing is made twice
    assert {path: path.stat().st_mtime_ns for path in out.rglob("images/*.png")} == made
    assert cli(*asked, "tune.trials=5") == 0  # and a longer search resumes
    assert [row["decoder.window"] for row in csv.DictReader((out / "trials.csv").open())][:4] == [
        row["decoder.window"] for row in rows
    ]
    decoder = yaml.safe_load((out / "decoder" / "scd-tuned.yaml").read_text())
    path = f"hydra.searchpath=[file://{out}]"
    assert cli("decoder=scd-tuned", "limit=2", "baseline=null", path) == 0, cli.err
    assert cli.run("scd").config.decoder.window == decoder["window"]


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_settings_that_nothing_beats_stay(cli: Cli) -> None:
    """The own window lies outside the space."""
    space = ("tune.space.decoder.window.low=2", "tune.space.decoder.window.high=3")
    asked = (*SMALL, "temperature=0.1", "decoder.window=16", *space, "tune.trials=3")
    assert cli(*asked) == 0, cli.err
    assert "no better than your settings: " in cli.out
    assert "best settings" not in cli.out
    assert not (cli.runs_dir / "tune-scd" / "decoder").exists()
    assert not (cli.runs_dir / "tune-scd" / "judged").exists()


class Finals(tune.Search):
    """A search whose runs are made up: `came` holds (passes, KID) of each setting on the captions of the finals."""

    def __init__(self, settings: spaces.Tune, came: dict[str, tuple[float, float] | Exception], lossless: str) -> None:
        self.tune, self.came, self.lossless = settings, came, lossless
        self.metrics, self.final_captions, self.cfg = {}, ["prompts.skip=5"], SimpleNamespace(seed=0, batch_size=3)
        self.made: list[tuple[str, int]] = []

    def compose(self, *words: str, decoder: str | None = None) -> SimpleNamespace:
        setting = decoder or words[0]
        return SimpleNamespace(setting=setting, decoder=SimpleNamespace(lossless=setting in self.lossless))

    def make(self, cfg: SimpleNamespace, limit: int, metrics: dict) -> SimpleNamespace:
        self.made.append((cfg.setting, limit))
        found = self.came.get(cfg.setting, (144.0, 0.0))
        if isinstance(found, Exception):
            raise found
        return SimpleNamespace(metrics={"forwards_mean": found[0], "kid": found[1]}, config=cfg)


def finals(folder: Path, came: dict[str, Any], lossless: str, **settings: Any) -> Finals:
    """Make finals whose trials a, b, ... came in this order, all within the bound."""
    asked = spaces.Tune(
        name="t", space={"w": list("abcd")}, objective="passes", finals=8, **{"finalists": 3, **settings}
    )
    search = Finals(asked, came, lossless)
    search.study = studies.open_study(folder, asked)
    kinds = optuna.distributions.CategoricalDistribution(list("abcd"))
    for place, setting in enumerate("abcd"):
        marks = {"violation": 0.0, "lossless": setting in lossless, "overrides": [setting]}
        search.study.add_trial(
            optuna.trial.create_trial(
                params={"w": setting}, distributions={"w": kinds}, values=[place, 0.0], user_attrs=marks
            )
        )
    return search


def test_the_finals_undo_a_lucky_trial_and_refuse_one_beyond_the_bound(tmp_path: Path) -> None:
    """Trial a was lucky, b is lossy and worse than the bound on other captions, d is no finalist."""
    search = finals(tmp_path / "1", {"a": (1.5, 0), "b": (1.0, 9.0), "c": (1.2, 0), "d": (0.1, 0)}, lossless="acd")
    assert search.final(search.study).params == {"w": "c"}
    assert [name for name, _ in search.made[:6]] == list("abcabc")  # in turns
    assert [limit for name, limit in search.made if name == "a"] == [3, 6, 8]  # whole batches
    assert "d" not in {name for name, _ in search.made}
    alone = finals(tmp_path / "2", {}, lossless="abcd", finalists=1)
    assert alone.final(alone.study).params == {"w": "a"}
    assert not alone.made


def test_finals_that_none_survives_go_on_with_the_next_trials(tmp_path: Path) -> None:
    lossy = (1.0, 9.0)
    search = finals(tmp_path / "1", {"a": lossy, "b": lossy, "c": lossy, "d": (5.0, 0)}, lossless="d")
    assert search.final(search.study).params == {"w": "d"}
    search = finals(tmp_path / "2", dict.fromkeys("abcd", lossy), lossless="")
    with pytest.raises(UserError, match="no trial is within"):
        search.final(search.study)
    memory = torch.OutOfMemoryError("out of memory")
    search = finals(tmp_path / "3", {"a": memory, "b": (1.0, 0), "c": UserError("no.")}, lossless="abcd")
    assert search.final(search.study).params == {"w": "b"}


def test_a_trial_that_keeps_ending_the_process_is_left(tmp_path: Path) -> None:
    settings = spaces.Tune(name="t", space={"w": [1, 2]})
    for _ in range(studies.TRIES):
        study = studies.open_study(tmp_path, settings)
        trial = study.ask()
        trial.suggest_categorical("w", ["1", "2"])
    params = trial.params
    study = studies.open_study(tmp_path, settings)
    assert [trial.params for trial in study.trials] == [params] * studies.TRIES
    assert [trial.state.name for trial in study.trials] == ["FAIL"] * (studies.TRIES - 1) + ["PRUNED"]
    assert f"the process died in it {studies.TRIES} times" in studies.trial_line(study.trials[-1], settings)
    assert not [trial for trial in study.trials if trial.state.name == "WAITING"]


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_the_captions_of_search_and_judgement_are_disjoint(cli: Cli) -> None:
    assert cli(*BEATEN, "tune.trials=4") == 0
    found: dict[int, set[str]] = {}
    for path in (cli.runs_dir / "tune-scd" / "runs").glob("toy-*"):
        texts = {line["prompt"] for line in map(yaml.safe_load, (path / "samples.jsonl").read_text().splitlines())}
        found.setdefault(yaml.safe_load((path / "config.yaml").read_text())["prompts"]["skip"], set()).update(texts)
    assert sorted(found) == [0, 1992, 1996]  # judgement, finals, search
    assert all(len(texts) == 4 for texts in found.values())
    assert len(set().union(*found.values())) == 12


@pytest.mark.full
@pytest.mark.usefixtures("plain")
def test_settings_that_do_not_fit_are_left_and_nothing_within_the_bound_is_said(cli: Cli) -> None:
    lossy = ("tune.trust_lossless=false", "tune.bound=-100")
    assert cli(*SMALL, *lossy, "tune.trials=2") == 1
    assert "none of 2 trials" in cli.err
    wrong = ("tune.name=wrong", "tune.space.decoder.window.low=-2", "tune.space.decoder.window.high=-1")
    assert cli(*SMALL, *wrong, "tune.trials=2") == 1
    assert f"{tune.DRAWS} settings in a row exclude each other" in cli.err
    own, *rows = csv.DictReader((cli.runs_dir / "tune-wrong" / "trials.csv").open())
    assert own["state"] == "own"
    assert len(rows) == tune.DRAWS  # they cost none of the two trials
    assert {row["state"] for row in rows} == {"impossible"}
    assert all("decoder.window must be 1 or more" in row["why"] for row in rows)


def test_errors_before_anything_is_made(cli: Cli) -> None:
    assert cli("stage=tune") == 1
    assert "tune=sjd2" in cli.err
    assert cli(*SMALL, "tune.judge=5000") == 1
    assert "exceed the 2000 captions" in cli.err
    assert not cli.runs_dir.exists() or not any(cli.runs_dir.rglob("samples.jsonl"))
