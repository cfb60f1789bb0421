"""What makes a model's passes fast on a GPU without changing more than rounding: fewer products, one kernel for attention."""

from __future__ import annotations

import torch

from sjd2.models.base import ImageModel
from sjd2.models.norms import fuse_norms
from sjd2.models.projections import join_projections
from sjd2.models.window_attention import fuse_attention


def fuse(model: ImageModel, wanted: bool = True) -> list[str]:
    """Fuse what a loaded model computes on a GPU; return what is left out and why, a sentence each without its period.

    wanted=False: attention is SDPA, projections and norms that were fused stay so. On a CPU nothing is fused.
    """
    left_out = []
    if wanted and model.device.type == "cuda":
        if join_projections(model) == 0 and model.dtype != torch.float64:
            left_out.append("projections run one by one: no layer has plain linear ones")
        fuse_norms(model)
    why = fuse_attention(model, wanted)
    if why is not None:
        left_out.append(f"attention runs as torch's SDPA, not as one kernel: {why}")
    return left_out
