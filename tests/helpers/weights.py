"""Small weight folders, and errors that must be one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sjd2.errors import UserError


def raises_in_one_line(call: Callable[[], object], match: str) -> None:
    """Assert that `call` raises a `UserError` whose message is one line that matches."""
    with pytest.raises(UserError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def drop(folder: Path, name: str) -> None:
    """Remove a tensor from a folder's safetensors and from its index."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, metadata={"format": "pt"})
            break
    else:
        raise KeyError(name)
    for index in folder.glob("*.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"].pop(name)
        index.write_text(json.dumps(content))


def fill(folder: Path, *, shards: int = 1) -> Path:
    """Write a config and weights, sharded with an index if `shards` is more than 1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    names = ["model.safetensors"] if shards == 1 else [f"model-{i}.safetensors" for i in range(shards)]
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.full((4, 2), float(number))}, folder / name)
    if shards > 1:
        weight_map = {f"w{number}": name for number, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
