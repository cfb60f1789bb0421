"""stage=tune: search a decoder's settings for least latency under a bound on quality, with Optuna used directly.

Every trial is an ordinary run folder of its own captions, so a killed search goes on where it was (study.db, sqlite) and no
image is made twice. The captions that judge the outcome are never those of the search.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from evaluation import job, validate
from evaluation.console import CONF, say, sentence
from evaluation.intervals import paired
from evaluation.provenance import hardware
from evaluation.records import RunFolder, lock, write_atomically
from evaluation.score import Metric
from evaluation.speed import Speed
from evaluation.tracking import NoTracker
from sjd2.errors import UserError, choose
from sjd2.instantiate import instantiate
from sweeps.space import check_range, flatten, suggest

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

OBJECTIVES = {"latency": "latency_s_median", "passes": "forwards_mean"}
QUALITIES = {"kid": "kid", "fid": "fid", "nll": "nll_per_token"}
TURNS = 4  # of the finals
SAMPLERS = ("tpe", "nsga2", "random")


@dataclass(frozen=True, kw_only=True)
class Tune:
    """What to search and by which measure.

    space: key of the command line -> list of choices, or {low, high, step, log} of a number. trials: of the whole search.
    prompts: captions per trial, from the end of the list; judge: captions that judge the outcome, from its start.
    finalists: the best trials that run once more, in turns, on `finals` other captions, since the best of many noisy
    figures is mostly a lucky one (1: the best trial is taken as it is).
    early: captions after which a trial that is `hopeless` times worse than the best is cut. objective: latency (median
    seconds of an image) or passes. quality: kid, fid or nll, which may exceed AR's by `bound`; trust_lossless: a decoder
    that is lossless by proof is not refused for its noise.
    """

    name: str
    space: dict[str, Any]
    trials: int = 40
    prompts: int = 32
    judge: int = 128
    finalists: int = 4
    finals: int = 64
    early: int = 8
    hopeless: float = 1.5
    objective: str = "latency"
    quality: str = "kid"
    bound: float = 0.02
    trust_lossless: bool = True
    sampler: str = "tpe"
    random_trials: int = 10
    fixed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        choose("tune.objective", self.objective, OBJECTIVES)
        choose("tune.quality", self.quality, QUALITIES)
        choose("tune.sampler", self.sampler, SAMPLERS)
        counts = ("trials", "prompts", "judge", "finalists", "finals", "early", "random_trials")
        if wrong := [name for name in counts if getattr(self, name) < 1]:
            raise UserError(f"tune.{wrong[0]} must be 1 or more, got {getattr(self, wrong[0])}.")
        if self.hopeless <= 1:
            raise UserError(f"tune.hopeless must be more than 1, got {self.hopeless}.")
        if not self.space:
            raise UserError("tune.space is empty; name settings to search, e.g. tune.space.decoder.window=[16,32].")
        for key, values in flatten(self.space).items():
            check_range(key, values)

    def check(self) -> None:
        """Raise `UserError` if Optuna is not installed."""
        try:
            import optuna  # noqa: F401
        except ImportError as error:
            raise UserError("stage=tune needs Optuna: pip install -e '.[tune]'.") from error


@dataclass
class Outcome:
    """What one setting came to on its captions: the objective, the quality's distance to AR, whether it is lossless."""

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
        # captions of the search, last of the list, and of the finals before them; `total` leaves out the command's own skip
        last = cfg.prompts.get("skip", 0) + total - tune.prompts
        self.own, self.other = [f"prompts.skip={last}"], [f"prompts.skip={last - tune.finals}"]

    def compose(self, *overrides: str, decoder: str | None = None) -> DictConfig:
        """Compose the command once more with further settings; with `decoder`, without those of the command's own one."""
        fixed = [word for word in self.tune.fixed if decoder is None or not job.OWN.match(word)]
        cfg = job.recompose([*fixed, "baseline=null", "run_dir=null", *overrides], decoder=decoder)
        cfg.runs_dir = str(self.out / "runs")
        return cfg

    def make(self, cfg: DictConfig, limit: int, metrics: Mapping[str, Metric]) -> RunFolder:
        """Make the first `limit` images of a run and score them; what is there stays."""
        cfg = cfg.copy()
        cfg.limit = limit
        nodes = cfg.evaluation.get("metrics") or {}
        cfg.evaluation = {"metrics": {name: node for name, node in nodes.items() if name in metrics}}
        plan = validate.plan(cfg)
        ids, known = plan.prompts.ids(limit), plan.run.metrics
        scored = known.get("n_images", 0) >= len(ids) and metrics.keys() <= set(known.get("protocol", {}))
        if plan.run.missing(ids) or not scored:
            job.make_run(cfg, plan, metrics=metrics, tracker=NoTracker(), models=self.models, wait=True)
        return plan.run

    def outcome(self, run: RunFolder, reference: RunFolder) -> Outcome:
        """Compare a scored run with AR on the same captions."""
        key, quality = OBJECTIVES[self.tune.objective], QUALITIES[self.tune.quality]
        lacking = [run.path.name for run in (run, reference) if quality not in run.metrics]
        if lacking:
            raise UserError(
                f"tune.quality={self.tune.quality} is not measured under evaluation=; choose another of the two."
            )
        return Outcome(
            run.metrics[key], run.metrics[quality] - reference.metrics[quality], bool(run.config.decoder.lossless)
        )

    def violation(self, outcome: Outcome) -> float:
        """Return by how much a setting exceeds the bound; 0 or less is allowed."""
        if outcome.lossless and self.tune.trust_lossless:
            return 0.0
        return outcome.quality - self.tune.bound

    def attempt(self, trial: Trial, best: Callable[[], float | None]) -> tuple[float, float]:
        """Run one trial; raises TrialPruned for settings that do not fit together or are hopeless after a few images."""
        import optuna

        overrides = suggest(trial, self.tune.space)
        try:
            cfg = self.compose(*overrides, *self.own)
            early = min(self.tune.early, self.tune.prompts)
            run = self.make(cfg, early, {"speed": Speed()})
            soon, champion = run.metrics[OBJECTIVES[self.tune.objective]], best()
            if champion is not None and soon > self.tune.hopeless * champion:
                trial.set_user_attr("pruned", f"{soon:.4g} after {early} images, the best has {champion:.4g}")
                raise optuna.TrialPruned
            run = self.make(cfg, self.tune.prompts, self.metrics)
        except (UserError, torch.OutOfMemoryError) as error:
            trial.set_user_attr("pruned", sentence(error))
            raise optuna.TrialPruned from error
        found = self.outcome(run, self.reference)
        trial.set_user_attr("run", run.path.name)
        trial.set_user_attr("overrides", overrides)
        trial.set_user_attr("violation", self.violation(found))
        trial.set_constraint("quality", self.violation(found))
        trial.set_user_attr("lossless", found.lossless)
        return found.objective, found.quality

    def run(self) -> Path:
        """Search, judge the outcome on other captions, and write trials.csv, pareto.png and the best as a decoder yaml."""
        with lock(self.out / ".lock", what="search folder"):
            return self._run()

    def _run(self) -> Path:
        base = validate.plan(self.compose(*self.own))
        say(f"tune: AR on the {self.tune.prompts} captions of the search")
        self.reference = self.make(self.compose(*self.own, decoder="ar"), self.tune.prompts, self.metrics)
        runs = (self.reference.config.identity.id, base.identity["id"])
        study = open_study(self.out, self.tune, runs, hardware(torch.device(base.device)))
        done = sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)  # a kill's FAIL is tried again
        while done < self.tune.trials:
            trial = study.ask()
            self._step(study, trial)
            done += 1
            say(f"trial {done}/{self.tune.trials}: {describe(study.trials[trial.number])}")
        write_trials(study, self.out)
        if least(study) is None:
            raise UserError(
                f"none of {done} trials of stage=tune keeps tune.bound={self.tune.bound}; see {self.out / 'trials.csv'}."
            )
        show_front(study, self.tune)
        return self.judge(self.final(study))

    def final(self, study: Study) -> FrozenTrial:
        """Let the best trials run once more on captions of their own, in turns, and return the winner.

        In turns, so that a machine that is slow for a while is slow for all. Raises UserError if none keeps the bound.
        """
        trials = within(study)[: self.tune.finalists]
        if len(trials) == 1:
            return trials[0]
        say(f"finals: the best {len(trials)} trials in turns, {self.tune.finals} other captions each")
        cfgs = [self.compose(*trial.user_attrs["overrides"], *self.other) for trial in trials]
        limits = sorted({max(1, self.tune.finals * part // TURNS) for part in range(1, TURNS + 1)})
        runs = [[self.make(cfg, limit, {"speed": Speed()}) for cfg in cfgs] for limit in limits][-1]
        found = {
            trial.number: run.metrics[OBJECTIVES[self.tune.objective]] for trial, run in zip(trials, runs, strict=True)
        }
        for trial, cfg in zip(trials, cfgs, strict=True):
            if not (trial.user_attrs["lossless"] and self.tune.trust_lossless):
                reference = self.make(self.compose(*self.other, decoder="ar"), self.tune.finals, self.metrics)
                if self.violation(self.outcome(self.make(cfg, self.tune.finals, self.metrics), reference)) > 0:
                    del found[trial.number]
        for trial in trials:
            came = f"{found[trial.number]:.4g}" if trial.number in found else "beyond the bound"
            say(f"  {describe(trial)}; finals: {came}")
        if not found:
            raise UserError(
                f"no finalist keeps tune.bound={self.tune.bound} on other captions; raise tune.prompts or the bound."
            )
        return study.trials[min(found, key=found.__getitem__)]

    def _step(self, study: Study, trial: Trial) -> None:
        import optuna

        def best() -> float | None:
            found = least(study)
            return None if found is None else found.values[0]

        try:
            study.tell(trial, self.attempt(trial, best))
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    def judge(self, champion: FrozenTrial) -> Path:
        """Compare the best trial with the decoder's own settings and AR on captions that no trial has seen."""
        from sweeps.table import make_tables, show

        overrides = champion.user_attrs["overrides"]
        best, default = self.compose(*overrides), self.compose()
        cfgs = (self.compose(decoder="ar"), default, best)
        runs = [self.make(cfg, self.tune.judge, self.metrics) for cfg in cfgs]
        out = self.out / "judged"
        show(make_tables(list(dict.fromkeys(run.path for run in runs)), out))
        file = write_decoder(best, overrides, self.out, self.tune)
        say(verdict(runs[1], runs[2], self.tune))
        say(f"best settings: {' '.join(overrides)}")
        say(f"as a decoder: python run.py --config-dir {self.out} decoder={file.stem}")
        return self.out


def open_study(out: Path, tune: Tune, runs: Sequence[str] = (), machine: str = "") -> Study:
    """Open the study in out/study.db, a cut one where it was: trials that a kill left unfinished are tried again.

    runs: identities of AR's and the decoder's own run on the captions of the search: model, law, prompts and all.
    machine: the hardware, on which a latency depends. Raises `UserError` if the study there searched something else.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(f"sqlite:///{out / 'study.db'}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            storage=storage, study_name="tune", directions=["minimize", "minimize"], load_if_exists=True
        )
        study.sampler = _sampler(tune, len(study.trials))
    asked = {"space": flatten(tune.space), "fixed": list(tune.fixed), "runs": list(runs)}
    if tune.objective == "latency":  # seconds of two machines do not compare
        asked["machine"] = machine
    asked |= {key: getattr(tune, key) for key in ("objective", "quality", "bound", "trust_lossless", "prompts")}
    if study.user_attrs.get("asked", asked) != asked:
        raise UserError(
            f"{out} holds a search of other settings, or of latency on another machine; choose another tune.name, or "
            "remove that folder."
        )
    study.set_user_attr("asked", asked)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    return study


def _sampler(tune: Tune, done: int) -> Any:
    import optuna

    seed = done  # a search that goes on must not draw the same settings again
    if tune.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=tune.random_trials, multivariate=True, group=True)
    if tune.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=tune.random_trials)
    return optuna.samplers.RandomSampler(seed=seed)


def complete(study: Study) -> list[FrozenTrial]:
    """Return the trials that ran to their end."""
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def least(study: Study) -> FrozenTrial | None:
    """Return the trial of the least objective among those that keep the bound; None where there is none."""
    return next(iter(within(study)), None)


def within(study: Study) -> list[FrozenTrial]:
    """Return the trials that keep the bound, by objective; of equal settings the first."""
    fit = {str(trial.params or trial.number): trial for trial in reversed(complete(study)) if trial.user_attrs["violation"] <= 0}
    return sorted(fit.values(), key=lambda trial: (trial.values[0], trial.number))


def pareto_front(study: Study) -> list[FrozenTrial]:
    """Return the trials that no other beats in both objective and quality, by objective."""
    kept: list[FrozenTrial] = []
    for trial in sorted(complete(study), key=lambda trial: tuple(trial.values)):
        if not kept or trial.values[1] < kept[-1].values[1]:
            kept.append(trial)
    return kept


def describe(trial: FrozenTrial) -> str:
    """Say in one line what a trial came to."""
    words = " ".join(f"{key}={value}" for key, value in trial.params.items())
    if trial.state.name != "COMPLETE":
        return f"{words}: left ({trial.user_attrs.get('pruned', trial.state.name.lower())})"
    bound = "" if trial.user_attrs["violation"] <= 0 else ", beyond the bound"
    return f"{words}: {trial.values[0]:.4g}, quality {trial.values[1]:+.4g}{bound}"


def show_front(study: Study, tune: Tune) -> None:
    """Print the Pareto front."""
    say(f"Pareto front ({OBJECTIVES[tune.objective]}; {tune.quality} minus AR's):")
    for trial in pareto_front(study):
        say(f"  {describe(trial)}")


def write_trials(study: Study, out: Path) -> None:
    """Write trials.csv, one line per trial, and pareto.png."""
    from sweeps.plots import Point, pareto

    asked = study.user_attrs["asked"]
    keys = list(asked["space"])
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(
        ["trial", "state", *keys, asked["objective"], f"{asked['quality']}_minus_ar", "within", "run", "why"]
    )
    for trial in study.trials:
        whole = trial.state.name == "COMPLETE"
        own = [*trial.values, trial.user_attrs["violation"] <= 0, trial.user_attrs["run"]] if whole else [""] * 4
        values = [trial.params.get(key, "") for key in keys]
        lines.writerow([trial.number, trial.state.name.lower(), *values, *own, trial.user_attrs.get("pruned", "")])
    write_atomically(out / "trials.csv", text.getvalue().encode())
    points = [Point(str(t.number), t.values[0], t.values[1], t.user_attrs["lossless"]) for t in complete(study)]
    if points:
        panel = {f"{asked['quality']} minus AR's": (points, True)}
        pareto(panel, out / "pareto.png", caption=f"trials, {asked['objective']}")


def write_decoder(cfg: DictConfig, overrides: list[str], out: Path, tune: Tune) -> Path:
    """Write the settings found as a decoder that `--config-dir` makes a choice of decoder=."""
    name = f"{cfg.decoder.name}-tuned"
    file = out / "decoder" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    head = (
        f"# decoder={cfg.decoder.name} with the settings that stage=tune found: {' '.join(overrides)}\n"
        f"#   python run.py --config-dir {out} decoder={name}\n"
    )
    write_atomically(file, (head + OmegaConf.to_yaml(cfg.decoder, resolve=True)).encode())
    return file


def verdict(default: RunFolder, best: RunFolder, tune: Tune) -> str:
    """Say how the best compares with the decoder's own settings, on captions that no trial has seen."""
    if default.path == best.path:
        return "the best settings are the decoder's own."
    key = OBJECTIVES[tune.objective]
    ours, theirs = best.metrics[key], default.metrics[key]
    gap = paired(_passes(default), _passes(best))
    return (
        f"judged on {tune.judge} other captions: {key} {ours:.4g} against {theirs:.4g} of the decoder's own settings "
        f"({theirs / ours:.3f} times better); passes {gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}], 95 %."
    )


def _passes(run: RunFolder) -> dict[tuple[int, int], float]:
    return {(record["id"][0], record["id"][1]): float(record["forwards"]) for record in run.records()}


def stage(cfg: DictConfig) -> Path:
    """Search the settings of decoder= as tune= says."""
    if cfg.get("tune") is None:
        there = sorted(path.stem for path in (CONF / "tune").glob("*.yaml"))
        raise UserError(f"stage=tune needs a search: tune={' or tune='.join(there) or 'NAME'}.")
    tune, metrics = instantiate(cfg.tune), validate.metrics(cfg)
    tune.check()
    return Search(cfg, tune, metrics, Path(cfg.runs_dir) / f"tune-{tune.name}").run()
