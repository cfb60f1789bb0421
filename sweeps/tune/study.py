"""The study of stage=tune: a sqlite file of trials that survives kills, its ranking, and its output files."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from harness.console import say
from sjd2.errors import UserError
from sjd2.files import write_atomically
from sweeps.tune.space import UNITS, Tune, flatten_space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial


OWN_SETTINGS = "own"  # attribute of trial 0, the decoder's own settings: its two values, which a sampler must not see
IMPOSSIBLE = "impossible"  # attribute of settings that exclude each other: why
TRIES = 3  # starts of a trial after which it is taken to be what kills the process


def open_study(
    out: Path,
    tune: Tune,
    runs: Sequence[str] = (),
    machine: str = "",
    *,
    found: Callable[[FrozenTrial], bool] = lambda trial: False,
) -> Study:
    """Open or resume the study in out/study.db; a trial that a kill interrupted is tried again, three times at most.

    runs: ids of AR's and the decoder's own run on the captions of the search, which cover model, sampling and prompts.
    machine: the hardware, on which a latency depends. found: whether a trial's run folder is the one that these settings
    have; release 0.1 hashed other ids from the same settings. Raises `UserError` if the study there searched something
    else.
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
    asked = {"space": flatten_space(tune.space), "fixed": list(tune.fixed), "runs": list(runs)}
    if tune.objective == "latency":  # seconds of two machines are not comparable
        asked["machine"] = machine
    asked |= {key: getattr(tune, key) for key in ("objective", "quality", "bound", "trust_lossless", "prompts")}
    stored = study.user_attrs.get("asked", asked)
    if stored["runs"] != asked["runs"] and any(map(found, complete(study)[:1])):
        stored = stored | {"runs": asked["runs"]}
    if stored != asked:
        raise UserError(
            f"{out} has a search of other settings, or for latency on another machine; choose another tune.name, or "
            "remove that folder."
        )
    study.set_user_attr("asked", asked)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        lost = sum(t.params == trial.params and t.state.name == "FAIL" for t in study.trials)
        if lost + 1 < TRIES:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
        else:
            study.tell(trial.number, state=optuna.trial.TrialState.PRUNED)
    return study


def _sampler(tune: Tune, done: int) -> Any:
    import optuna

    seed = done  # a resumed search must not draw the same settings again
    if tune.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=tune.random_trials, multivariate=True, group=True)
    if tune.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=tune.random_trials)
    return optuna.samplers.RandomSampler(seed=seed)


def complete(study: Study) -> list[FrozenTrial]:
    """Return the trials that ran to their end."""
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def counted(study: Study) -> list[FrozenTrial]:
    """Return the trials that a search has spent: run, or left early. FAIL, left by a kill, is tried again."""
    ended = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    return [trial for trial in ended if IMPOSSIBLE not in trial.user_attrs]


def add_own_trial(study: Study, values: tuple[float, float], attributes: dict[str, Any]) -> FrozenTrial:
    """Add the decoder's own settings, trial 0, and return it.

    They may lie outside the space, and samplers search only where all complete trials have parameters, so for Optuna
    this trial is pruned and its values are an attribute.
    """
    import optuna

    state, kept = optuna.trial.TrialState.PRUNED, {OWN_SETTINGS: list(values), **attributes}
    study.add_trial(optuna.trial.create_trial(state=state, user_attrs=kept))
    return study.trials[-1]


def own_trial(study: Study) -> FrozenTrial | None:
    """Return the trial of the decoder's own settings."""
    return next((trial for trial in study.trials if OWN_SETTINGS in trial.user_attrs), None)


def own_within(study: Study) -> bool:
    """Return whether the decoder's own settings were run and are within the bound."""
    own = own_trial(study)
    return own is not None and own.user_attrs["violation"] <= 0


def best_objective(study: Study) -> float | None:
    """Return the lowest objective so far of the settings within the bound, the decoder's own included."""
    best, own = best_trial(study), own_trial(study)
    found = [] if best is None else [best.values[0]]
    if own is not None and own_within(study):
        found.append(own.user_attrs[OWN_SETTINGS][0])
    return min(found, default=None)


def nothing_better(study: Study, tune: Tune) -> str | None:
    """Return why no trial can be better than the decoder's own settings; None if one had a lower objective."""
    best, own = best_trial(study), own_trial(study)
    if own is None or not own_within(study):
        return None
    if best is None:
        return f"none of {len(counted(study)) - 1} other trials is within tune.bound={tune.bound}"
    ours, unit = own.user_attrs[OWN_SETTINGS][0], UNITS[tune.objective]
    if best.values[0] < ours:
        return None
    return f"{ours:.4g} {unit}, and the best of {len(counted(study)) - 1} other trials has {best.values[0]:.4g}"


def best_trial(study: Study) -> FrozenTrial | None:
    """Return the trial with the lowest objective among those within the bound; None if there is none."""
    return next(iter(within_bound(study)), None)


def within_bound(study: Study) -> list[FrozenTrial]:
    """Return the trials within the bound, by objective; of equal settings the first."""
    fit = {
        str(trial.params or trial.number): trial
        for trial in reversed(complete(study))
        if trial.user_attrs["violation"] <= 0
    }
    return sorted(fit.values(), key=lambda trial: (trial.values[0], trial.number))


def pareto_trials(study: Study) -> list[FrozenTrial]:
    """Return the trials that no other beats in both objective and quality, by objective."""
    kept: list[FrozenTrial] = []
    for trial in sorted(complete(study), key=lambda trial: tuple(trial.values)):
        if not kept or trial.values[1] < kept[-1].values[1]:
            kept.append(trial)
    return kept


def trial_line(trial: FrozenTrial, tune: Tune) -> str:
    """Return the settings and the result of a trial as one line."""
    words = " ".join(f"{key}={value}" for key, value in trial.params.items())
    values = trial.user_attrs.get(OWN_SETTINGS)
    if values is not None:
        words = "the decoder's own settings"
    elif IMPOSSIBLE in trial.user_attrs:
        return f"{words}: impossible ({trial.user_attrs[IMPOSSIBLE]})"
    elif trial.state.name != "COMPLETE":
        return f"{words}: pruned ({_why(trial)})"
    objective, quality = values or trial.values
    shown = "–" if trial.user_attrs.get("few") else f"{quality:+.4g}"
    bound = "" if trial.user_attrs["violation"] <= 0 else ", exceeds the bound"
    if not bound and trial.user_attrs.get("over"):
        bound = ", exceeds the bound, kept because lossless"
    return f"{words}: {objective:.4g} {UNITS[tune.objective]}, {tune.quality} {shown}{bound}"


def _why(trial: FrozenTrial) -> str:
    """Return why a trial has no result."""
    lost = f"the process died in it {TRIES} times" if trial.state.name == "PRUNED" else trial.state.name.lower()
    return trial.user_attrs.get(IMPOSSIBLE) or trial.user_attrs.get("pruned", lost)


def show_front(study: Study, tune: Tune) -> None:
    """Print the Pareto front."""
    say(f"Pareto front ({tune.objective}; {tune.quality} minus AR's):")
    for trial in pareto_trials(study):
        say(f"  {trial_line(trial, tune)}")


def write_trials(study: Study, out: Path) -> None:
    """Write trials.csv, one line per trial, and pareto.png."""
    from sweeps.tables.plots import Point, pareto

    asked = study.user_attrs["asked"]
    keys = list(asked["space"])
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(
        ["trial", "state", *keys, asked["objective"], f"{asked['quality']}_minus_ar", "within", "run", "why"]
    )
    for trial in study.trials:
        values, state = trial.user_attrs.get(OWN_SETTINGS) or trial.values, trial.state.name.lower()
        whole = values is not None
        found = [*values, trial.user_attrs["violation"] <= 0, trial.user_attrs["run"]] if whole else [""] * 4
        state = next((name for name in (OWN_SETTINGS, IMPOSSIBLE) if name in trial.user_attrs), state)
        params = [trial.params.get(key, "") for key in keys]
        lines.writerow([trial.number, state, *params, *found, "" if whole else _why(trial)])
    write_atomically(out / "trials.csv", text.getvalue().encode())
    points = [Point(str(t.number), t.values[0], t.values[1], t.user_attrs["lossless"]) for t in complete(study)]
    if points:
        panel = {f"{asked['quality']} minus AR's": (points, True)}
        pareto(panel, out / "pareto.png", caption=f"trials, {asked['objective']}")


def write_decoder(cfg: DictConfig, out: Path, *, name: str, found: str) -> Path:
    """Write the settings of a command as a decoder yaml, which `--config-dir` adds to the choices of decoder=.

    found: what stage=tune found, for the first line.
    """
    file = out / "decoder" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    head = (
        f"# decoder={cfg.decoder.name} with the settings that stage=tune found: {found}\n"
        f"#   python run.py --config-dir {out} decoder={name}\n"
    )
    write_atomically(file, (head + OmegaConf.to_yaml(cfg.decoder, resolve=True)).encode())
    return file
