"""The attention kernel against SDPA: on a CPU under Triton's interpreter (tests/conftest.py), on a GPU as it is compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.architectures import ARCHITECTURES
from sjd2.files import ROOT
from sjd2.models.kv_cache import Window
from sjd2.models.window_attention import TOLERANCE, check, fuse_attention, set_attention, stores
from tests.helpers.decoders import GRID
from tests.helpers.toy import Toy

# older ones do not interpret with numpy 2.4
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.9")
attend = pytest.importorskip("sjd2.models.window_kernel", reason="needs Triton", exc_type=ImportError).attend
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CAPACITY = 150


def inputs(rows: int, heads: int, shared: int, slots: int, tail: int, width: int) -> tuple[Tensor, ...]:
    """Return query, keys, values, lengths and visibility; the first row is empty, the last one full."""
    random = torch.Generator().manual_seed(width + slots)
    query = torch.randn(rows, slots, heads, width, generator=random).transpose(1, 2)
    keys, values = (torch.randn(rows, shared, CAPACITY, width, generator=random) for _ in range(2))
    lengths = torch.randint(CAPACITY - tail, (rows,), generator=random)
    lengths[0], lengths[-1] = 0, CAPACITY - tail
    seen = torch.rand(rows, slots, 1 + tail, generator=random) < 0.5
    seen.diagonal(1 + tail - slots, 1, 2).fill_(True)
    for row, length in enumerate(lengths.tolist()):  # what lies after a row's end is never looked at
        keys[row, :, length + tail :] = values[row, :, length + tail :] = torch.nan
    return tuple(x.to(DEVICE) for x in (query, keys, values, lengths, seen))


def expected(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, seen: Tensor) -> Tensor:
    """Return what SDPA gives in float64: [R, S, H, D]."""
    group = query.shape[1] // keys.shape[1]
    query, keys, values = (x.double().nan_to_num() for x in (query, keys, values))
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    mask = Window(lengths, seen).over(CAPACITY)[:, None]
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask).transpose(1, 2)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("rows", "heads", "shared", "slots", "tail", "width", "parts"),
    [
        (2, 2, 2, 1, 1, 16, 1),  # AR
        (3, 2, 2, 9, 9, 16, 4),  # a window, a tree of its own for each row
        (2, 4, 1, 7, 7, 20, 1),  # a group of heads, and a width that is no power of two
        (2, 4, 2, 3, 11, 100, 8),  # nodes after eight others, more parts than blocks
        (2, 1, 1, 40, 40, 24, 2),  # more slots than a tile has rows
    ],
)
def test_the_kernel_is_sdpa(rows: int, heads: int, shared: int, slots: int, tail: int, width: int, parts: int) -> None:
    given = inputs(rows, heads, shared, slots, tail, width)
    found = attend(*given, width**-0.5, parts)
    assert found.shape == (rows, slots, heads, width)
    assert error(found, expected(*given)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_the_kernel_is_sdpa_at_random(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def pick(values: list[int]) -> int:
        return values[int(torch.randint(len(values), (), generator=random))]

    shared, group, slots = pick([1, 2]), pick([1, 2, 3]), pick([1, 2, 5, 16, 33])
    given = inputs(pick([1, 2, 3]), shared * group, shared, slots, slots + pick([0, 0, 6, 31]), pick([8, 40, 64, 128]))
    assert error(attend(*given, given[0].shape[-1] ** -0.5, pick([1, 2, 4])), expected(*given)) < 1e-6


def test_a_key_too_many_is_found() -> None:
    query, keys, values, lengths, seen = given = inputs(3, 2, 2, 4, 4, 16)
    wanted = expected(*given)
    keys, values = keys.nan_to_num(nan=1.0), values.nan_to_num(nan=1.0)
    scale = 16**-0.5
    assert error(attend(query, keys, values, lengths, seen, scale, 2), wanted) < 1e-6
    more = torch.cat([seen, torch.ones_like(seen[:, :, :1])], 2)  # the entry after each row's last
    lengths = lengths.clamp(max=CAPACITY - 5)
    wanted = expected(query, keys, values, lengths, seen)
    assert error(attend(query, keys, values, lengths, more, scale, 2), wanted) > max(TOLERANCE.values())


@pytest.mark.parametrize("name", sorted({plan.family: name for name, plan in ARCHITECTURES.items()}.values()))
def test_every_family_hands_the_window_on(name: str) -> None:
    model = ARCHITECTURES[name].small().build(DEVICE, torch.float32)
    x = torch.randn(1, 3, model.transformer.get_input_embeddings().weight.shape[1], device=DEVICE)
    states = []
    for fused in (False, True):
        set_attention(model, fused=fused)
        cache, place = model.cache(1, 8), torch.arange(3, device=DEVICE)[None]
        with torch.inference_mode():
            model.forward(x, place, cache)
            cache.lengths = torch.tensor([2], device=DEVICE)
            states.append(model.forward(x, place + cache.lengths[:, None], cache))
    assert cache.fused
    assert error(states[1], states[0].double()) < 1e-5


@pytest.mark.parametrize("width", [20, 64])
def test_keys_and_values_are_stored_where_scatter_does(width: int) -> None:
    assert stores(2, width, torch.float32, DEVICE)


# ---- whether a model has it


class Elsewhere(Toy):
    """A toy that claims to be on a GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


@pytest.fixture
def modern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    ("settings", "attention", "why"),
    [
        ({"dtype": torch.float64}, "sdpa", "float64 stays on SDPA"),
        ({}, "eager", "model.attention is eager"),
        ({"width": 1024}, "sdpa", "heads of 512 are wider than 256"),
    ],
)
def test_a_model_keeps_sdpa_for_a_reason(modern: None, settings: dict, attention: str, why: str) -> None:
    model = Elsewhere(GRID, **settings)
    model.transformer.set_attn_implementation(attention)
    assert fuse_attention(model) == why
    assert not model.fused
    assert model.transformer.config._attn_implementation == attention


def test_a_kernel_that_fails_its_check_is_not_used(modern: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Elsewhere(GRID)
    for broken, why in (
        (lambda *_: 0.5, "the kernel differs from SDPA by 5.0e-01"),
        (lambda *_: 1 / 0, "division by zero"),
    ):
        monkeypatch.setattr("sjd2.models.window_attention.check", broken)
        assert fuse_attention(model) == why
        assert not model.fused
        assert model.transformer.config._attn_implementation == "sdpa"


def test_a_cpu_has_no_kernel() -> None:
    model = Toy(GRID)
    assert fuse_attention(model) is None
    assert not model.fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter has no products in bfloat16
def test_the_check_at_start_passes(dtype: torch.dtype) -> None:
    assert check(2, 2, 1, 3, 20, dtype, DEVICE) < TOLERANCE[dtype] / 10


# ---- compiled


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_every_shape_compiles_and_fits_the_card(capability: int) -> None:
    # Triton brings its own assembler: no GPU is needed
    program = [sys.executable, "-m", "tests.helpers.compiled_kernel", str(capability)]
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(program, cwd=ROOT, env=compiling, capture_output=True, text=True, check=True)
    for shape in json.loads(done.stdout):
        assert shape["shared"] <= shape["limit"], shape
        assert shape["spilled"] <= 128, shape  # bytes of a thread that do not fit into registers
