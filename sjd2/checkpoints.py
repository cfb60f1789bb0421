"""Trained parts on disk: settings beside their weights, read before anything heavy loads; weights written tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sjd2.errors import UserError

T = TypeVar("T")
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, write: bool = True) -> None:
    """Write tensors as `dtype` to one file, in its place only when it is complete.

    Sharded tensors (DTensor) are gathered one by one, so all their processes have to call, one of them with `write`.
    """
    header, end = {}, 0
    width = torch.empty(0, dtype=dtype).element_size()
    for name in sorted(tensors):
        begin, end = end, end + tensors[name].numel() * width
        header[name] = {"dtype": NAMES[dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers want the data aligned
    part = path.with_name(path.name + ".part")
    with open(part if write else os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            tensor = tensors[name].detach()
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if write:
                flat = full.to(device="cpu", dtype=dtype).contiguous().flatten()
                file.write(memoryview(flat.view(torch.uint8).numpy()))
    if write:
        os.replace(part, path)


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
