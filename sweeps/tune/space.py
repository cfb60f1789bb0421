"""What stage=tune searches: ranges and choices of settings, of which Optuna picks one value each, and the objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sjd2.errors import UserError, choose

if TYPE_CHECKING:
    from optuna.trial import Trial


OBJECTIVES = {"latency": "latency_s_median", "passes": "forwards_mean"}
UNITS = {"latency": "s per image", "passes": "passes per image"}
QUALITIES = {"kid": "kid", "fid": "fid", "nll": "nll_per_token"}
SAMPLERS = ("tpe", "nsga2", "random")


@dataclass(frozen=True, kw_only=True)
class Tune:
    """What to search, and what for.

    space: key of the command line -> list of choices, or {low, high, step, log} of a number. trials: of the whole search.
    prompts: captions per trial, from the end of the list; judge: captions of the final judgement, from its start.
    finalists: the best trials run once more, in turns, on `finals` other captions, since the best of many noisy
    values is mostly a lucky one (1: the best trial is taken as it is).
    early: captions after which a trial `hopeless` times worse than the best is stopped. objective: latency (median
    seconds per image) or passes. quality: kid, fid or nll, which may exceed AR's by `bound`; trust_lossless: a provably
    lossless decoder is not rejected for its noise.
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
        for key, values in flatten_space(self.space).items():
            check_range(key, values)

    def check(self) -> None:
        """Raise `UserError` if Optuna is not installed."""
        try:
            import optuna  # noqa: F401
        except ImportError as error:
            raise UserError("stage=tune needs Optuna: pip install -e '.[tune]'.") from error


def flatten_space(space: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested keys into dotted ones; a mapping with `low` is a range, a list contains choices."""
    found: dict[str, Any] = {}
    for key, value in space.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and "low" not in value:
            found |= flatten_space(value, name)
        else:
            found[name] = value
    return found


def check_range(key: str, values: Any) -> None:
    """Raise `UserError` if a setting's choices or range are invalid."""
    if isinstance(values, (list, tuple)):
        if len(values) < 2:
            raise UserError(f"tune.space.{key} needs at least two choices, got {list(values)}.")
        return
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values) <= {"low", "high", "step", "log"}:
        raise UserError(f"tune.space.{key} must be a list of choices or a range with low and high (and step or log).")
    low, high, step = values["low"], values["high"], values.get("step")
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (low, high, step or 1)):
        raise UserError(f"tune.space.{key} is a range of numbers, got {dict(values)}; list anything else as choices.")
    if not low < high:
        raise UserError(f"tune.space.{key} needs low < high, got {low} and {high}.")
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"tune.space.{key} needs a step between 0 and {high - low}, got {step}.")
    if values.get("log") and (low <= 0 or step is not None):
        raise UserError(f"tune.space.{key} takes log=true only with low > 0 and without step.")


def suggest(trial: Trial, space: Mapping[str, Any]) -> list[str]:
    """Let Optuna choose one value of every setting; return them as command-line overrides."""
    words = []
    for key, values in flatten_space(space).items():
        if isinstance(values, (list, tuple)):
            value = trial.suggest_categorical(key, [_text(v) for v in values])
        elif all(isinstance(values.get(end, 1), int) for end in ("low", "high", "step")):
            more = {"step": values.get("step", 1), "log": values.get("log", False)}
            value = _text(trial.suggest_int(key, values["low"], values["high"], **more))
        else:
            more = {"step": values.get("step"), "log": values.get("log", False)}
            value = _text(trial.suggest_float(key, values["low"], values["high"], **more))
        words.append(f"{key}={value}")
    return words


def _text(value: Any) -> str:
    """Return a value as an override writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace(" ", "")
