"""Write safetensors one tensor at a time: a model's weights need not lie in memory twice, nor whole on any one process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

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
