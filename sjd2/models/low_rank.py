"""A LoRA at inference: merged into the weights, or, where a gate decides slot by slot, two products for layers of one input.

PEFT's own path takes six operations a layer. Here the layers that share an input (queries, keys and values; gate and up) share
the first product too, the gate acts on its few numbers instead of the layer's output, and the second product is added to what
the layers have computed. A slot whose gate is 0 has exactly 0.0 added.
# R model rows, S slots of a pass, D width, O outputs, r rank, n adapted layers of one input
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from sjd2.errors import first_line

ADAPTER = "sjd2"  # PEFT's name for it
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # in the order in which the layers call them


@torch.library.custom_op("sjd2::add_low_rank", mutates_args=("out",))
def add_low_rank(x: Tensor, down: Tensor, up: Tensor, gate: Tensor, out: Tensor) -> None:
    """Add gate (x down^T) up^T to `out` in place: x [M, D], down [N, D], up [O, N], gate [M] bool, out [M, O].

    One operation to whatever records or compiles a pass.
    """
    from sjd2.models import low_rank_kernel  # Triton need not be installed

    low_rank_kernel.add_low_rank(x, down, up, gate, out)


@register_flop_formula(torch.ops.sjd2.add_low_rank)
def _(x: torch.Size, down: torch.Size, up: torch.Size, *args: object, **more: object) -> int:
    return 2 * x[0] * down[0] * (x[1] + up[0])


@dataclass
class Gate:
    """Which slots of the coming pass are adapted: rows [R, S] bool, None for no slot; shut [R, S, 1]: which are not.

    fused: whether that is one operation for each input, two kernels on a GPU.
    """

    rows: Tensor | None = None
    shut: Tensor | None = None
    fused: bool = False

    def set(self, rows: Tensor | None) -> None:
        """Set both for the coming pass. What is shut is filled, not multiplied by 0: in float16 it may be infinite."""
        self.rows, self.shut = rows, None if rows is None else rows.logical_not()[..., None]


def plain(layer: Any) -> bool:
    """Return whether PEFT's layer adapts one of torch's own, neither quantised nor offloaded, with a LoRA of its dtype."""
    base, a = layer.base_layer, layer.lora_A[ADAPTER].weight
    return type(base) is nn.Linear and (base.weight.dtype, base.weight.device) == (a.dtype, a.device)


@torch.no_grad()
def merge(transformer: nn.Module, layers: Iterable[Any]) -> list[Any]:
    """Add each LoRA to its layer's weight, in float32 at least and rounded once; return the layers that cannot take it.

    PEFT's layers make way for the ones they have adapted, so that a pass costs what it costs without a fine-tuning.
    """
    wanted = {id(layer) for layer in layers}
    found: list[tuple[str, Any]] = [
        (name, module) for name, module in transformer.named_modules() if id(module) in wanted
    ]
    for name, layer in found:
        if plain(layer):
            a, b, weight = (x.weight for x in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.base_layer))
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=layer.scaling[ADAPTER]))
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, layer.base_layer)
    return [layer for _, layer in found if not plain(layer)]


class LowRank:
    """The gated LoRAs of layers with one input, in the place of PEFT's forward pass.

    parts: the layers in the order in which they are called, PEFT's where they are adapted. joined: whether the layers' own
    products are one (projections.py), which then adds all LoRAs at once.
    """

    def __init__(self, gate: Gate, parts: list[Any]) -> None:
        self.gate, self.parts, self.joined = gate, parts, False
        self.adapted = [number for number, part in enumerate(parts) if hasattr(part, "base_layer")]
        self.given: Tensor | None
        self.low: Tensor | None
        self.pointers: list[int] = []
        self.refresh()
        for number in self.adapted:
            parts[number].forward = functools.partial(self._forward, number)

    def _weights(self) -> list[Tensor]:
        layers = [self.parts[number] for number in self.adapted]
        return [x.weight for layer in layers for x in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])]

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Prepare for a pass: stack the weights again if they have moved; the LoRAs' own are views of the stacks."""
        self.given = self.low = None
        if [x.data_ptr() for x in self._weights()] == self.pointers:
            return
        first, second = self._weights()[::2], self._weights()[1::2]
        ranks, sizes = [len(a) for a in first], [part.out_features for part in self.parts]
        self.down = torch.cat([a.data for a in first])  # [n r, D]
        self.up = first[0].new_zeros(sum(sizes), sum(ranks))  # [O, n r], a block for each adapted layer
        outputs, columns = _slices(sizes), _slices(ranks)
        self.blocks: dict[int | None, tuple[slice, slice]] = {None: (slice(None), slice(None))}
        self.blocks |= {number: (outputs[number], place) for number, place in zip(self.adapted, columns, strict=True)}
        for a, b, number in zip(first, second, self.adapted, strict=True):
            rows, place = self.blocks[number]
            self.up[rows, place] = b.data
            a.data, b.data = self.down[place], self.up[rows, place]
        self.pointers = [x.data_ptr() for x in self._weights()]

    def _forward(self, number: int, x: Tensor) -> Tensor:
        """Return the output of one of the layers: [..., D] -> [..., O]."""
        out = self.parts[number].base_layer(x)
        return out if self.joined else self.add_(x, out, number)

    def add_(self, x: Tensor, out: Tensor, number: int | None = None) -> Tensor:
        """Add to `out` [..., O] what the LoRA of a layer makes of x [..., D]; number=None: all, to the joined output."""
        if self.gate.rows is None or self.gate.shut is None or (number is not None and number not in self.blocks):
            return out
        if self.gate.fused and (number is None or len(self.parts) == 1):
            flat = x.flatten(0, -2), out.view(-1, out.shape[-1])
            add_low_rank(flat[0], self.down, self.up, self.gate.rows.to(x.device).flatten(), flat[1])
            return out
        if self.given is not x:
            low = linear(x, self.down).masked_fill_(self.gate.shut.to(x.device), 0.0)
            self.given, self.low = x, low.flatten(0, -2)
        assert self.low is not None
        rows, columns = self.blocks[number]
        out.view(-1, out.shape[-1]).addmm_(self.low[:, columns], self.up[rows, columns].t())
        if number is None or number == self.adapted[-1]:
            self.given = self.low = None
        return out


def stack(transformer: nn.Module, layers: Iterable[Any], gate: Gate) -> tuple[list[LowRank], list[Any]]:
    """Let gated LoRAs run as stacked products; return these, and the layers that stay as PEFT has them."""
    left = {id(layer): layer for layer in layers}
    groups = []
    for block in transformer.modules():
        for names in GROUPS:
            parts: list[Any] = [getattr(block, name, None) for name in names]
            found = [part for part in parts if id(part) in left]
            if found and None not in parts and all(map(plain, found)) and len({_place(part) for part in found}) == 1:
                groups.append(LowRank(gate, parts))
                for part in found:
                    del left[id(part)]
    for layer in list(left.values()):
        if plain(layer):
            groups.append(LowRank(gate, [layer]))
            del left[id(layer)]
    return groups, list(left.values())


@torch.inference_mode()
def fuse_low_rank(gate: Gate, groups: list[LowRank]) -> str | None:
    """Let the stacked products run as kernels; return why they do not, or None. They are compared with torch's first."""
    gate.fused = False
    why = _obstacle(groups[0].down, max(group.down.shape[0] for group in groups))
    if why is None:
        shapes = {(group.down.shape, len(group.up)): group for group in groups}
        why = next(filter(None, map(_fault, shapes.values())), None)
    gate.fused = why is None
    return why


def _obstacle(weight: Tensor, numbers: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from sjd2.models.low_rank_kernel import WIDEST
    from sjd2.models.window_attention import OLDEST, TOLERANCE

    if weight.dtype not in TOLERANCE:
        return f"{str(weight.dtype).removeprefix('torch.')} stays on torch's products"
    if weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) < OLDEST:
        return f"{torch.cuda.get_device_name(weight.device)} is older than Ampere"
    return f"{numbers} low-rank numbers are more than {WIDEST}" if numbers > WIDEST else None


def _fault(group: LowRank) -> str | None:
    """Run the kernels in their shapes against torch's products in float32; return what went wrong, or None."""
    from sjd2.models.window_attention import TOLERANCE

    down, up = group.down, group.up
    random = torch.Generator(down.device).manual_seed(0)
    try:
        for rows in (1, 19, 150):
            x, out, a, b = (
                torch.randn(*shape, generator=random, device=down.device).to(down.dtype)
                for shape in ((rows, down.shape[1]), (rows, len(up)), down.shape, up.shape)
            )
            gate = torch.arange(rows, device=down.device) % 2 == 1
            before = out.clone()
            add_low_rank(x, a, b, gate, out)
            wanted = before.float() + (x.float() @ a.float().T * gate[:, None]) @ b.float().T
            error = float((out.float() - wanted).norm() / wanted.norm())
            if not error < TOLERANCE[x.dtype]:
                return f"the kernels differ from torch's products by {error:.1e}"
            if not torch.equal(out[::2], before[::2]):
                return "the kernels change slots whose gate is 0"
    except Exception as error:  # whatever the compiler or the driver raises: torch's products still run
        return first_line(error)
    return None


def group_of(modules: list[Any]) -> LowRank | None:
    """Return what runs the LoRAs of these layers together, if it is the same for all that are adapted."""
    adapted = [module for module in modules if hasattr(module, "base_layer")]
    forwards = [vars(module).get("forward") for module in adapted]
    owners = [getattr(getattr(forward, "func", None), "__self__", None) for forward in forwards]
    one = isinstance(owners[0], LowRank) if owners else False
    return owners[0] if one and all(owner is owners[0] for owner in owners) else None


def _place(layer: Any) -> tuple[torch.device, torch.dtype]:
    weight = layer.lora_A[ADAPTER].weight
    return weight.device, weight.dtype


def _slices(sizes: list[int]) -> list[slice]:
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
