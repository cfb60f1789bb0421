"""Trained parts on disk, settings beside weights: settings are read before anything heavy loads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from sjd2.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, write: bool = True) -> None:
    """Write tensors as `dtype` to one safetensors file, which appears only when it is complete.

    Sharded tensors (DTensor) are gathered one by one, so all processes have to call this, one of them with `write`.
    """
    header, end = {}, 0
    width = torch.empty(0, dtype=dtype).element_size()
    for name in sorted(tensors):
        begin, end = end, end + tensors[name].numel() * width
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers want the data aligned
    part = path.with_name(path.name + ".part")
    with open(part if write else os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            tensor: Any = tensors[name].detach()
            full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if write:
                flat = full.to(device="cpu", dtype=dtype).contiguous().flatten()
                file.write(flat.view(torch.uint8).numpy().data)
    if write:
        os.replace(part, path)


def read_part(
    folder: Path, settings_type: type[Settings], *, settings: str, weights: str, what: str, recipe: str
) -> Settings:
    """Read the settings of a trained part, a dataclass, from its folder.

    settings, weights: the names of its two files. what: the part in messages. recipe: the training that makes one. Raises
    `UserError` if the folder does not hold one.
    """
    file = folder / settings
    if not file.is_file() or not (folder / weights).is_file():
        raise UserError(
            f"{folder} has no {settings} with {weights}, so it holds no {what}; make one with "
            f"stage=finetune finetune={recipe}."
        )
    try:
        values: Any = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); copy the folder again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold one JSON object of settings; copy the folder again.")
    unknown = set(values) - {field.name for field in fields(settings_type)}
    if unknown:
        raise UserError(f"{file} has unknown settings: {', '.join(sorted(unknown))}; it was made by another version.")
    try:
        return settings_type(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        )
    except TypeError as error:
        raise UserError(f"{file} has a setting of the wrong type: {error}.") from error
