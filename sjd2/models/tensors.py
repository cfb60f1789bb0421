"""Tensors in files: safetensors headers, single files, shards of a folder; and copying them into a module that must match.

Only safetensors and torch files without code are read (`weights_only=True`).
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sjd2.errors import UserError, first_line

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_tensors(path: Path, key: str) -> dict[str, Tensor]:
    """Read the tensors of a file (.safetensors; .pt, .pth, .ckpt, .bin without code) or of a folder's shards.

    A wrapping `{"model": {...}}` or `{"state_dict": {...}}` is opened. key: the setting that names `path`, for messages.
    Raises `UserError` if it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.is_dir():
        index = shard_index(path)
        files = [path / name for name in shard_names(index)] if index else sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{key}={path} holds no .safetensors file.")
        return {name: tensor for file in files for name, tensor in read_tensors(file, key).items()}
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{key}={path} cannot be read as weights: {first_line(error)}") from error
    for wrapper in ("model", "state_dict", "module"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict):
        raise UserError(f"{key}={path} holds a {type(found).__name__}, not named tensors.")
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def read_torchscript(path: Path, key: str) -> dict[str, Tensor]:
    """Read the tensors of a TorchScript file, in memory of the host; the program inside is not run.

    Raises `UserError` if it cannot be read.
    """
    check_pointer(path, key)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # deprecated, but the files are published in this format only
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{key}={path} cannot be read as TorchScript: {first_line(error)}") from error


def load_exactly(
    module: nn.Module, tensors: dict[str, Tensor], what: str, stored_name: Callable[[str], str] = str
) -> None:
    """Copy tensors into a module that has exactly these names and shapes.

    what: the weights as messages call them, e.g. "model.vq_weights=vq.pt". stored_name: the file's name of one of the module's
    tensors. Raises `UserError` naming the first mismatch.
    """
    own = {stored_name(name): tensor for name, tensor in module.state_dict().items()}
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        problem = f"lacks {missing[0]!r}" if missing else f"has an unknown {unknown[0]!r}"
        raise UserError(f"{what} {problem} ({len(missing)} missing, {len(unknown)} unknown tensors).")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            found, expected = tuple(tensors[name].shape), tuple(tensor.shape)
            raise UserError(f"{what}: {name!r} has shape {found}, but the model expects {expected}.")
    module.load_state_dict({name: tensors[stored_name(name)] for name in module.state_dict()})


def read_header(file: Path, key: str) -> dict[str, Any]:
    """Read the header of a safetensors file without its tensors: name -> {dtype, shape, data_offsets}.

    Raises `UserError` if the file is not one.
    """
    check_pointer(file, key)
    size = header_size(file)
    with file.open("rb") as handle:
        handle.seek(8)
        try:
            return json.loads(handle.read(size) if 0 < size < 2**28 else b"")
        except ValueError as error:
            raise UserError(
                f"{key}: {file} is not a safetensors file, or a damaged one; copy or download it again."
            ) from error


def check_pointer(file: Path, key: str) -> None:
    """Raise `UserError` if a file is what `git clone` leaves in place of weights without Git LFS."""
    with file.open("rb") as handle:
        if handle.read(20) == b"version https://git-":
            raise UserError(f"{key}: {file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder.")


def header_size(file: Path) -> int:
    """Return the bytes of a safetensors file's header, without the 8 that hold this number."""
    with file.open("rb") as handle:
        return int.from_bytes(handle.read(8), "little")


def stored_bytes(folder: Path, dtype: torch.dtype, prefixes: tuple[str, ...] = ("",)) -> float:
    """Return the bytes that a folder's safetensors take once loaded in `dtype`; prefixes: of the names that count."""
    total = 0.0
    for file in folder.glob("*.safetensors"):
        for name, entry in read_header(file, str(folder)).items():
            if name != "__metadata__" and name.startswith(prefixes):
                count = torch.Size(entry["shape"]).numel()
                total += count * (dtype.itemsize if entry["dtype"] in ("F64", "F32", "F16", "BF16") else 1)
    return total


def stored_shape(folder: Path, name: str) -> tuple[int, ...] | None:
    """Return the shape of one tensor in a folder's safetensors files, None if it is not there; reads headers only."""
    found = (read_header(file, str(folder)).get(name) for file in sorted(folder.glob("*.safetensors")))
    return next((tuple(entry["shape"]) for entry in found if entry is not None), None)


def shard_index(folder: Path) -> Path | None:
    """Return the index of a folder's shards, None without one; where safetensors exist, .bin files are never read."""
    names = INDEXES[:1] if any(folder.glob("*.safetensors")) else INDEXES
    return next((folder / name for name in names if (folder / name).is_file()), None)


def shard_names(index: Path) -> list[str]:
    """Return the names of the shards that an index lists."""
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))
