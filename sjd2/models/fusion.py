"""What makes a model's passes fast on a GPU without changing more than rounding: fewer products, few kernels between them."""

from __future__ import annotations

import torch

from sjd2.models.adapter import Adapter
from sjd2.models.base import ImageModel
from sjd2.models.fused_layers import remove_layers
from sjd2.models.layer_check import fuse_layers
from sjd2.models.norms import fuse_norms, unfuse_norms
from sjd2.models.pixels import fuse_pixels
from sjd2.models.projections import join_projections
from sjd2.models.window_attention import fuse_attention, kernels_missing


def fuse(model: ImageModel, wanted: bool = True) -> list[str]:
    """Fuse what a loaded model computes on a GPU; return what is left out and why, a sentence each without its period.

    wanted=False: layers compute as transformers wrote them; joined projections and pixels stay. On a CPU nothing is fused.
    """
    left_out = [] if model.adapter is None else _fuse_adapter(model.adapter, wanted and model.device.type == "cuda")
    if wanted and model.device.type == "cuda":
        if join_projections(model) == 0 and model.dtype != torch.float64:
            left_out.append("projections run one by one: no layer has plain linear ones")
        fuse_norms(model)
        fuse_pixels(model)
    why = fuse_attention(model, wanted)
    if why is not None:
        left_out.append(f"attention runs as torch's SDPA, not as one kernel: {why}")
    if not wanted:
        remove_layers(model.transformer)
        unfuse_norms(model)
    elif model.device.type == "cuda" and kernels_missing(model) is None:  # otherwise attention has reported why
        left_out += fuse_layers(model)
    return left_out


def _fuse_adapter(adapter: Adapter, wanted: bool) -> list[str]:
    left_out = []
    if adapter.left_out:
        left_out.append(
            f"the fine-tuning of {adapter.left_out} layers runs beside them, as PEFT has it: they are quantised, or not on "
            "the device they compute on"
        )
    why = adapter.fuse(wanted)
    if why is not None:
        left_out.append(f"the fine-tuning runs as torch's products, not as kernels: {why}")
    return left_out
