"""stage=tune: search a decoder's settings for the lowest latency under a bound on quality, with Optuna.

Every trial is an ordinary run folder, so a killed search resumes (study.db, sqlite) and no image is made twice. The
result is judged on captions that the search never used.
"""

from __future__ import annotations

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
from harness.console import say, sentence
from harness.plan import make_plan
from harness.provenance import hardware
from sjd2.config import instantiate
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
from sweeps.tune.trials import TrialRuns
from sweeps.tune.verdict import UNTOLD, judged

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

DRAWS = 20  # settings in a row that exclude each other, after which a search gives up


@dataclass
class TrialResult:
    """Result of one setting on its captions: the objective, the quality minus AR's, and whether it is lossless."""

    objective: float
    quality: float
    lossless: bool


class Search(TrialRuns):
    """One search: its settings, its study, and the model that all trials share."""

    tune: Tune

    def __init__(self, cfg: DictConfig, tune: Tune, metrics: Mapping[str, Metric], out: Path) -> None:
        super().__init__(cfg, tune, metrics, out)
        total = len(instantiate(cfg.prompts).texts)
        if tune.judge + tune.finals + tune.prompts > total:
            raise UserError(
                f"tune.judge={tune.judge}, tune.finals={tune.finals} and tune.prompts={tune.prompts} together exceed the "
                f"{total} captions of prompts={cfg.prompts.name}; take fewer."
            )
        # the search uses the last captions of the list, the finals those before; `total` excludes what the command skips
        last = cfg.prompts.get("skip", 0) + total - tune.prompts
        self.search_captions, self.final_captions = [f"prompts.skip={last}"], [f"prompts.skip={last - tune.finals}"]

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
        words = " ".join(overrides)
        file = write_decoder(best, self.out, name=f"{best.decoder.name}-tuned", found=words)
        say(f"best settings: {words}")
        say(f"as a decoder: python run.py --config-dir {self.out} decoder={file.stem}")
        return self.out
