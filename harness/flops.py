"""Count what a decoder computes: floating-point operations of one image per token, as table 4 of the SJD2 paper has them."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.generate import generate
from sjd2.decoding.noise import sample_seed
from sjd2.decoding.sampling import SamplingParams
from sjd2.models.base import ImageModel


def gflops_per_token(
    model: ImageModel, decoder: BaseDecoder, prompt: str, sampling: SamplingParams, seed: int
) -> float:
    """Decode one prompt under torch's counter and return GFLOP per image token, prefill and draft network included.

    Matrix products and attention count, two operations per multiply-add, both guidance branches; sampling and pixels do not.
    """
    with torch.inference_mode():
        condition = model.encode([prompt])
    # the counter knows SDPA, the lengths of its keys, and operations that run one by one
    fused, model.fused, compiler, model.compiler = model.fused, False, model.compiler, None
    try:
        with FlopCounterMode(display=False) as counter:
            generate(model, decoder, condition, [sample_seed(seed, 0, 0)], sampling=sampling)
    finally:
        model.fused, model.compiler = fused, compiler
    return counter.get_total_flops() / model.layout.length / 1e9
