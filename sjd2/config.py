"""Build objects from yaml nodes that name a `_target_`, with errors that name the setting and the way out.

`instantiate` is the only place that calls Hydra's: it works with hydra-core 1.3 (which passes unknown keywords on to
the target) as well as 1.4 and 1.5 (which warn or fail without `_execution_whitelist_`).
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from sjd2.errors import UserError, unknown

PACKAGES = ("sjd2.*", "baselines.*", "evaluation.*", "sweeps.*", "tests.*")
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}


# in yaml: lossless: ${equal:${decoder.rule},exact}
OmegaConf.register_new_resolver("equal", lambda value, other: value == other, replace=True)


def instantiate(node: DictConfig, **extra: Any) -> Any:
    """Build the object that `node` describes; `extra` are arguments that no yaml can hold.

    Raises UserError in one sentence for a wrong type, an unknown or missing key, or a value that the target refuses.
    """
    check_node(node, extra)
    if "_execution_whitelist_" in inspect.signature(hydra.utils.instantiate).parameters:
        extra = {**extra, "_execution_whitelist_": list(PACKAGES)}
    try:
        # targets get plain lists and dictionaries, as their signatures say, not OmegaConf's
        return hydra.utils.instantiate(node, _convert_="all", **extra)
    except InstantiationException as error:
        raise _refusal(error, node) from error


def check_node(node: Any, extra: Collection[str] = ()) -> None:
    """Compare every key below `node` with the signature of its target; raises UserError at the first misfit."""
    if isinstance(node, ListConfig):
        for child in node:
            check_node(child)
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        _check_target(node, extra)
    for child in node.values():
        check_node(child)


def fits(value: Any, hint: Any) -> bool:
    """Say whether a yaml value can stand for a parameter of this type; types that yaml cannot hold always fit."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, (int, float))
    if hint is Path:
        return isinstance(value, str)
    if hint in WORDS:
        return isinstance(value, hint)
    if (origin or hint) in (list, tuple, Sequence):
        kind = inner[0] if inner else Any
        return isinstance(value, (list, tuple)) and all(fits(item, kind) for item in value)
    return True


def describe(hint: Any) -> str:
    """Say in words what `fits` asks for."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in inner)
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in inner)
    if (origin or hint) in (list, tuple, Sequence):
        return f"a list ({describe(inner[0])} each)" if inner else "a list"
    return WORDS.get(hint, str(getattr(hint, "__name__", hint)))


def _check_target(node: DictConfig, extra: Collection[str]) -> None:
    try:
        target = hydra.utils.get_object(node["_target_"])
    except Exception as error:  # Hydra raises bare Exceptions here, and an import may raise anything
        if isinstance(error.__cause__ or error, UserError):
            raise error.__cause__ or error from None
        raise UserError(f"{_where(node)}: cannot import '{node['_target_']}' ({error.__cause__ or error}).") from error
    parameters = inspect.signature(target).parameters
    hints = _hints(target)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    values = OmegaConf.to_container(node, resolve=True)
    for key, value in values.items():
        if str(key).startswith("_"):
            continue
        if key not in parameters:
            if open_ended:
                continue
            raise unknown(f"setting of {_where(node)}", key, parameters)
        if isinstance(value, Mapping) and "_target_" in value:
            continue
        if not fits(value, hints.get(key, Any)):
            raise UserError(f"{_where(node, key)} must be {describe(hints[key])}, got {value!r}.")
    for key, parameter in parameters.items():
        open_kinds = (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if (
            parameter.default is parameter.empty
            and parameter.kind not in open_kinds
            and key not in values
            and key not in extra
        ):
            raise UserError(f"{_where(node, key)} is missing; it must be {describe(hints.get(key, Any))}.")


def _hints(target: Any) -> dict[str, Any]:
    """Return the parameters' types; {} where they name things that only a type checker imports."""
    try:
        return typing.get_type_hints(target.__init__ if _own_init(target) else target)
    except NameError:
        return {}


def _own_init(target: Any) -> bool:
    return inspect.isclass(target) and "__dataclass_fields__" not in vars(target)


def _where(node: DictConfig, key: str | None = None) -> str:
    return node._get_full_key(key) or str(node.get("_target_"))


def _refusal(error: InstantiationException, node: DictConfig) -> Exception:
    """Return the error to show: ours as it is, a target's ValueError or TypeError as a sentence, else the cause."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    if cause is not None:
        return cause
    if isinstance(error.__cause__, (ValueError, TypeError)):
        key = str(error).rsplit("full_key: ", 1)[-1] if "full_key: " in str(error) else _where(node)
        return UserError(f"{key}: {error.__cause__}.")
    return error.__cause__ if isinstance(error.__cause__, Exception) else error
