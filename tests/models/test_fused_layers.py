"""Layers with one kernel between two products compute what they did, in fewer launches, and stay plain where they do not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified

from baselines.eagle.head import EagleHead, EagleSettings
from benchmarks.architectures import ARCHITECTURES
from benchmarks.kernels import Launches
from sjd2.decoding.cuda_graph import Graphs
from sjd2.decoding.generate import generate
from sjd2.models.base import ImageModel
from sjd2.models.fused_layers import PARTS, RESIDUAL, ROTARY, SILU, put_layers, put_same, remove_layers
from sjd2.models.fusion import fuse
from sjd2.models.layer_check import errors, fuse_layers
from sjd2.models.layout import TokenGrid
from sjd2.models.norms import fuse_norms
from sjd2.models.projections import join_projections
from sjd2.models.window_attention import set_attention
from tests.helpers import tape
from tests.helpers.bounded_spans import as_on_a_gpu
from tests.helpers.decoders import GRID, GUIDED, sjd2
from tests.helpers.enumeration import strong_toy
from tests.helpers.reference_kernels import replace_kernels
from tests.helpers.toy import Toy

pytest.importorskip("triton", minversion="3.9")  # older ones do not interpret with numpy 2.4
layer_kernels = pytest.importorskip("sjd2.models.layer_kernels", reason="needs Triton", exc_type=ImportError)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted; test_gpu_attention.py")
FAMILIES = sorted({plan.family: name for name, plan in ARCHITECTURES.items()}.values())
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the kernels in plain torch, which test_layer_kernels.py compares them with."""
    if request.node.get_closest_marker("slow") is None:
        replace_kernels(monkeypatch)


def fused(model: ImageModel, parts: tuple[str, ...] = PARTS) -> ImageModel:
    """Fuse a model on a CPU as `fuse` does on a GPU."""
    join_projections(model)
    fuse_norms(model)
    set_attention(model, fused=True)
    assert put_layers(model.transformer, parts) == {}
    return model


@torch.inference_mode()
def states(model: ImageModel, gate: bool = False) -> tuple[Tensor, Counter[str]]:
    """Return the hidden states of two passes over a cache, rows of unequal lengths, and what the second layer launches."""
    width, layer = model.transformer.get_input_embeddings().weight.shape[1], model.transformer.layers[-1]
    x = torch.randn(2, 6, width, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    cache, place = model.cache(2, 12), torch.arange(3)
    start = model.image_start(torch.tensor([1, 2]))[:, None]
    first = model.forward(x[:, :3], start + place, cache)
    cache.lengths = torch.tensor([2, 3])
    noisy = torch.tensor([[False, True, True]] * 2) if gate else None
    seen: Counter[str] = Counter()
    with Launches() as launches:
        begin = layer.register_forward_pre_hook(lambda *_: launches.names.clear())
        end = layer.register_forward_hook(lambda *_: seen.update(launches.names))
        second = model.forward(x[:, 3:], start + cache.lengths[:, None] + place, cache, gate=noisy)
    begin.remove()
    end.remove()
    return torch.cat([first, second], 1).float(), seen


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ---- every family


FUSED = {
    "sjd2::rotary_store": 1, "sjd2::window_attention": 1, "sjd2::silu_product": 1, "sjd2::add_norm": 2, "products": 4,
}  # fmt: skip
# what a layer launches: as transformers has it, over a cache that is not fused; with fused attention, projections and norms
LAUNCHES = {
    "chameleon": (42, 26), "emu3": (38, 24), "glm_image": (49, 26), "janus": (36, 22), "llamagen": (36, 22),
    "lumina2": (42, 24), "simplear": (36, 22),
}  # fmt: skip


def computes_what_it_did(name: str) -> None:
    model = ARCHITECTURES[name].small().build(CPU, torch.float32)
    names = model.transformer.state_dict().keys()
    wanted, plain = states(model)
    some = states(fused(model, ()))[1]
    found, few = states(fused(model))
    assert error(found, wanted) < 1e-5
    assert torch.equal(model.logits(found).argmax(-1), model.logits(wanted).argmax(-1))  # greedy tokens
    assert model.transformer.state_dict().keys() == names
    assert all(errors(model, part) < 1e-5 for part in PARTS)
    products = {key: few.pop(key) for key in ("aten::linear", "aten::mm", "aten::addmm") if key in few}
    assert dict(few) | {"products": sum(products.values())} == FUSED
    assert (plain.total(), some.total()) == LAUNCHES[ARCHITECTURES[name].family]


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_what_it_did_in_fewer_launches(name: str) -> None:
    computes_what_it_did(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_what_it_did_with_the_kernels(name: str) -> None:
    computes_what_it_did(name)


class Swin(Toy):
    """As Chameleon 34B: what a layer adds is normed, not what goes in."""

    def __init__(self) -> None:
        super().__init__(GRID)
        from transformers.models.chameleon.modeling_chameleon import ChameleonSwinDecoderLayer

        for layer in self.transformer.layers:
            layer.__class__ = ChameleonSwinDecoderLayer


@pytest.mark.parametrize("build", [lambda: Toy(GRID), Swin], ids=["norms what goes in", "norms what is added"])
def test_a_chameleon_computes_what_it_did(build: Callable[[], Toy]) -> None:
    model = build()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.transformer.named_parameters():
        if "norm" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 1)
    wanted, _ = states(model)
    assert error(states(fused(model))[0], wanted) < 1e-5
    remove_layers(model.transformer)
    assert fuse_layers(model, lambda work: 1.0) == []  # they pass
    assert fuse_layers(model, lambda work: 1 / 0) == []  # and are not looked at again
    copied = copy.deepcopy(model.transformer.norm)  # as EAGLE's head takes it
    copied.requires_grad_(False).weight.fill_(3.0)
    last = model.transformer.requires_grad_(False).norm
    assert error(copied(wanted) * last.weight, 3 * last(wanted)) < 1e-6
    model.transformer.layers = model.transformer.layers[:1]  # a norm that was computed ahead is not taken by another
    short = states(model)[0]
    fuse(model, wanted=False)
    plain_again = [module for layer in model.transformer.layers for module in (layer, layer.mlp, layer.input_layernorm)]
    assert not any("forward" in vars(module) for module in (*plain_again, model.transformer.norm))
    assert error(short, states(model)[0]) < 1e-5


def test_gated_adapters_and_whole_decodings_stay_recorded_too() -> None:
    plain, other = (strong_toy(TokenGrid(1, 4, 3)) for _ in range(2))
    fused(other)
    for gate in (False, True):
        assert error(states(other, gate)[0], states(plain, gate)[0]) < 1e-5
    remove_layers(other.transformer)
    assert fuse_layers(other, lambda work: 1.0) == []
    decoder = sjd2(3, steps=2)
    tokens = [generate(m, decoder, m.encode(["one"]), [1], sampling=GUIDED).tokens for m in (plain, other)]
    assert torch.equal(*tokens)
    graphs = Graphs(tape.record)
    with as_on_a_gpu():
        recorded = generate(other, decoder, other.encode(["one"]), [1], sampling=GUIDED, graphs=graphs)
    assert torch.equal(recorded.tokens, tokens[0])
    assert all(graphs.kept.graphs.values())


@torch.inference_mode()
def test_a_draft_heads_layer_gets_the_same_kernels() -> None:
    model = fused(Toy(GRID))
    head = EagleHead(EagleSettings(), model).eval()
    embeds, hidden = torch.randn(2, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for same in (False, True):
        if same:
            put_same(model.transformer, head.layer)
        cache = head.cache(2, 8)
        found.append(head(embeds, hidden, torch.arange(3).expand(2, -1), cache, **cache.window(3, torch.float32)))
    assert error(found[1], found[0]) < 1e-5
    assert all("forward" in vars(module) for module in (head.layer, head.layer.mlp, head.layer.self_attn))


def test_training_runs_the_layers_own_forward() -> None:
    model = fused(Toy(GRID))
    model.forward(torch.randn(1, 4, 16), torch.arange(4)[None], None).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.transformer.layers.parameters())


@pytest.mark.slow
@torch.inference_mode()
def test_a_compiler_keeps_the_kernels() -> None:
    model = fused(Toy(GRID))
    wanted = states(model)[0]
    seen: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return aot_module_simplified(graph, inputs, fw_compiler=lambda gm, example_inputs: gm)

    model.forward = torch.compile(model.forward, backend=backend)  # type: ignore[method-assign]
    assert error(states(model)[0], wanted) < 1e-6
    assert sum("sjd2.rotary_store" in name for name in seen) >= 2


# ---- what is left out


def reported(part: str, why: str) -> str:
    return f"{part} run as torch's operations, not as one kernel: {why}"


def _wrong_sign(kernel: Any, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, *more: Any) -> Any:
    return kernel(query, key, value, cos, -sin, *more)


def _wrong_slot(kernel: Any, *given: Any) -> Any:
    return kernel(*given[:-1], given[-1] + 1)


def _values_unsaved(kernel: Any, *given: Any) -> Any:
    return kernel(*given[:-2], given[-2].clone(), given[-1])


def _swapped(kernel: Any, gate: Tensor, up: Tensor) -> Tensor:
    return kernel(up, gate)


def _norm_forgotten(kernel: Any, residual: Tensor, delta: Tensor, *more: Any) -> Any:
    total, _ = kernel(residual, delta, *more)
    return total, total.clone()


def _residual_forgotten(kernel: Any, residual: Tensor, delta: Tensor, *more: Any) -> Any:
    return kernel(torch.zeros_like(residual), delta, *more)


@pytest.mark.parametrize(
    ("part", "name", "broken"),
    [
        (ROTARY, "rotary_store", _wrong_sign),
        (ROTARY, "rotary_store", _wrong_slot),
        (ROTARY, "rotary_store", _values_unsaved),
        (SILU, "silu_product", _swapped),
        (RESIDUAL, "add_norm", _norm_forgotten),
        (RESIDUAL, "add_norm", _residual_forgotten),
    ],
)
def test_a_broken_kernel_is_not_used(part: str, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = getattr(layer_kernels, name)
    model = fused(Toy(GRID), ())
    monkeypatch.setattr(layer_kernels, name, lambda *given: broken(kernel, *given))
    (sentence,) = fuse_layers(model, lambda work: 1.0)
    assert sentence.startswith(reported(part, "the kernel differs from the module by "))
    monkeypatch.setattr(layer_kernels, name, lambda *given: 1 / 0)
    assert fuse_layers(model, lambda work: 1.0) == [reported(part, "division by zero")]
    states(model)  # without it


def test_a_slow_kernel_is_not_used() -> None:
    times = iter([0.9e-5] * 2 + [1e-5] * 2 + [1.0] * 8)  # without it and with it, narrow and wide
    model = fused(Toy(GRID), ())
    assert fuse_layers(model, lambda work: next(times)) == [
        reported(ROTARY, "with it the module takes 20 us, without 18")
    ]
    assert "sjd2::rotary_store" not in states(model)[1]


def test_layers_that_are_not_known_stay() -> None:
    model = Toy(GRID)
    fuse_norms(model)

    class Other(torch.nn.SELU):
        """An activation of another model."""

    first, second = model.transformer.layers
    first.mlp.act_fn = Other()
    second.self_attn.forward = first.self_attn.forward  # as accelerate wraps it
    second.input_layernorm.register_forward_hook(lambda *_: None)
    assert put_layers(model.transformer) == {
        ROTARY: "ChameleonAttention has a forward of its own",
        SILU: "the activation is Other",
        RESIDUAL: "ChameleonRMSNorm has hooks",
    }
    second.__class__ = type("NewDecoderLayer", (type(second),), {})
    assert put_layers(model.transformer)[RESIDUAL] == "NewDecoderLayer is not a class that is known"
    model.transformer.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert fuse_layers(model) == [reported(f"{SILU} and {RESIDUAL}", "ChameleonModel is not a class that is known")]
