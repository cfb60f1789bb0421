"""The norms of a transformer as torch's own fused ones: one launch each, where transformers' modules take three to seven.

# R model rows, S slots of a pass, D width
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from sjd2.models.base import ImageModel

# in float32, the weight applied after the rounding
RMS = ("LlamaRMSNorm", "ChameleonRMSNorm", "Emu3RMSNorm", "GlmImageRMSNorm", "Qwen2RMSNorm")
PER_HEAD = "ChameleonLayerNorm"  # of queries and keys
PER_HEAD_EPS = 1e-5  # written into that class


def fuse_norms(model: ImageModel) -> int:
    """Let the norms run as one operation each and return how many do; in float64 all stay as they are.

    Chameleon's norms of queries and keys take two, since they have weights for each head; Lumina-mGPT's share one row.
    """
    if model.dtype == torch.float64:
        return 0
    count = 0
    for module in model.transformer.modules():
        if "forward" in vars(module):
            continue
        kind = type(module).__name__
        if kind in RMS:
            module.forward = functools.partial(apply_rms_norm, module)
        elif kind == PER_HEAD:
            module.forward = functools.partial(_layer_norm, module)
        else:
            continue
        count += 1
    return count


def unfuse_norms(model: ImageModel) -> None:
    """Let the norms compute as their classes do."""
    for module in model.transformer.modules():
        if is_fused(module):
            del module.forward


def is_fused(module: nn.Module) -> bool:
    """Return whether a norm runs as torch's own."""
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func in (apply_rms_norm, _layer_norm)


def apply_rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    """Return what an RMSNorm module of transformers does, in one operation: [..., D] -> [..., D]."""
    return rms_norm(hidden_states, module.weight.shape, module.weight, module.variance_epsilon)


def _layer_norm(module: nn.LayerNorm, hidden_states: Tensor) -> Tensor:
    width = hidden_states.shape[-1:]
    if len(module.weight) == 1:
        return layer_norm(hidden_states, width, module.weight[0], module.bias[0], PER_HEAD_EPS)
    return torch.addcmul(module.bias, layer_norm(hidden_states, width, eps=PER_HEAD_EPS), module.weight)
