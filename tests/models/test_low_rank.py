"""A fine-tuning at inference: merged or stacked it computes what PEFT computes, and clean slots are the untouched model's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architectures import ARCHITECTURES
from harness.job import Models
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.base import ImageModel
from sjd2.models.fusion import fuse
from sjd2.models.low_rank import add_low_rank
from sjd2.models.projections import join_projections
from tests.helpers.decoders import GRID
from tests.helpers.toy import Toy

FAMILIES = sorted({plan.family: name for name, plan in ARCHITECTURES.items()}.values())

ALL = AdapterSettings().targets
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMITS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 0.1}  # hidden states of the toy are about 1
NOISY = torch.tensor([[False, False, True, True, False], [False, True, False, False, True]])


class Counted(TorchDispatchMode):
    """Counts operations that compute something."""

    count = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += not call.is_view
        return call(*args, **(kwargs or {}))


def adapt(model: ImageModel, settings: AdapterSettings) -> Adapter:
    """Put a strong random fine-tuning into the model, as PEFT has it."""
    model.adapter = adapter = Adapter(settings, model).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


@torch.inference_mode()
def states(model: ImageModel, gate: Tensor | None = None) -> tuple[Tensor, int]:
    """Return the hidden states of five slots in two rows, and the operations that they took."""
    width = model.transformer.get_input_embeddings().weight.shape[1]
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    with Counted() as operations:
        hidden = model.forward(x, torch.arange(5).expand(2, -1), None, gate=gate)
    return hidden, operations.count


# ---- gated


@pytest.mark.parametrize(("order", "dtype"), [
    ("alone", torch.float64), ("alone", torch.float32), ("joined", torch.float32), ("joined first", torch.float32),
    ("joined", torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("targets", [ALL, ("v_proj", "q_proj", "up_proj"), ("o_proj", "down_proj")])
def test_stacked_products_are_pefts(order: str, dtype: torch.dtype, targets: tuple[str, ...]) -> None:
    peft, stacked = Toy(GRID, dtype=dtype), Toy(GRID, dtype=dtype)
    settings = AdapterSettings(rank=2, targets=targets)
    wanted_names = adapt(peft, settings).state_dict().keys()
    if order == "joined first":
        join_projections(stacked)
    names = adapt(stacked, settings).freeze().state_dict().keys()
    if order == "joined":
        join_projections(stacked)
    assert names == wanted_names
    (wanted, before), (found, after) = states(peft, NOISY), states(stacked, NOISY)
    assert float((found - wanted).abs().max()) < LIMITS[dtype]
    plain = states(Toy(GRID, dtype=dtype))[1]
    # three operations a layer instead of five or more, and one for the gate
    assert after - plain - 1 <= (before - plain - 1) * 0.6
    assert not torch.allclose(states(stacked)[0], found, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joined", [False, True])
def test_clean_slots_are_the_untouched_models_bit_for_bit(dtype: torch.dtype, joined: bool) -> None:
    plain, tuned = Toy(GRID, dtype=dtype), Toy(GRID, dtype=dtype)
    adapt(tuned, AdapterSettings(rank=2)).freeze()
    if joined:
        join_projections(plain)
        join_projections(tuned)
    (wanted, _), (found, _) = states(plain), states(tuned, NOISY)
    first = NOISY.long().argmax(1)  # slots before the first noisy one see clean ones only
    for row in range(2):
        assert torch.equal(found[row, : first[row]], wanted[row, : first[row]])
        assert not torch.allclose(found[row, first[row]], wanted[row, first[row]], atol=1e-2)
    for gate in (None, torch.zeros_like(NOISY)):
        assert torch.equal(states(tuned, gate)[0], wanted)


def test_a_gate_of_0_adds_nothing_to_any_layer() -> None:
    model = Toy(GRID)
    adapter = adapt(model, AdapterSettings(rank=2)).freeze()
    layer = model.transformer.layers[0].mlp.up_proj
    x = torch.randn(2, 5, 16)
    adapter.set_gate(NOISY)
    difference = layer(x) - layer.base_layer(x)
    assert (difference[~NOISY] == 0).all()
    assert (difference[NOISY].abs() > 1e-6).any(-1).all()


@pytest.mark.parametrize("frozen", [False, True], ids=["as PEFT has it", "stacked"])
def test_low_rank_numbers_that_overflow_leave_clean_slots_alone(frozen: bool) -> None:
    model, plain = Toy(GRID, dtype=torch.float16), Toy(GRID, dtype=torch.float16)
    adapter = adapt(model, AdapterSettings(rank=2))
    for name, parameter in adapter.named_parameters():
        if name.startswith("layers"):
            parameter.data.fill_(6e4)
    if frozen:
        adapter.freeze()
    assert torch.equal(states(model, torch.zeros_like(NOISY))[0], states(plain)[0])
    assert not states(model, NOISY)[0].isfinite().all()


def test_weights_that_were_moved_or_replaced_are_used() -> None:
    model, other = Toy(GRID), Toy(GRID)
    adapter = adapt(model, AdapterSettings(rank=2)).freeze()
    for parameter in adapt(other, AdapterSettings(rank=2)).freeze().parameters():
        parameter.data.mul_(2)  # in place
    for parameter in adapter.parameters():
        parameter.data = parameter.data.clone() * 2  # as module.to(device) does
    assert torch.allclose(states(model, NOISY)[0], states(other, NOISY)[0], atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_a_fine_tuning(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].small().build(torch.device("cpu"), torch.float32)
    targets = tuple({"up_proj": "gate_up_proj"}.get(target, target) for target in ALL) if name == "glm-image" else ALL
    adapter = adapt(model, AdapterSettings(rank=2, targets=targets))
    wanted = states(model, NOISY)[0]
    adapter.freeze()
    join_projections(model)
    found = states(model, NOISY)[0]
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert adapter.left_out == 0
    tensors = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    adapter.save(tmp_path, torch.float32)  # views of the stacks are whole tensors in the file
    stored = load_file(tmp_path / "sjd2.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)


# ---- ungated


@pytest.mark.parametrize("dtype", LIMITS)
def test_an_ungated_fine_tuning_becomes_the_weights(dtype: torch.dtype) -> None:
    plain, peft, merged = (Toy(GRID, dtype=dtype) for _ in range(3))
    settings = AdapterSettings(rank=2, gated=False)
    adapt(peft, settings)
    names = plain.transformer.state_dict().keys()
    adapt(merged, settings).freeze()
    assert merged.transformer.state_dict().keys() == names
    assert states(merged)[1] == states(plain)[1]
    for gate in (None, NOISY):  # it acts on every slot, whatever the gate is
        wanted, found = states(peft, gate)[0], states(merged, gate)[0]
        assert float((found - wanted).norm() / wanted.norm()) < LIMITS[dtype]
    assert not torch.allclose(states(plain)[0], states(merged)[0], atol=1e-2)


def test_weights_are_rounded_once() -> None:
    model, wide = Toy(GRID, dtype=torch.bfloat16), Toy(GRID, dtype=torch.float64)
    wide.transformer.load_state_dict(model.transformer.state_dict())
    rounded, exact = (adapt(toy, AdapterSettings(rank=2, gated=False)) for toy in (model, wide))
    for mine, theirs in zip(exact.parameters(), rounded.parameters(), strict=True):
        mine.data.copy_(theirs)
    rounded.freeze()
    exact.freeze()
    for name, weight in model.transformer.named_parameters():
        nearest = wide.transformer.get_parameter(name).to(torch.bfloat16)
        assert (weight == nearest).float().mean() > 0.99, name  # a tie may fall to the other side


def test_a_fine_tuning_that_changes_the_weights_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    for gated in (True, False):
        toy = Toy(GRID)
        adapt(toy, AdapterSettings(rank=2, gated=gated)).freeze()
        spec = SimpleNamespace(name="toy", load=lambda *_, toy=toy: toy)
        plan: Any = SimpleNamespace(
            spec=spec, identity={"digest": ""}, device="cpu", dtype="float32", fused=True, compiled=False
        )
        Models().load(plan)
        assert ("for AR and for lossless decoders too" in capsys.readouterr().out) is not gated


# ---- what stays as PEFT has it


class Quantised(nn.Linear):
    """As bitsandbytes' layers are: a class of its own."""


@pytest.mark.parametrize("gated", [True, False])
def test_quantised_layers_keep_pefts_path_and_one_line_reports_it(gated: bool) -> None:
    peft, tuned = Toy(GRID), Toy(GRID)
    settings = AdapterSettings(rank=2, gated=gated)
    for toy in (peft, tuned):
        for layer in toy.transformer.layers:
            layer.mlp.down_proj.__class__ = Quantised
    _, adapter = adapt(peft, settings), adapt(tuned, settings)
    assert adapter.freeze().left_out == 2
    assert torch.allclose(states(tuned, NOISY)[0], states(peft, NOISY)[0], atol=5e-6)
    assert [words for words in fuse(tuned) if "fine-tuning of 2 layers" in words]
    assert fuse(Toy(GRID)) == fuse(peft) == []


# ---- kernels, under Triton's interpreter on a CPU


# the interpreter has no products in bfloat16
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted; test_gpu_attention.py has the same")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.full)])
def test_kernels_are_torchs_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", minversion="3.9")  # older ones do not interpret with numpy 2.4
    model, plain = Toy(GRID, dtype=dtype), Toy(GRID, dtype=dtype)
    adapter = adapt(model, AdapterSettings(rank=3)).freeze()
    for toy in (model, plain):
        join_projections(toy)
    (wanted, before) = states(model, NOISY)
    assert adapter.fuse(True) is None
    found, after = states(model, NOISY)
    assert float((found - wanted).norm() / wanted.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(states(model, torch.zeros_like(NOISY))[0], states(plain)[0])
    assert after <= before - 2 * 4 * 2  # one operation instead of three for each of four inputs of two layers
    adapter.fuse(False)
    assert torch.equal(states(model, NOISY)[0], wanted)

    def ungated(x: Tensor, down: Tensor, up: Tensor, gate: Tensor, out: Tensor) -> None:
        out += x @ down.T @ up.T

    monkeypatch.setattr("sjd2.models.low_rank.add_low_rank", ungated)
    assert "differ" in str(adapter.fuse(True))


def test_kernels_split_long_sums_and_many_rows() -> None:
    pytest.importorskip("triton", minversion="3.9" if DEVICE.type == "cpu" else None)
    generator = torch.Generator().manual_seed(0)
    for rows, width, outputs, numbers in ((5, 40, 70, 6), (70, 600, 130, 48)):
        shapes = ((rows, width), (numbers, width), (outputs, numbers), (rows, outputs))
        x, down, up, out = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
        gate = torch.arange(rows, device=DEVICE) % 3 == 0
        before, x[1] = out.clone(), float("inf")  # in a slot that is not adapted
        wanted = out + (x.nan_to_num(0, 0) @ down.T * gate[:, None]) @ up.T
        with FlopCounterMode(display=False) as counter:  # as runtime.flops counts
            add_low_rank(x, down, up, gate, out)
        assert counter.get_total_flops() == 2 * rows * numbers * (width + outputs)
        assert torch.allclose(out, wanted, atol=1e-4 * float(wanted.abs().max()))
        assert torch.equal(out[~gate], before[~gate])
