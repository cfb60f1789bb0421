"""Projections of one input as one matrix product: queries, keys and values; gate and up.

The modules stay where they are, so that PEFT, state dicts and fine-tunings find them; their weights become views of one
matrix. The first that a layer calls computes all, the others hand out their part.

# O outputs, D width
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sjd2.models.base import ImageModel
from sjd2.models.low_rank import GROUPS, LowRank, group_of


class Product:
    """One product for several linear layers; it keeps the outputs that the layer has not taken yet."""

    def __init__(self, parts: list[Any]) -> None:
        self.sizes = [part.out_features for part in parts]
        self.weight = torch.cat([part.weight.data for part in parts])  # [O, D]
        biases = [part.bias.data for part in parts if part.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        for name, whole in (("weight", self.weight), ("bias", self.bias)):
            if whole is not None:
                for part, view in zip(parts, whole.split(self.sizes), strict=True):
                    setattr(part, name, nn.Parameter(view, requires_grad=getattr(part, name).requires_grad))
        self.parts, self.given, self.outputs = parts, None, []
        self.low_rank: LowRank | None = None  # a gated LoRA of the layers
        self.places = [own.data_ptr() for own in self._own()]
        for number, part in enumerate(parts):
            part.forward = functools.partial(self.part, number)

    def _own(self) -> list[Tensor]:
        """Return the weights and biases that the layers have now."""
        return [own for part in self.parts for own in (part.weight, part.bias) if own is not None]

    def part(self, number: int, x: Tensor) -> Tensor:
        """Return the output of one of the layers: [..., D] -> [..., O]."""
        if number == 0 and self._serves():
            whole = self._adapted(x, linear(x, self.weight, self.bias), None)
            self.given, self.outputs = x, list(whole.split(self.sizes, -1))
        elif self.given is not x:  # a layer of its own after all
            return self._adapted(x, linear(x, self.parts[number].weight, self.parts[number].bias), number)
        output = self.outputs[number]
        if number == len(self.parts) - 1:
            self.given, self.outputs = None, []
        return output

    def adapt(self, low_rank: LowRank | None) -> None:
        """Add the LoRAs of the layers to their outputs from here on; None: there are none that run together."""
        self.low_rank = low_rank
        if low_rank is not None:
            low_rank.joined = True

    def _adapted(self, x: Tensor, out: Tensor, number: int | None) -> Tensor:
        return out if self.low_rank is None else self.low_rank.add_(x, out, number)

    def _serves(self) -> bool:
        """Return whether the layers' weights are still views of the matrix, and want no gradients of their own."""
        own = self._own()
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in own)
        return not wanted and [x.data_ptr() for x in own] == self.places


def join_projections(model: ImageModel) -> int:
    """Join the projections of every layer that are plain linear layers; return how many products that saves in a pass.

    Layers that are quantised, or that accelerate moves between devices, stay as they are, and so does everything in float64.
    """
    if model.dtype == torch.float64:
        return 0
    saved = 0
    for block in model.transformer.modules():
        for names in GROUPS:
            modules: list[Any] = [getattr(block, name, None) for name in names]
            found = [getattr(module, "base_layer", module) for module in modules]  # under PEFT's
            if all(map(_plain, found)) and len({(x.weight.device, x.weight.dtype, x.bias is None) for x in found}) == 1:
                Product(found)
            if all(map(_joined, found)):
                saved += len(found) - 1
                found[0].forward.func.__self__.adapt(group_of(modules))
    return saved


def _plain(module: Any) -> bool:
    return type(module) is nn.Linear and "forward" not in vars(module)


def _joined(module: Any) -> bool:
    forward = vars(module).get("forward") if type(module) is nn.Linear else None
    return isinstance(forward, functools.partial) and isinstance(getattr(forward.func, "__self__", None), Product)
