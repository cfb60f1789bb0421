"""Settings files beside trained weights: what a folder must say of itself before anything heavy loads."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from sjd2.errors import UserError

T = TypeVar("T")


def read_part(folder: Path, kind: type[T], settings: str, weights: str, what: str, recipe: str) -> T:
    """Read the settings dataclass `kind` from folder/settings, with its weights beside it.

    what: the part in words, recipe: the training that makes one. Raises `UserError` if the folder does not hold one.
    """
    file = folder / settings
    if not file.is_file() or not (folder / weights).is_file():
        raise UserError(
            f"{folder} has no {settings} with {weights}, so it is no {what}; make one with stage=finetune finetune={recipe}."
        )
    try:
        values: Any = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold one JSON object of settings.")
    unknown = set(values) - {field.name for field in fields(kind)}
    if unknown:
        raise UserError(f"{file} has unknown settings: {', '.join(sorted(unknown))}.")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except TypeError as error:
        raise UserError(f"{file} has a setting of the wrong type: {error}.") from error
