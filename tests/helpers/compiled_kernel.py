"""Compile the kernels for a card that is not there: python -m tests.helpers.compiled_kernel CAPABILITY [WIDTHS].

Prints for each shape of a program the shared memory it takes (bytes) and what a thread spills (bytes), as JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sjd2.models.layer_kernels import BLOCK, _add_norm, _rotary_store, _silu_product, norm_shape, rotary_shape
from sjd2.models.low_rank_kernel import _down, _up, shape_of
from sjd2.models.window_kernel import PARTS, Card, _attend, _merge, _store, tile

SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes that one program may take
NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
EVEN = ("query", "key", "value", "keys", "values", "lengths", "seen", "slots", "out", "partial", "tops", "totals")
EVEN += ("query_row", "query_head", "query_slot", "key_row", "key_head", "key_slot", "capacity")  # multiples of 16
EVEN += ("value_row", "value_head", "value_slot", "cos_slot", "sin_slot", "query_norm", "key_norm")
EVEN += ("gate_row", "up_row", "residual_row", "delta_row", "width")
POINTERS = ("query", "key", "value", "keys", "values", "out", "cos", "sin", "gate", "up", "residual", "delta", "before")
POINTERS += ("after", "total", "normed", "query_weight", "query_bias", "key_weight", "key_bias")
EVEN += (*POINTERS, "x", "down", "parts", "x_row", "out_row", "chunk")
HEADS = 32


def build(kernel: Any, capability: int, types: dict[str, str], fixed: dict[str, Any], options: dict[str, Any]) -> Any:
    """Compile a kernel whose arguments are int32 unless `types` says otherwise, or constants."""
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    kinds = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(fixed, "constexpr")
    place = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs={place[name]: value for name, value in fixed.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in EVEN if name in place},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compiled(capability: int, width: int, dtype: torch.dtype, slots: int) -> dict[str, Any]:
    """Compile the kernels as they would be launched on 32 heads, the entries split."""
    shape, name = tile(slots, width, dtype, Card(132, SHARED[capability], capability == 90)), NAMES[dtype]
    options = {key: shape.pop(key) for key in ("num_warps", "num_stages")}
    fixed = {"WIDTH": width, "PADDED": max(16, triton.next_power_of_2(width))}
    types = dict.fromkeys(("query", "key", "value", "keys", "values"), name) | {"lengths": "*i64", "slots": "*i64"}
    types |= dict.fromkeys(("out", "tops", "totals", "partial"), "*fp32") | {"seen": "*u8", "scale": "fp32"}

    kernels = {
        "attend": (_attend, {**fixed, **shape, "HEADS": HEADS, "GROUP": 1, "WHOLE": False}, options),
        "merge": (_merge, {**fixed, "PARTS": PARTS}, {"num_warps": 2}),
        "store": (_store, {**fixed, "SHARED": HEADS, "TILE": min(16, triton.next_power_of_2(slots))}, {}),
    }
    return {
        key: build(kernel, capability, types, constants, settings)
        for key, (kernel, constants, settings) in kernels.items()
    }


def compiled_layer(capability: int, width: int, dtype: torch.dtype, slots: int) -> dict[str, Any]:
    """Compile what runs between a layer's products, for a layer as wide as its heads."""
    norm, rotary = norm_shape(HEADS * width), rotary_shape(slots, width)
    shapes = {
        "silu": (_silu_product, {"BLOCK": BLOCK}),
        "norm": (_add_norm, {"BEFORE": True, "AFTER": True, **norm}),
        "rotary": (
            _rotary_store,
            {"WIDTH": width, "HEADS": HEADS, "SHARED": HEADS, "ROTARY": width, "NORM": True, **rotary},
        ),
    }
    types = dict.fromkeys(POINTERS, NAMES[dtype]) | {"slots": "*i64"}
    types |= dict.fromkeys(("eps", "eps_before", "eps_after"), "fp32")
    kernels = {}
    for name, (kernel, fixed) in shapes.items():
        options = {"num_warps": fixed.pop("num_warps", 4)}
        kernels[name] = build(kernel, capability, types, fixed, options)
    return kernels


def compiled_low_rank(capability: int, dtype: torch.dtype, slots: int) -> dict[str, Any]:
    """Compile the products of a gated LoRA of rank 16 on queries, keys and values."""
    fixed, columns = shape_of(2 * slots, 48, dtype)
    types = dict.fromkeys(("x", "down", "up", "out"), NAMES[dtype]) | {"parts": "*fp32", "gate": "*u8"}
    return {
        "down": build(_down, capability, types, {**fixed, "BLOCK": 64}, {}),
        "up": build(_up, capability, types, {**fixed, "BLOCK": columns}, {}),
    }


def stack(cubin: bytes) -> int:
    """Return the bytes of a thread's stack: registers that were spilled."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1])


def main(capability: int, widths: list[int]) -> None:
    shapes = []
    for dtype, width, slots in product(NAMES, widths, (96, 1)):
        kernels = compiled(capability, width, dtype, slots) | compiled_layer(capability, width, dtype, slots)
        if width == widths[0]:  # it knows no heads
            kernels |= compiled_low_rank(capability, dtype, slots)
        for name, kernel in kernels.items():
            about = {"kernel": name, "dtype": str(dtype), "width": width, "slots": slots, "limit": SHARED[capability]}
            shapes.append(about | {"shared": kernel.metadata.shared, "spilled": stack(kernel.asm["cubin"])})
            print(shapes[-1], file=sys.stderr, flush=True)
    print(json.dumps(shapes))


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(width) for width in sys.argv[2:]] or [100, 128])
