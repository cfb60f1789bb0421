"""Which device and which dtype a setting means; names that this machine cannot serve raise UserError."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from sjd2.errors import UserError, choose, unknown

DTYPES = ("float32", "bfloat16", "float16", "float64")


def resolve_device(name: str | torch.device) -> str:
    """Return the device that `name` means: auto, cpu, mps, cuda or cuda:1; raises UserError if this machine lacks it."""
    name = str(name)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise unknown("device", name, ("auto", "cpu", "cuda", "cuda:1", "mps"))
    available: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    kind, _, number = name.partition(":")
    if kind in available and not available[kind]():
        raise UserError(f"device={name} is not available (torch sees no {kind} device); use device=auto or device=cpu.")
    if number and int(number) >= (count := torch.cuda.device_count()):
        raise UserError(f"device={name} is not available; the last GPU of this machine is cuda:{count - 1}.")
    return name


def resolve_dtype(dtype: str | torch.dtype, device: str) -> str:
    """Return the name of a floating-point dtype; auto is bfloat16 on cuda, else float32."""
    name = str(dtype).removeprefix("torch.")
    choose("dtype", name, (*DTYPES, "auto"))
    if name == "auto":
        return "bfloat16" if device.startswith("cuda") else "float32"
    if name == "float64" and device == "mps":
        raise UserError("dtype=float64 does not exist on mps; use device=cpu or dtype=float32.")
    return name
