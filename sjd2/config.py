"""Find and compose the yaml files, and build the objects they describe, with errors that name the setting and the fix.

`compose` leaves Hydra's global state as it found it, so it works inside anybody's `@hydra.main`. `instantiate` is the only
place that calls Hydra's: it works with hydra-core 1.3 (which passes unknown keywords on to the target) as well as 1.4 and
1.5 (which warn or fail without `_execution_whitelist_`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import inspect
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

import hydra
import hydra.utils
import hydra.version
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from sjd2.errors import UserError, unknown
from sjd2.part_choices import choose_parts, settle_parts

_HERE = Path(__file__).resolve().parent
INSTALLED = (_HERE / "conf").is_dir()  # from a wheel, which carries conf/ inside; else this is a checkout
CONF = _HERE / "conf" if INSTALLED else _HERE.parent / "conf"
PACKAGES = ("sjd2", "baselines", "evaluation", "harness", "sweeps", "benchmarks")  # that a `_target_` may name
_HOME = re.compile(r"((?:local-dir|transformers):)?(~[\w.-]*)(?=/|$)")
PLUGINS = "sjd2.plugins"  # entry-point group of packages that bring decoders, models or metrics in a conf/ of their own
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}


# ---- the yaml files


@cache
def plugins() -> dict[str, Path]:
    """Return the conf/ folder of every package that the entry points `sjd2.plugins` name; none of them is imported."""
    found = {}
    for entry in importlib.metadata.entry_points(group=PLUGINS):
        spec = importlib.util.find_spec(entry.module)
        places = [Path(place) / "conf" for place in (spec.submodule_search_locations or ())] if spec else []
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise UserError(f"plug-in '{entry.name}' names the package {entry.module}, which has no conf/ folder.")
        found[entry.module] = folder.resolve()
    return found


def conf_folders(search: Iterable[str | Path] = ()) -> list[Path]:
    """Return every folder that yaml files come from: ours, those of `--config-dir` or `search`, those of plug-ins."""
    return [CONF, *dict.fromkeys([*map(Path, search), *_command_line_folders(), *plugins().values()])]


def choices(group: str, search: Iterable[str | Path] = ()) -> list[str]:
    """Return the names of a config group, e.g. `decoder`, sorted."""
    return sorted({file.stem for folder in conf_folders(search) for file in (folder / group).glob("*.yaml")})


def compose(
    overrides: Sequence[str], *, search: Iterable[str | Path] = (), folder: str | Path = CONF, name: str = "config"
) -> DictConfig:
    """Compose the settings of a command line; Hydra's global state stays as it was.

    search: further folders of yaml files, as of `--config-dir`. folder, name: where the main configuration lies.
    """
    if search := [str(Path(place).resolve()) for place in search]:
        places = ",".join(f"'file://{place}'" for place in dict.fromkeys([*search, *map(str, plugins().values())]))
        overrides = [*overrides, f"hydra.searchpath=[{places}]"]  # takes the place of what config.yaml says
    with _own_hydra(), hydra.initialize_config_dir(str(folder), version_base="1.3"):
        cfg = hydra.compose(name, list(overrides), return_hydra_config=True)
        if choose_parts(overrides, cfg.hydra.runtime.choices):
            settle_parts(cfg, GlobalHydra.instance().config_loader(), name, overrides)
    with open_dict(cfg):
        del cfg["hydra"]
    expand_home(cfg)
    return cfg


@contextlib.contextmanager
def _own_hydra() -> Iterator[None]:
    """Set a running Hydra application aside, and put it back at the end."""
    outer, version = GlobalHydra.instance().hydra, copy.copy(hydra.version.VersionBase.instance())
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        if outer is not None:
            GlobalHydra.instance().initialize(outer)
        hydra.version.VersionBase.set_instance(version)


def _command_line_folders() -> list[Path]:
    """Return the folders that this command named with --config-dir or hydra.searchpath=."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    return [Path(source.path) for source in sources if "command-line" in source.provider and source.schema == "file"]


def _trusted() -> list[str]:
    """Return the packages that a `_target_` may name: ours, plug-ins, and those of yaml files the user pointed at."""
    text = "".join(file.read_text("utf-8") for folder in _command_line_folders() for file in folder.rglob("*.yaml"))
    named = re.findall(r"^\s*_target_:\s*['\"]?(\w+)", text, re.MULTILINE)
    return [f"{package}.*" for package in dict.fromkeys([*PACKAGES, *plugins(), *named])]


def home(text: str) -> str:
    """Return a setting whose leading `~` is a home folder, also after the kind of a model: local-dir:~/clip."""
    found = _HOME.match(text)
    return f"{found[1] or ''}{os.path.expanduser(found[2])}{text[found.end() :]}" if found else text


# in yaml: lossless: ${equal:${decoder.rule},exact}
OmegaConf.register_new_resolver("equal", lambda value, other: value == other, replace=True)
# in config.yaml: where Hydra itself writes
OmegaConf.register_new_resolver("home", home, replace=True)
# in config.yaml: where plug-ins keep their yaml files
OmegaConf.register_new_resolver("plugins", lambda: [f"file://{folder}" for folder in plugins().values()], replace=True)


# ---- objects


def instantiate(node: DictConfig | ListConfig, **extra: Any) -> Any:
    """Build the object that `node` describes; `extra` are arguments that no yaml can hold.

    Raises UserError in one sentence for a wrong type, an unknown or missing key, or a value that the target refuses.
    """
    check_node(node, extra)
    if "_execution_whitelist_" in inspect.signature(hydra.utils.instantiate).parameters:
        extra = {**extra, "_execution_whitelist_": _trusted()}
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


def expand_home(node: Any) -> None:
    """Put home folders into the settings below `node`, in place: the one place that does, for every path."""
    keys = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        child = node._get_node(key)
        if isinstance(child, (DictConfig, ListConfig)):
            if not child._is_none() and not child._is_missing() and not child._is_interpolation():
                expand_home(child)
        elif child is not None and isinstance(value := child._value(), str) and (new := home(value)) != value:
            node[key] = new


def plain(node: DictConfig) -> dict[str, Any]:
    """Return a node as plain dictionaries and lists, with everything resolved."""
    return typing.cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True))


def fits(value: Any, hint: Any) -> bool:
    """Return whether a yaml value can stand for a parameter of this type; types that yaml cannot hold always fit."""
    if hint is Any:  # a class since Python 3.11
        return True
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
    if inspect.isclass(hint) and hint.__module__ != "builtins":  # an object: yaml writes it with a _target_
        return issubclass(hint, (Mapping, str)) or not isinstance(value, (str, int, float, Mapping))
    return True


def describe(hint: Any) -> str:
    """Describe in words what `fits` asks for."""
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
    values = plain(node)
    for key, value in values.items():
        if key.startswith("_"):
            continue
        if key not in parameters:
            if open_ended:
                continue
            raise unknown(f"setting of {_where(node)}", key, parameters)
        if isinstance(value, Mapping) and "_target_" in value:
            continue
        if not fits(value, hints.get(key, Any)):
            where = _where(node, str(key))
            group = where.replace(".", "/")
            fix = f"; write {group}={value}" if value in choices(group) else ""
            raise UserError(f"{where} must be {describe(hints[key])}, got {value!r}{fix}.")
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
    """Return the parameters' types, without those that name things that only a type checker imports."""
    layers = [target]
    if inspect.isclass(target):
        layers = [target.__init__] if _own_init(target) else list(reversed(target.__mro__))
    found: dict[str, Any] = {}
    for layer in layers:
        for name, annotation in inspect.get_annotations(layer).items():
            alone = type(name, (), {"__module__": layer.__module__, "__annotations__": {name: annotation}})
            with contextlib.suppress(NameError):
                found |= typing.get_type_hints(alone)
    return found


def _own_init(target: Any) -> bool:
    return inspect.isclass(target) and "__dataclass_fields__" not in vars(target)


def _where(node: DictConfig | ListConfig, key: str | None = None) -> str:
    return node._get_full_key(key) or str(OmegaConf.select(node, "_target_"))


def _refusal(error: InstantiationException, node: DictConfig | ListConfig) -> Exception:
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
