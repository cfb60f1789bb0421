"""Joined projections and fused norms compute what the layers computed, in fewer operations, and stay where PEFT looks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.architectures import ARCHITECTURES
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.base import ImageModel
from sjd2.models.fusion import fuse
from sjd2.models.norms import fuse_norms
from sjd2.models.projections import join_projections
from tests.helpers.decoders import GRID
from tests.helpers.toy import Toy

FAMILIES = sorted({plan.family: name for name, plan in ARCHITECTURES.items()}.values())
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear")


class Operations(TorchDispatchMode):
    """Counts operations, and matrix products among them."""

    count = products = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += 1
        self.products += call._schema.name in PRODUCTS
        return call(*args, **(kwargs or {}))


@torch.inference_mode()
def states(model: ImageModel, gate: bool = False) -> tuple[torch.Tensor, Operations]:
    """Return the hidden states of five slots and the operations that they took."""
    width = model.transformer.get_input_embeddings().weight.shape[1]
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    noisy = torch.tensor([[False, False, True, True, False]] * 2) if gate else None
    with Operations() as operations:
        hidden = model.forward(x, torch.arange(5).expand(2, -1), None, gate=noisy)
    return hidden.float(), operations


# ---- projections


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_three_products_less_a_layer(name: str) -> None:
    """GLM-Image two: its gate and up are one matrix in the files."""
    model = ARCHITECTURES[name].small().build(torch.device("cpu"), torch.float32)
    less = (2 if name == "glm-image" else 3) * len(model.transformer.layers)
    names = model.transformer.state_dict().keys()
    wanted, before = states(model)
    assert join_projections(model) == less
    found, after = states(model)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert before.products - after.products == less
    assert model.transformer.state_dict().keys() == names
    weights = [parameter.data_ptr() for parameter in model.transformer.parameters()]
    assert join_projections(model) == less  # they are joined, and stay where they are
    assert weights == [parameter.data_ptr() for parameter in model.transformer.parameters()]


@pytest.mark.parametrize("first", ["joined", "adapted"])
def test_a_gated_adapter_acts_as_before(first: str) -> None:
    def adapt(model: Toy) -> None:
        model.adapter = Adapter(AdapterSettings(rank=2), model).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.adapter.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    plain, joined = Toy(GRID), Toy(GRID)
    adapt(plain)
    for step in (join_projections, adapt) if first == "joined" else (adapt, join_projections):
        step(joined)
    for gate in (False, True):
        (wanted, before), (found, after) = states(plain, gate), states(joined, gate)
        assert torch.allclose(found, wanted, atol=1e-5)
        assert before.products - after.products == 6
    assert not torch.allclose(states(joined)[0], states(joined, gate=True)[0], atol=1e-2)


def test_weights_are_loaded_into_the_joined_matrix() -> None:
    model, other = Toy(GRID), Toy(GRID, seed=5)
    join_projections(model)
    for name, parameter in model.transformer.named_parameters():  # as Adapter.load does
        parameter.data.copy_(other.transformer.get_parameter(name))
    assert torch.allclose(states(model)[0], states(other)[0], atol=1e-5)


def test_another_input_gets_a_product_of_its_own() -> None:
    model = Toy(GRID)
    attention = model.transformer.layers[0].self_attn
    x, other = torch.randn(2, 1, 3, 16)
    wanted = attention.k_proj(other)
    join_projections(model)
    attention.q_proj(x)
    assert torch.allclose(attention.k_proj(other), wanted, atol=1e-6)


def test_weights_that_were_replaced_are_used() -> None:
    model, other = Toy(GRID), Toy(GRID, seed=5)
    join_projections(model)
    model.transformer.load_state_dict(other.transformer.state_dict(), assign=True)
    assert torch.allclose(states(model)[0], states(other)[0], atol=1e-5)


@pytest.mark.parametrize("last", ["v_proj", "up_proj"])
def test_one_layer_with_weights_of_its_own_is_used(last: str) -> None:
    # as PEFT's safe merge of a LoRA on some of the projections leaves them
    model, other = Toy(GRID), Toy(GRID)
    join_projections(model)
    for toy in (model, other):
        for name, module in toy.transformer.named_modules():
            if name.endswith(last):
                module.weight.data = module.weight.data.clone() * 2
    assert torch.allclose(states(model)[0], states(other)[0], atol=1e-5)


def test_weights_in_training_get_their_gradients() -> None:
    model = Toy(GRID)
    join_projections(model)
    model.forward(torch.randn(1, 4, 16), torch.arange(4)[None], None).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.transformer.layers.parameters())
    value = model.transformer.requires_grad_(False).layers[0].self_attn.v_proj.requires_grad_(True).weight
    value.grad = None  # one layer of three alone
    model.forward(torch.randn(1, 4, 16), torch.arange(4)[None], None).square().sum().backward()
    assert value.grad is not None


# ---- norms


def randomise(model: ImageModel) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.transformer.named_parameters():
        if "norm" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 1)


@pytest.mark.parametrize("name", ["one row", *FAMILIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_what_they_were_in_fewer_operations(name: str, dtype: torch.dtype) -> None:
    model = ARCHITECTURES["lumina" if name == "one row" else name].small().build(torch.device("cpu"), dtype)
    layers = model.transformer.layers
    if name == "one row":  # as in Lumina-mGPT's files
        for layer in layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight, norm.bias = (torch.nn.Parameter(x.data[:1]) for x in (norm.weight, norm.bias))
    randomise(model)
    wanted, before = states(model)
    count = fuse_norms(model)
    each = 4 if name == "glm-image" or hasattr(layers[0].self_attn, "q_norm") else 2
    assert count == each * len(layers) + 1
    found, after = states(model)
    assert before.count - after.count >= count
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((found - wanted).norm() / wanted.norm()) < limit
    assert fuse_norms(model) == 0  # they are


def test_a_copy_has_weights_of_its_own() -> None:
    model = Toy(GRID)
    fuse_norms(model)
    norm = copy.deepcopy(model.transformer.norm)  # as EAGLE's head takes it
    norm.weight.data.fill_(3.0)
    x = torch.randn(2, 16)
    assert torch.allclose(norm(x), 3 * model.transformer.norm(x), atol=1e-6)


# ---- both


def test_what_is_left_out_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Toy):
        device = torch.device("cuda")

    class Quantised(torch.nn.Linear):
        """As bitsandbytes' layers are: a class of its own."""

    model = Elsewhere(GRID)
    for layer in model.transformer.layers:
        for module in (layer.self_attn, layer.mlp):
            for part in module.children():
                if type(part) is torch.nn.Linear:
                    part.__class__ = Quantised
    monkeypatch.setattr("sjd2.models.fusion.fuse_attention", lambda model, wanted: "Triton is not installed")
    monkeypatch.setattr("sjd2.models.fusion.kernels_missing", lambda model: "Triton is not installed")
    assert fuse(model) == [
        "projections run one by one: no layer has plain linear ones",
        "attention runs as torch's SDPA, not as one kernel: Triton is not installed",
    ]
    monkeypatch.setattr("sjd2.models.fusion.fuse_attention", lambda model, wanted: None)
    monkeypatch.setattr("sjd2.models.fusion.kernels_missing", lambda model: None)
    monkeypatch.setattr("sjd2.models.fusion.fuse_layers", lambda model: [])
    assert fuse(Elsewhere(GRID)) == fuse(Toy(GRID)) == fuse(model, wanted=False) == []


def test_float64_stays_as_it_is() -> None:
    model = Toy(GRID, dtype=torch.float64)
    assert join_projections(model) == fuse_norms(model) == 0
