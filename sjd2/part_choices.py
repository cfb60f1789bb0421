"""Keep the settings of decoder parts with the part they were written for.

A yaml that gives a part values means the part it chose itself: `conf/decoder/gsd.yaml` sets `verifier.distance` of GSD's
verifier. Hydra merges that into whatever verifier the command line chooses (its issue 1971). Here a layer's values reach a
part only if the layer was written for this choice; values of the command line always count. So does `lossless: false`: it
is true of the decoder's own parts, and gives way where the command replaces the inexact ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra.utils
from hydra.core.config_loader import ConfigLoader
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sjd2.errors import UserError

PARTS: tuple[str, ...] = (
    "drafter",
    "verifier",
    "refiner",
)  # of a decoder, each a config group of its own: conf/decoder/<part>/
DEFAULTS = "decoder_defaults/"
_CHOICE = re.compile(r"[+~]*decoder/")  # an override that chooses a part
_DECODER = re.compile(r"decoder/[^/]+")  # the path of a decoder's yaml; those of parts are one folder deeper

Choices = Mapping[str, str | None]
_MEANT: dict[tuple[str, ...], Choices] = {}  # by folders and words: asking Hydra takes 0.2 s


def choose_parts(words: Sequence[str], choices: Choices) -> bool:
    """Return whether a command may give its decoder other parts than the decoder's own yaml does."""
    return any(map(_CHOICE.match, words)) or any(choices.get(group) for group in ("experiment", "debug"))


def settle_parts(cfg: DictConfig, loader: ConfigLoader, name: str, words: Sequence[str]) -> None:
    """Rebuild, in place, the parts of `cfg.decoder` that a layer not meant for them wrote to; `cfg` has Hydra's node.

    Raises UserError where the command line chooses a part for a decoder that has none.
    """
    layers = _Layers(loader, name, tuple(words), tuple(cfg.hydra.runtime.config_sources))
    if layers.partless and (word := next(filter(_CHOICE.match, words), None)):
        raise UserError(f"decoder={layers.final['decoder']} drafts nothing, so it takes no {word.lstrip('+~')}.")
    settled, changed = layers.merge()
    with open_dict(cfg.decoder):
        for key in changed:
            cfg.decoder.pop(key, None)
            if key in settled:
                cfg.decoder[key] = settled._get_node(key)
        if layers.called_lossy and cfg.decoder.get("rule", "exact") == "exact":
            chosen = [cfg.decoder.get(part) for part in PARTS]
            if all(map(_exact, chosen)) and not all(map(_exact, layers.own_parts())):
                cfg.decoder.lossless = True


class _Layers:
    """The yaml files of a command in the order of their merging, and the choices of parts that each was written for."""

    def __init__(self, loader: ConfigLoader, name: str, words: tuple[str, ...], sources: tuple[Any, ...]) -> None:
        self.loader, self.name, self.words, self.sources = loader, name, words, sources
        self.listing = loader.compute_defaults_list(name, list(words), RunMode.RUN)
        self.final: Choices = self.listing.overrides.known_choices
        own = self.meant(f"decoder/{self.final['decoder']}")
        # `final` lacks a part that ~decoder/refiner removes
        self.places = {key: _place(key) for key in {**self.final, **own} if key.startswith("decoder/")}
        self.partless = all(own.get(f"decoder/{part}", "") is None for part in PARTS)  # lists them all as null: AR
        self.called_lossy = False  # by the decoder's own yaml, and by nothing after it; known after `merge`

    def meant(self, path: str) -> Choices:
        """Return the choices that the author of a yaml had in mind."""
        if not _of_decoder(path):
            asked = [word for word in self.words if not _CHOICE.match(word)]
        else:
            decoder = self.final["decoder"] if path.startswith(DEFAULTS) else path.rpartition("/")[2]
            asked = [*(word for word in self.words if word.startswith("hydra.searchpath")), f"decoder={decoder}"]
        key = (*(source.path for source in self.sources), self.name, *asked)
        if key not in _MEANT:
            _MEANT[key] = self.loader.compute_defaults_list(self.name, asked, RunMode.RUN).overrides.known_choices
        return _MEANT[key]

    def own_parts(self) -> list[Any]:
        """Return the yaml files of the parts that the decoder's own yaml chooses."""
        own = self.meant(f"decoder/{self.final['decoder']}")
        names = [f"decoder/{part}/{name}" for part in PARTS if (name := own.get(f"decoder/{part}"))]
        return [OmegaConf.create(text) for path in names if (text := _read(self.sources, path)) is not None]

    def merge(self) -> tuple[DictConfig, set[str]]:
        """Return the decoder from the values that were meant for its parts, and the keys where that changes anything."""
        merged, changed = OmegaConf.create({}), set(PARTS if self.partless else ())
        for default in self.listing.defaults:
            path = default.config_path
            values = _contribution(self.sources, path, default.package or "")
            if values is None:
                continue
            if self.partless and not _of_decoder(path):
                changed.update(map(str, values))  # what an experiment gives its decoder is not meant for AR
                continue
            if not path.startswith(tuple(f"decoder/{part}/" for part in PARTS)):
                chosen = self.meant(path)
                foreign = [place for key, place in self.places.items() if chosen.get(key) != self.final.get(key)]
                changed.update(place[0] for place in foreign if _remove(values, place))
            if "lossless" in values:
                plain = path == f"decoder/{self.final['decoder']}" and not OmegaConf.is_interpolation(
                    values, "lossless"
                )
                self.called_lossy = plain and values.lossless is False
            merged.merge_with(values)
        for override in self.listing.config_overrides:
            group, _, key = override.key_or_group.partition(".")
            if group == "decoder" and key:
                self.called_lossy &= key != "lossless"
                _apply(merged, key, override)
        return merged, changed


def _of_decoder(path: str) -> bool:
    """Return whether a yaml is a decoder's, or its defaults on a model."""
    return bool(_DECODER.fullmatch(path)) or path.startswith(DEFAULTS)


def _exact(part: Any) -> bool:
    """Return whether a part, as its yaml describes it, keeps the model's distribution whatever its settings; None does."""
    if not isinstance(part, DictConfig) or not (target := part.get("_target_")):
        return part is None
    try:
        return getattr(hydra.utils.get_object(target), "exact", False) is True
    except Exception:  # a target that cannot be imported is reported when the decoder is built
        return False


def _place(key: str) -> tuple[str, ...]:
    """Return where below `decoder` a choice lands: 'decoder/drafter@decoder.drafter.chain' -> ('drafter', 'chain')."""
    group, _, package = key.partition("@")
    return tuple((package or group.replace("/", ".")).split(".")[1:])


def _contribution(sources: Sequence[Any], path: str, package: str) -> DictConfig | None:
    """Return what a yaml writes below `decoder`, None where that is nothing."""
    top, *below = package.split(".")
    if top not in ("", "decoder") or (text := _read(sources, path)) is None:
        return None
    loaded = OmegaConf.create(text)
    if not isinstance(loaded, DictConfig):
        return None
    loaded.pop("defaults", None)
    if not package:
        found = OmegaConf.select(loaded, "decoder")
        return found if isinstance(found, DictConfig) else None
    for key in reversed(below):
        loaded = OmegaConf.create({key: loaded})
    return loaded


def _read(sources: Sequence[Any], path: str) -> str | None:
    """Return the text of a yaml, from the first of Hydra's sources that has it."""
    for source in sources:
        if source.schema not in ("file", "pkg"):
            continue
        root = Path(source.path) if source.schema == "file" else files(source.path.replace("/", "."))
        if (file := root / f"{path}.yaml").is_file():
            return file.read_text(encoding="utf-8")
    return None


def _remove(values: DictConfig, place: tuple[str, ...]) -> bool:
    """Remove the node at `place`; returns whether there was one."""
    *above, last = place
    node: Any = values
    for key in above:
        node = node.get(key) if isinstance(node, DictConfig) else None
    if not isinstance(node, DictConfig) or last not in node:
        return False
    with open_dict(node):
        del node[last]
    return True


def _apply(decoder: DictConfig, key: str, override: Any) -> None:
    """Apply a value of the command line; one that no setting takes is reported when the decoder is built."""
    if override.is_delete():
        _remove(decoder, tuple(key.split(".")))
    else:
        OmegaConf.update(decoder, key, override.value(), merge=True, force_add=True)
