"""The kernels between a layer's products against plain torch: on a CPU under Triton's interpreter, on a GPU as compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sjd2.models.layer_ops import add_norm, rotary_store, silu_product
from tests.helpers import reference_kernels

# older ones do not interpret with numpy 2.4
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.9")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3}  # the interpreter has no bfloat16 of its own


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("width", "dtype"), [(48, torch.float32), (1031, torch.float16)])
def test_silu_and_product(width: int, dtype: torch.dtype) -> None:
    both = numbers(2, 3, 2 * width, dtype=dtype)
    both[0, 0, :2] = torch.tensor([-80.0, 80.0])
    gate, up = both.chunk(2, -1)  # rows of one matrix, as a joined product leaves them
    wanted = reference_kernels.silu_product(gate.double(), up.double())
    assert error(silu_product(gate, up), wanted) < LIMITS[dtype]
    assert error(silu_product(gate.clone(), up), wanted) < LIMITS[dtype]  # a LoRA makes a tensor of its own


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("width", "dtype"), [(20, torch.float32), (300, torch.float16)])
def test_residual_and_norm(width: int, dtype: torch.dtype, before: bool, after: bool) -> None:
    residual, delta = numbers(2, 3, width, dtype=dtype), numbers(2, 3, 2 * width, dtype=dtype)[..., :width]
    weights = [numbers(width, dtype=dtype) + 1 if there else None for there in (before, after)]
    found = add_norm(residual, delta, *weights, 1e-2, 1e-5)
    wanted = reference_kernels.add_norm(
        *(x if x is None else x.double() for x in (residual, delta, *weights)), 1e-2, 1e-5
    )
    assert all(
        x.shape == y.shape and error(x, y) < LIMITS[dtype] for x, y in zip(found, wanted, strict=True) if y.numel()
    )


@pytest.mark.parametrize(
    ("heads", "shared", "slots", "width", "rotary", "norm", "dtype"),
    [
        (2, 2, 1, 16, 16, 2, torch.float32),  # AR; Chameleon's norms, weights for each head
        (3, 1, 9, 20, 20, 0, torch.float32),  # a group of heads, more slots than a program takes, a width of its own
        (2, 1, 5, 24, 12, 1, torch.float16),  # half of a head is rotated; Lumina-mGPT's norms, one row
    ],
)
def test_norms_rotary_and_store(
    heads: int, shared: int, slots: int, width: int, rotary: int, norm: int, dtype: torch.dtype
) -> None:
    rows, capacity = 2, slots + 4
    product = numbers(rows, slots, (heads + 2 * shared) * width, dtype=dtype)
    query, key, value = product.split([heads * width, shared * width, shared * width], -1)
    cos, sin = numbers(1, slots, rotary, dtype=dtype), numbers(rows, slots, rotary + 1, dtype=dtype)[..., 1:]
    keys, values = (torch.zeros(rows, shared, capacity, width, dtype=dtype, device=DEVICE) for _ in range(2))
    begin = torch.tensor([[0], [3]], device=DEVICE)
    slot = begin + torch.arange(slots, device=DEVICE)
    norms = [
        numbers(count if norm == 2 else 1, width, dtype=dtype) + shift for count in (heads, shared) for shift in (1, 0)
    ]
    given = (query, key, value, cos, sin, *(norms if norm else []), keys, values)
    found = rotary_store(query, key, value, cos, sin, norms if norm else [], 1e-5, keys, values, slot)
    query, key, value, cos, sin, *norms, wanted_keys, wanted_values = (x.double() for x in given)
    wanted_keys.zero_()
    wanted_values.zero_()
    wanted = reference_kernels.rotary_store(query, key, value, cos, sin, norms, 1e-5, wanted_keys, wanted_values, slot)
    assert found.shape == (rows, slots, heads, width)
    for x, y in ((found, wanted), (keys, wanted_keys), (values, wanted_values)):
        assert error(x, y) < LIMITS[dtype]
        assert not x[y == 0].any()  # nothing else was written


@pytest.mark.parametrize("name", ["silu_product", "add_norm", "rotary_store"])
def test_a_compiler_sees_one_operation_and_its_shapes(name: str) -> None:
    x, weight, cache = numbers(1, 2, 16), numbers(16), torch.zeros(1, 1, 4, 8, device=DEVICE)
    slots = torch.arange(2, device=DEVICE)[None]
    call, given = {
        "silu_product": (silu_product, (x, x)),
        "add_norm": (add_norm, (x, x, None, weight, 0.0, 1e-5)),
        "rotary_store": (
            rotary_store,
            (x, x[..., :8], x[..., 8:], x[..., :8], x[..., 8:], [], 1e-5, cache, cache.clone(), slots),
        ),
    }[name]
    torch.library.opcheck(call, given, test_utils=("test_schema", "test_faketensor"))
