"""stage=tune: search a decoder's settings for the lowest latency under a bound on quality, with Optuna.

Every trial is an ordinary run folder, so a killed search resumes (study.db, sqlite) and no image is made twice. The
result is judged on captions that the search never used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from evaluation.declared import declared, withheld
from evaluation.metrics.speed import Speed
from evaluation.run_folder import RunFolder
from evaluation.score import Metric
from harness import job
from harness.console import say, sentence
from harness.plan import build_metrics, draws, make_plan
from harness.provenance import hardware
from harness.recompose import OWN, recompose
from sjd2.config import choices, instantiate
from sjd2.errors import UserError
from sjd2.locks import lock
from sweeps.tune.space import OBJECTIVES, QUALITIES, Tune, suggest
from sweeps.tune.study import (
    IMPOSSIBLE,
    add_own_trial,
    best_objective,
    best_trial,
    complete,
    counted,
    nothing_better,
    open_study,
    own_trial,
    own_within,
    show_front,
    trial_line,
    within_bound,
    write_decoder,
    write_trials,
)
from sweeps.tune.verdict import UNTOLD, judged

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

TURNS = 4  # in which the finals and the judgement are run
DRAWS = 20  # settings in a row that exclude each other, after which a search gives up


@dataclass
class TrialResult:
    """Result of one setting on its captions: the objective, the quality minus AR's, and whether it is lossless."""

    objective: float
    quality: float
    lossless: bool


class Search:
    """One search: its settings, its study, and the model that all trials share."""

    def __init__(self, cfg: DictConfig, tune: Tune, metrics: Mapping[str, Metric], out: Path) -> None:
        self.cfg, self.tune, self.out = cfg, tune, out
        self.metrics = {"speed": Speed(), **metrics}
        self.models = job.Models()
        total = len(instantiate(cfg.prompts).texts)
        if tune.judge + tune.finals + tune.prompts > total:
            raise UserError(
                f"tune.judge={tune.judge}, tune.finals={tune.finals} and tune.prompts={tune.prompts} together exceed the "
                f"{total} captions of prompts={cfg.prompts.name}; take fewer."
            )
        # the search uses the last captions of the list, the finals those before; `total` excludes what the command skips
        last = cfg.prompts.get("skip", 0) + total - tune.prompts
        self.search_captions, self.final_captions = [f"prompts.skip={last}"], [f"prompts.skip={last - tune.finals}"]

    def compose(self, *overrides: str, decoder: str | None = None, own: bool = False) -> DictConfig:
        """Compose the command again with further settings.

        decoder: replaces the command's decoder and its settings. own: the decoder as the command has it, without the
        settings that tune.fixed gives it.
        """
        fixed = [word for word in self.tune.fixed if (decoder is None and not own) or not OWN.match(word)]
        cfg = recompose([*fixed, "baseline=null", "run_dir=null", *overrides], decoder=decoder)
        cfg.runs_dir = str(self.out / "runs")
        return cfg

    def make(self, cfg: DictConfig, limit: int, metrics: Mapping[str, Metric]) -> RunFolder:
        """Make and score the first `limit` images of a run; existing ones are kept."""
        cfg = cfg.copy()
        cfg.limit = limit
        nodes = cfg.evaluation.get("metrics") or {}
        cfg.evaluation = {"metrics": {name: node for name, node in nodes.items() if name in metrics}}
        plan = make_plan(cfg)
        ids, known = plan.prompts.ids(limit), plan.run.metrics
        scored = known.get("n_images", 0) >= len(ids) and metrics.keys() <= set(known.get("protocol", {}))
        if plan.run.missing(ids) or not scored:
            job.make_run(job.Entry(cfg=cfg, plan=plan), metrics=metrics, models=self.models, wait=True)
        return plan.run

    def result(self, run: RunFolder, reference: RunFolder) -> TrialResult:
        """Compare a scored run with AR on the same captions."""
        key, quality = OBJECTIVES[self.tune.objective], QUALITIES[self.tune.quality]
        return TrialResult(
            run.metrics[key], run.metrics[quality] - reference.metrics[quality], bool(run.config.decoder.lossless)
        )

    def violation(self, result: TrialResult) -> float:
        """Return by how much a setting exceeds the bound; 0 or less is within it."""
        if result.lossless and self.tune.trust_lossless:
            return 0.0
        return result.quality - self.tune.bound

    def attempt(self, trial: Trial, best: Callable[[], float | None]) -> tuple[float, float]:
        """Run one trial; raise TrialPruned for settings that exclude each other, or are hopeless after a few images."""
        import optuna

        overrides = suggest(trial, self.tune.space)
        try:
            cfg = self.compose(*overrides, *self.search_captions)
            make_plan(cfg)
        except UserError as error:
            trial.set_user_attr(IMPOSSIBLE, sentence(error))
            raise optuna.TrialPruned from error
        try:
            early = min(self.tune.early, self.tune.prompts)
            run = self.make(cfg, early, {"speed": Speed()})
            value, champion = run.metrics[OBJECTIVES[self.tune.objective]], best()
            if champion is not None and value > self.tune.hopeless * champion:
                trial.set_user_attr("pruned", f"{value:.4g} after {early} images, the best has {champion:.4g}")
                raise optuna.TrialPruned
            run = self.make(cfg, self.tune.prompts, self.metrics)
            found = self.result(run, self.reference)
        except (UserError, torch.OutOfMemoryError) as error:
            trial.set_user_attr("pruned", sentence(error))
            raise optuna.TrialPruned from error
        for key, value in self.attributes(run, found, overrides).items():
            trial.set_user_attr(key, value)
        trial.set_constraint("quality", self.violation(found))
        return found.objective, found.quality

    def attributes(self, run: RunFolder, found: TrialResult, overrides: Sequence[str]) -> dict[str, Any]:
        """Return what a study keeps of a trial beside its values."""
        return {
            "run": run.path.name,
            "overrides": list(overrides),
            "violation": self.violation(found),
            "over": found.quality > self.tune.bound,
            "lossless": found.lossless,
            "few": QUALITIES[self.tune.quality] in withheld(run.metrics, declared([run])),  # images, to show it
        }

    def run(self) -> Path:
        """Search, judge the best on other captions, write trials.csv, pareto.png and the best settings as a decoder yaml."""
        with lock(self.out / ".lock", what="search folder"):
            return self._run()

    def _run(self) -> Path:
        base = make_plan(self.compose(*self.search_captions))
        say(f"tune: AR on the {self.tune.prompts} captions of the search")
        self.reference = self.make(self.compose(*self.search_captions, decoder="ar"), self.tune.prompts, self.metrics)
        if QUALITIES[self.tune.quality] not in self.reference.metrics:
            raise UserError(f"tune.quality={self.tune.quality} is not measured by this evaluation=; change either.")
        runs = (self.reference.config.identity.id, base.identity["id"])
        study = open_study(self.out, self.tune, runs, hardware(torch.device(base.device)), found=self._found)
        own = own_trial(study) or add_own_trial(study, *self.own())
        say(f"trial 0: {trial_line(own, self.tune)}")
        self.search(study)
        write_trials(study, self.out)
        if best_trial(study) is None and not own_within(study):
            raise UserError(
                f"none of {len(counted(study))} trials of stage=tune is within tune.bound={self.tune.bound}; see "
                f"{self.out / 'trials.csv'}."
            )
        show_front(study, self.tune)
        if (reason := nothing_better(study, self.tune)) is not None:
            say(f"no better than your settings: {reason}.")
            return self.out
        return self.judge(self.final(study))

    def own(self) -> tuple[tuple[float, float], dict[str, Any]]:
        """Run the decoder's own settings on the captions of the search; returns the trial's values and attributes."""
        run = self.make(self.compose(*self.search_captions, own=True), self.tune.prompts, self.metrics)
        found = self.result(run, self.reference)
        return (found.objective, found.quality), self.attributes(run, found, [])

    def search(self, study: Study) -> None:
        """Run trials until the study has as many as asked for; settings that exclude each other are none."""
        import optuna

        excluded = 0
        while (done := len(counted(study))) < self.tune.trials:
            trial = study.ask()
            try:
                study.tell(trial, self.attempt(trial, lambda: best_objective(study)))
            except optuna.TrialPruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            made = study.trials[trial.number]
            excluded = excluded + 1 if IMPOSSIBLE in made.user_attrs else 0
            if excluded >= DRAWS:
                write_trials(study, self.out)
                raise UserError(
                    f"{DRAWS} settings in a row exclude each other; narrow tune.space. {made.user_attrs[IMPOSSIBLE]}"
                )
            place = "no trial" if excluded else f"trial {done}/{self.tune.trials - 1}"
            say(f"{place}: {trial_line(made, self.tune)}")

    def _found(self, trial: FrozenTrial) -> bool:
        """Return whether the run of a trial is the one that these settings have."""
        cfg = self.compose(*trial.user_attrs["overrides"], *self.search_captions)
        return make_plan(cfg).run.path.name == trial.user_attrs["run"]

    def final(self, study: Study) -> FrozenTrial:
        """Run the best trials once more on other captions and return the winner.

        If none of them stays within the bound, the next best ones follow. Raises UserError if no trial does.
        """
        trials, size = within_bound(study), self.tune.finalists
        if size == 1:
            return trials[0]
        # a longer search has finals of its own: old and new seconds are not comparable
        captions = [*self.final_captions, f"seed={self.cfg.seed + len(complete(study))}"]
        for start in range(0, len(trials), size):
            group = trials[start : start + size]
            say(f"finals: {len(group)} trials in turns, {self.tune.finals} other captions each")
            cfgs = [self.compose(*trial.user_attrs["overrides"], *captions) for trial in group]
            runs = self.in_turns(cfgs, self.tune.finals)
            values: dict[int, float] = {}
            for trial, cfg, run in zip(group, cfgs, runs, strict=True):
                if isinstance(run, str):
                    result = run
                elif not (result := self._rejection(cfg, captions)):
                    values[trial.number] = run.metrics[OBJECTIVES[self.tune.objective]]
                    result = f"{values[trial.number]:.4g}"
                say(f"  {trial_line(trial, self.tune)}; finals: {result}")
            if values:
                return study.trials[min(values, key=values.__getitem__)]
        raise UserError(
            f"no trial is within tune.bound={self.tune.bound} on other captions; more tune.finals reduce the noise."
        )

    def in_turns(self, cfgs: Sequence[DictConfig], images: int) -> list[RunFolder | str]:
        """Make runs a part at a time, in turns, so that a machine that is slow for a while is slow for all.

        Returns the runs, or the reason for one that could not be made.
        """
        runs: list[RunFolder | str] = [""] * len(cfgs)
        batch = self.cfg.batch_size  # whole batches: half of one costs as much
        parts = (math.ceil(images * part / TURNS / batch) * batch for part in range(1, TURNS + 1))
        for limit in sorted({min(images, part) for part in parts}):
            for place, cfg in enumerate(cfgs):
                if isinstance(runs[place], str) and runs[place]:
                    continue
                try:
                    runs[place] = self.make(cfg, limit, {"speed": Speed()})
                except (UserError, torch.OutOfMemoryError) as error:
                    runs[place] = sentence(error)
        return runs

    def _rejection(self, cfg: DictConfig, captions: Sequence[str]) -> str:
        """Return by how much a run on these captions exceeds the bound, or why that is unknown; '' within it."""
        if cfg.decoder.lossless and self.tune.trust_lossless:
            return ""
        try:
            reference = self.make(self.compose(*captions, decoder="ar"), self.tune.finals, self.metrics)
            scored = self.make(cfg, self.tune.finals, self.metrics)
            over = self.violation(self.result(scored, reference))
        except (UserError, torch.OutOfMemoryError) as error:
            return sentence(error)
        return f"exceeds the bound by {over:.4g}" if over > 0 else ""

    def judge(self, champion: FrozenTrial) -> Path:
        """Compare the best trial with the decoder's own settings and AR on captions that no trial used."""
        from sweeps.tables.table import make_tables, show

        overrides = champion.user_attrs["overrides"]
        best = self.compose(*overrides)
        cfgs = [self.compose(decoder="ar"), self.compose(own=True), best]
        say(
            f"judgement: AR, the decoder's own settings and the best in turns, {self.tune.judge} captions that no trial used"
        )
        if failed := [run for run in self.in_turns(cfgs, self.tune.judge) if isinstance(run, str)]:
            raise UserError(failed[0])
        runs = [self.make(cfg, self.tune.judge, self.metrics) for cfg in cfgs]
        folder = self.out / "judged"
        show(make_tables(list(dict.fromkeys(run.path for run in runs)), folder), folder / "table.md", self.cfg.output)
        better, tested, lines = judged(self.tune, *runs)
        for line in lines:
            say(line)
        if not tested:
            say(f"not tested: {UNTOLD[self.tune.objective]}; your settings stay.")
            return self.out
        if not better:
            say(
                f"no better than your settings: {' '.join(overrides)} won the search, but here its gain is not "
                "beyond noise and within the bound."
            )
            return self.out
        file = write_decoder(best, overrides, self.out, self.tune)
        say(f"best settings: {' '.join(overrides)}")
        say(f"as a decoder: python run.py --config-dir {self.out} decoder={file.stem}")
        return self.out


def stage(cfg: DictConfig) -> Path:
    """Run stage=tune: search the settings of decoder= as tune= defines."""
    if cfg.get("tune") is None:
        valid = choices("tune")
        raise UserError(f"stage=tune needs a search: tune={' or tune='.join(valid) or 'NAME'}.")
    tune, metrics = instantiate(cfg.tune), build_metrics(cfg, images=draws(cfg))
    tune.check()
    return Search(cfg, tune, metrics, Path(cfg.runs_dir) / f"tune-{tune.name}").run()
