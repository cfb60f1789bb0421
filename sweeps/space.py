"""What a search may choose: ranges and choices of settings, from which Optuna takes one value each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sjd2.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import Trial


def flatten(space: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested keys into dotted ones; a mapping with `low` is a range, a list holds choices."""
    found: dict[str, Any] = {}
    for key, value in space.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and "low" not in value:
            found |= flatten(value, name)
        else:
            found[name] = value
    return found


def check_range(key: str, values: Any) -> None:
    """Raise `UserError` if a setting's choices or range make no sense."""
    if isinstance(values, (list, tuple)):
        if len(values) < 2:
            raise UserError(f"tune.space.{key} needs two choices or more, got {list(values)}.")
        return
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values) <= {"low", "high", "step", "log"}:
        raise UserError(f"tune.space.{key} must be a list of choices or a range with low and high (and step or log).")
    low, high, step = values["low"], values["high"], values.get("step")
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (low, high, step or 1)):
        raise UserError(f"tune.space.{key} is a range of numbers, got {dict(values)}; list choices that are none.")
    if not low < high:
        raise UserError(f"tune.space.{key} needs low < high, got {low} and {high}.")
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"tune.space.{key} needs a step between 0 and {high - low}, got {step}.")
    if values.get("log") and (low <= 0 or step is not None):
        raise UserError(f"tune.space.{key} takes log=true for low > 0 and without step.")


def suggest(trial: Trial, space: Mapping[str, Any]) -> list[str]:
    """Let Optuna choose one value of every setting -> overrides of the command line."""
    words = []
    for key, values in flatten(space).items():
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
    """Write a value as an override says it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace(" ", "")
