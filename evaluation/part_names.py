"""Name the parts of a decoder as the command line does: the yaml of conf/decoder/<part>/ that builds a part's class.

A run folder keeps the names, since a table may be made where a user's own yaml files are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from evaluation.identity import class_name
from sjd2.config import conf_folders

PARTS = ("drafter", "verifier", "refiner")
KEPT = "part_names"  # in a run folder's config.yaml


def part_names(decoder: Mapping[str, Any]) -> dict[str, str]:
    """Return {part: name of its yaml} of a decoder's settings; a part that no yaml builds is left out."""
    found = {}
    for part in PARTS:
        node = decoder.get(part)
        target = node.get("_target_") if isinstance(node, Mapping) else None
        if target is not None and (name := part_choices(part).get(class_name(str(target)))) is not None:
            found[part] = name
    return found


def part_choices(part: str) -> dict[str, str]:
    """Return {class name: name of its yaml} of one kind of part."""
    return _choices(part, tuple(conf_folders()))


@cache
def _choices(part: str, folders: tuple[Path, ...]) -> dict[str, str]:
    return {
        class_name(str(yaml.safe_load(file.read_text(encoding="utf-8")).get("_target_"))): file.stem
        for folder in folders
        for file in sorted((folder / "decoder" / part).glob("*.yaml"))
    }
