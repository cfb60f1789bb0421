"""What makes a model's passes fast on a GPU without changing more than rounding: fewer products, one kernel for attention."""

from __future__ import annotations

from sjd2.models.base import ImageModel
from sjd2.models.norms import fuse_norms
from sjd2.models.projections import join_projections
from sjd2.models.window_attention import fuse_attention


def fuse(model: ImageModel, wanted: bool = True) -> str | None:
    """Fuse what a loaded model computes on a GPU; return why its attention is SDPA all the same, else None.

    wanted=False: attention is SDPA, projections and norms that were fused stay so. On a CPU nothing is fused.
    """
    if wanted and model.device.type == "cuda":
        join_projections(model)
        fuse_norms(model)
    return fuse_attention(model, wanted)
