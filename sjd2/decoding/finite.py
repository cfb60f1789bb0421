"""Distributions that are not finite: noted on the device in every pass, reported where the host looks anyway.

A NaN is drawn from like any other number (inverse CDF then returns code 0), so without this a run of a model that overflows
ends with images, and no word. Noting costs a few operations on [B, S] values; nothing waits for the device.
# B samples, S slots, V image vocabulary
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError
from sjd2.models.base import ImageModel


class FaultSource(IntEnum):
    """Where numbers that are not finite came from, in the order in which one leads to the next."""

    PROMPT = 0  # the encoded prompt
    MODEL = 1  # the target distribution
    DRAFT = 2  # a draft network's distribution


def finite_rows(probs: Tensor) -> Tensor:
    """Return which rows have finite probabilities: [B, ..., V] -> [B].

    One NaN or infinite logit makes all V probabilities of a softmax NaN, so looking at the first is enough.
    """
    return probs[..., 0].isfinite().flatten(1).all(1)


def not_finite(finite: Tensor, model: ImageModel, sampling: SamplingParams) -> UserError:
    """Return the error for a batch with `finite` [3, B] by `FaultSource`: what is not finite, and the likely fix."""
    source = FaultSource(int((~finite).any(1).int().argmax()))
    row = int((~finite[source]).int().argmax()) + 1
    dtype = str(model.dtype).removeprefix("torch.")
    what = {
        FaultSource.PROMPT: "the encoded prompt",
        FaultSource.MODEL: "the model's distribution",
        FaultSource.DRAFT: "the distribution of the decoder's draft network",
    }[source]
    found = f"{what} is not finite (NaN or infinity; row {row} of the batch, dtype={dtype})"
    if model.dtype == torch.float16:
        return UserError(f"{found}: float16 ends at 65504; use dtype=bfloat16 or float32.")
    if source is FaultSource.DRAFT:
        return UserError(f"{found}: check decoder.drafter.weights.")
    if (tensor := _damaged(model)) is not None:
        return UserError(f"{found}: the weights themselves hold such numbers ({tensor}); get or train them anew.")
    if source is FaultSource.PROMPT:
        return UserError(f"{found}: check the weights of the text encoder and the prompt.")
    if model.spec is not None and model.spec.quantisation == "8bit":
        return UserError(f"{found}: 8-bit layers compute in float16, which ends at 65504; use model.quantisation=4bit.")
    settings = f"guidance_scale={sampling.guidance_scale:g} and temperature={sampling.temperature:g}"
    return UserError(f"{found} with {settings}: take values nearer to 1, or a dtype of a wider range.")


def _damaged(model: ImageModel) -> str | None:
    """Return the name of a weight that is not finite, if there is one; waits for the device."""
    for name, parameter in model.transformer.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            return name
    return None
