"""What is trained, as one module; recomputed layers and the precision of trained weights.

Separate from sharding.py, which takes seconds to import.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")
HALF = (torch.bfloat16, torch.float16)
AT_ONCE = 2**26  # logits computed in one go, 268 MB of float32


class Objective(nn.Module):
    """All modules that are trained, under one forward: `objective(compute)` is `compute()`.

    sharded: `sharding.shard` has spread the weights over processes, which are whole only within this forward.
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.sharded = False

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()


def is_sharded(module: nn.Module) -> bool:
    """Return whether the module's weights are spread over processes."""
    return isinstance(module, Objective) and module.sharded


def recompute(layers: Iterable[nn.Module]) -> None:
    """Keep only the inputs of these layers in the forward pass and run them again in the backward pass.

    transformers' own switch takes the cache away from a layer that it checkpoints, and training after a clean copy of the
    image needs it (`windows.Past`, which may be read twice).
    """
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def widen(parameters: Iterable[nn.Parameter]) -> None:
    """Convert trained parameters to float32: a small step is lost in the 8 bits of a bfloat16."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.dtype in HALF:
            parameter.data = parameter.data.float()
