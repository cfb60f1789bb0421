"""What decides a run's tokens, and the id that is hashed from it: names and settings, never where code or files lie.

Run folders made before the classes moved (release 0.1) are the same runs, and their settings are still built.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from sjd2.config import PACKAGES
from sjd2.files import digest, find

PATH_KEYS = ("weights", "adapter", "library")  # settings that name files: the files' digest counts, not where they lie

LATER = {"draft_in_prefill": False}  # settings that release 0.1 lacks: with these values they change nothing

# modules of release 0.1 and where their classes are now: run folders keep the names that they were written with
MOVED = {
    "baselines.eagle.drafter": "baselines.eagle.eagle_drafter",
    "baselines.jacobi": "sjd2.decoding.jacobi",
    "baselines.untested": "baselines.accept_all",
    "evaluation.alignment": "evaluation.metrics.alignment",
    "evaluation.clip": "evaluation.metrics.clip",
    "evaluation.features": "evaluation.metrics.features",
    "evaluation.fid": "evaluation.metrics.fid",
    "evaluation.geneval": "evaluation.metrics.geneval",
    "evaluation.rewards": "evaluation.metrics.rewards",
    "evaluation.speed": "evaluation.metrics.speed",
    "sjd2.denoising.decoder": "sjd2.denoising.sjd2_decoder",
    "sjd2.denoising.drafter": "sjd2.denoising.denoise",
    "sjd2.front.drafter": "sjd2.front.front_drafter",
    "sjd2.refine": "sjd2.decoding.refine",
    "sjd2.verify": "sjd2.decoding.verify",
}
RENAMED = {"baselines.accept_all.All": "baselines.accept_all.AcceptAll"}


def current_target(target: str) -> str:
    """Return where a class that yaml names is now: 'sjd2.verify.Exact' -> 'sjd2.decoding.verify.Exact'."""
    module, _, name = target.rpartition(".")
    found = f"{MOVED.get(module, module)}.{name}" if module else name
    return RENAMED.get(found, found)


def class_name(target: str) -> str:
    """Return a class without its module; one of somebody else's keeps the package, since it may be another of that name.

    'sjd2.verify.Exact' -> 'Exact', 'mine.verify.Exact' -> 'mine:Exact'.
    """
    module, _, name = current_target(target).rpartition(".")
    package = module.partition(".")[0]
    return name if package in ("", *PACKAGES) else f"{package}:{name}"


def current_targets(node: Any) -> Any:
    """Return plain settings with every `_target_` below them where it is now."""
    if isinstance(node, dict):
        return {
            k: current_target(v) if k == "_target_" and isinstance(v, str) else current_targets(v)
            for k, v in node.items()
        }
    return [current_targets(child) for child in node] if isinstance(node, list) else node


def identity(**parts: Any) -> dict[str, Any]:
    """Return `parts`, what decides a run's tokens, and `id`, ten hex digits of their hash.

    Metrics, logger, device and limit are no parts: they continue the same run. Equal numbers are one (3 and 3.0).
    """
    parts = canonical(parts)
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:10], **parts}


def by_content(value: Any, *, covered: bool = False, key: str = "") -> Any:
    """Replace settings that name local files by the digest of their content: what counts is never where a file lies.

    covered: another digest holds the content of these files (or hub ids) already; then they only become "local".
    """
    if isinstance(value, dict):
        return {k: by_content(v, covered=covered, key=str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [by_content(v, covered=covered, key=key) for v in value]
    if key.endswith(PATH_KEYS) and covered:
        return "local"  # null too: some models know their own hub id, and the digest shows whether there is an adapter
    if isinstance(value, str) and key.endswith(PATH_KEYS) and find(value).exists():
        return digest(find(value))
    return value


def canonical(value: Any) -> Any:
    """Return settings in which equal ones are equal text: 3 and 3.0 are one number, a class has no module, no `LATER`."""
    if isinstance(value, dict):
        return {
            str(k): class_name(v) if k == "_target_" and isinstance(v, str) else canonical(v)
            for k, v in value.items()
            if k not in LATER or v != LATER[k]
        }
    if isinstance(value, (list, tuple)):
        return [canonical(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Name the first setting in which two identities differ."""
    flat_old, flat_new = dict(_flatten(canonical(old))), dict(_flatten(canonical(new)))
    for key in sorted(flat_old.keys() | flat_new.keys(), key=lambda key: (key in ("id", "digest"), key)):
        if flat_old.get(key) != flat_new.get(key):
            return f"{key}: {flat_old.get(key)} there, {flat_new.get(key)} asked for"
    return "its config.yaml names no identity"


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether two identities describe one run; those stored before class paths were left out compare equal too."""
    return _without_id(old) == _without_id(new)


def _without_id(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in canonical(dict(identity)).items() if key != "id"}
