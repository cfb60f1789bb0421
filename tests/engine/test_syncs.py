"""No pass of any decoder reads a value on the host or brings one to the device: on a GPU each such step would wait.

A pass on the `meta` device has shapes and no values, so whatever asks for a value raises. What would only be slow (a list
turned into a tensor, a number put at indices) is watched by name.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sjd2 import api
from sjd2.decoding.block import Block
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.dispatch import start_engine
from sjd2.decoding.engine import Engine
from sjd2.decoding.generate import generate, stream
from sjd2.decoding.interfaces import Draft, State
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.refine import Resample
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.verify import Exact
from sjd2.files import ROOT
from sjd2.models.base import Condition, ImageModel
from tests.helpers.bounded_spans import as_on_a_gpu
from tests.helpers.decoders import GRID, KINDS, PROMPTS, SAMPLING
from tests.helpers.tiers import by_default
from tests.helpers.toy import Toy

pytestmark = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
DECODERS = sorted(path.stem for path in (ROOT / "conf" / "decoder").glob("*.yaml"))
SAMPLINGS = {
    "cdf": SamplingParams(guidance_scale=3.0, top_k=100, temperature=0.9),
    "plain": SamplingParams(top_p=0.9, min_p=0.05),
    "gumbel": SamplingParams(guidance_scale=3.0, sampler="gumbel"),
    "greedy": SamplingParams(temperature=0.0),
}
PASSES = [(name, "cdf") for name in DECODERS]
MORE = [
    (name, sampling)
    for name in ("ar", "scd", "sjd2", "sjd-fc", "eagle", "eagle1", "zipar")
    for sampling in ("plain", "gumbel")
]
DEFAULT = [pair for pair in MORE if pair[0] in ("sjd2", "eagle")]
PASSES += by_default(MORE, DEFAULT, slow=[pair for pair in MORE if pair[0] in ("scd", "sjd-fc", "eagle1")])
PASSES += [(name, "greedy") for name in ("ar", "jacobi")]
HOST = ("tensor", "as_tensor", "from_numpy", "item", "tolist", "numpy", "cpu", "cuda", "nonzero")
HOST += ("__bool__", "__int__", "__float__", "__index__", "masked_select", "unique", "bincount", "multinomial")


class Calls(TorchFunctionMode):
    """Notes calls that read values on the host or copy from it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, call: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(call, "__name__", str(call))
        if name in HOST:
            self.found.append(name)
        # a number put at indices becomes a tensor on the host first; at slices it is a fill
        if name == "__setitem__" and not isinstance(args[2], Tensor) and _indexed(args[1]):
            self.found.append("a number put at indices")
        return call(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Notes operations whose result or inputs cross devices, or whose shape depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += 1
        out = call(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if len({x.device.type for x in tensors if x.dim()}) > 1:
            self.found.append(f"{call} crosses devices")
        if call._schema.name in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"):
            indices = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self.found.append(f"{call} by a mask")
        return out


def _indexed(place: Any) -> bool:
    return any(isinstance(part, Tensor) for part in (place if isinstance(place, tuple) else (place,)))


def watch(step: Any) -> list[str]:
    """Run a pass and return what it did that a GPU would have to wait for."""
    calls, operations = Calls(), Operations()
    try:
        with operations, calls:
            step()
    except (RuntimeError, NotImplementedError) as error:
        return [*calls.found, *operations.found, str(error).splitlines()[0]]
    return [*calls.found, *operations.found]


@pytest.fixture(scope="module")
def meta() -> ImageModel:
    """The embedded model without its values."""
    model = api.load("tiny")
    model.full.to("meta")
    model.ids = model.ids.to("meta")
    model.adapter.to("meta")
    return model


def begin(model: ImageModel, decoder: Decoder, sampling: SamplingParams) -> Engine:
    """Start an engine of two rows, admit prompts and run the first two passes: they may still build tables."""
    width = model.embed(torch.zeros(1, 1, dtype=torch.long, device="meta")).shape[-1]
    lengths = torch.zeros(2, dtype=torch.long, device="meta")
    embeds = torch.zeros(2, 6, width, device="meta")
    engine = start_engine(model, decoder, 2, 6, sampling)
    engine.admit([0, 1], Condition(embeds, lengths, embeds[:1, :2], lengths[:1]), [1, 2])
    engine.step()
    engine.step()
    return engine


@pytest.mark.parametrize("case", PASSES, ids="-".join)
def test_no_pass_of_a_decoder_waits_for_its_device(meta: ImageModel, case: tuple[str, str]) -> None:
    name, sampling = case
    assert watch(begin(meta, api.decoder(name, model="tiny"), SAMPLINGS[sampling]).step) == []


@pytest.mark.parametrize("settings", [{"rule": "paper", "steps": 4}, {"levels": "slot", "clean": 4, "early": 0.5}])
def test_no_setting_of_sjd2_waits_for_its_device(meta: ImageModel, settings: dict) -> None:
    assert watch(begin(meta, api.decoder("sjd2", model="tiny", **settings), SAMPLINGS["cdf"]).step) == []


JOINT = [("scd", Block()), ("sjd2", Block()), ("sjd2-fc", Block()), ("sjd2-fc", Block(siblings="by_token"))]


@pytest.mark.parametrize(("name", "verifier"), JOINT)
def test_no_joint_decision_waits_for_its_device(meta: ImageModel, name: str, verifier: Block) -> None:
    decoder = replace(api.decoder(name, model="tiny"), verifier=verifier)
    assert watch(begin(meta, decoder, SAMPLINGS["cdf"]).step) == []


class Waits(Jacobi):
    """A drafter that does what must not be done."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def propose(self, carried: Draft, fresh: Tensor, state: State) -> Draft:
        filled, rows = super().propose(carried, fresh, state), torch.zeros_like(fresh[:, 0], dtype=torch.long)
        match self.how:
            case "item":
                int(state.committed.max())
            case "bool":
                filled = filled if fresh.any() else carried
            case "mask":
                filled.tokens[fresh] = filled.tokens[fresh]
            case "tolist":
                state.committed.tolist()
            case "cpu":
                state.committed.cpu()
            case "list":
                filled.tokens.add_(torch.tensor([0], device=fresh.device))
            case "number":
                filled.tokens[rows] = 0
            case "table":
                filled.tokens.add_(torch.zeros(3, dtype=torch.long).to(fresh.device)[0])
        return filled


@pytest.fixture(scope="module")
def engine(meta: ImageModel) -> Engine:
    decoder = Decoder(name="x", window=5, lossless=True, drafter=Waits("not"), verifier=Exact(), refiner=Resample())
    return begin(meta, decoder, SAMPLINGS["cdf"])


@pytest.mark.parametrize("how", ["item", "bool", "mask", "tolist", "cpu", "list", "number", "table"])
def test_what_waits_is_found(engine: Engine, how: str) -> None:
    drafter = engine.drafter

    def propose() -> Draft:
        return drafter.propose(engine.carried, engine.fresh, engine.state)

    drafter.how = "not"
    assert watch(propose) == []
    drafter.how = how
    assert watch(propose)


def test_a_loop_frees_its_keys_when_it_ends(model: Toy) -> None:
    # not when Python next looks for cycles: those of one batch of Emu3 take 17 GB
    gc.collect()
    gc.disable()
    try:
        for name in ("ar", "sjd"):
            engine = start_engine(model, KINDS[name]({}), 2, 4, SAMPLING)
            engine.admit([0, 1], model.encode(PROMPTS[:2]), [1, 2])
            engine.step()
            engine.step()
            held = weakref.ref(engine.cache.layers[0].keys)
            del engine
            assert held() is None
    finally:
        gc.enable()


# ---- spans: where the host does not read lengths, it keeps a bound


@pytest.fixture(scope="module")
def model() -> Toy:
    return Toy(GRID, dtype=torch.float64, width=16)


@pytest.mark.parametrize("name", KINDS)
def test_a_bound_instead_of_the_lengths_changes_no_token(model: Toy, name: str, nets: dict[str, str]) -> None:
    seeds, decoder = list(range(1, len(PROMPTS) + 1)), KINDS[name](nets)
    with as_on_a_gpu():
        bounded = generate(model, decoder, model.encode(PROMPTS), seeds, sampling=SAMPLING)
        refilled = dict(stream(model, decoder, zip(PROMPTS, seeds, strict=True), rows=2, sampling=SAMPLING))
    exact = generate(model, decoder, model.encode(PROMPTS), seeds, sampling=SAMPLING)
    assert torch.equal(bounded.tokens, exact.tokens)
    for index, sample in refilled.items():
        assert (sample.tokens == exact.samples[index].tokens).all()


@pytest.mark.parametrize("name", KINDS)
def test_spans_follow_the_rows(model: Toy, name: str, nets: dict[str, str]) -> None:
    # the host's bound grows by a whole window per pass and is set right at each look at the device, in every cache
    decoder = KINDS[name](nets)
    with as_on_a_gpu() as spans:
        engine = start_engine(model, decoder, 1, 3, SAMPLING)
        engine.admit([0], model.encode(PROMPTS[:1]), [1])
        spans.clear()
        while not engine.finished():
            engine.step()
    deepest = decoder.window + (9 if name == "eagle" else 0)  # one pass, and nodes of the head that stand after it
    assert max(span - need for span, need in spans) < deepest + 8
