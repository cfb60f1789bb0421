"""Compiled pieces of a pass give the tokens of plain ones: traced by default, as Inductor's code in the tier slow."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from baselines.gsd import Grouped
from sjd2.compiler import Compiler
from sjd2.decoding.block import Block
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate
from sjd2.decoding.noise import Noise, Purpose
from sjd2.decoding.refine import Coupled
from sjd2.decoding.shapes import Tree
from tests.helpers.decoders import AR, GRID, PROMPTS, SAMPLING, front, sjd, sjd2
from tests.helpers.toy import Toy, adapted_toy

SEEDS = list(range(1, len(PROMPTS) + 1))
GUMBEL = replace(SAMPLING, sampler="gumbel")
SCD = sjd(6, Coupled())
DECODERS: dict[str, Any] = {
    "ar": lambda nets: AR,
    "sjd2": lambda nets: sjd2(9, steps=2, levels="slot", clean=3),
    "sjd-pac": lambda nets: front(30, nets, siblings=(2, 1), copies=2, full=True),
    "sjd-fc": lambda nets: front(20, nets, siblings=(2, 1, 1), copies=4, corrected=3),
    "block": lambda nets: sjd(7, Coupled(), verifier=Block()),
}


@pytest.fixture
def model() -> Toy:
    return Toy(GRID)


def decode(model: Toy, decoder: Decoder, sampling: Any, backend: str | None) -> list[Any]:
    """Return tokens and passes of all prompts, compiled by a backend."""
    model.compiler = None if backend is None else Compiler(backend)
    result = generate(model, decoder, model.encode(PROMPTS), SEEDS, sampling=sampling)
    if model.compiler is not None:
        assert model.compiler.left_out == {}
        assert any(name.endswith("settle") for name in model.compiler.seconds)
    return [result.tokens.tolist(), [s.accepted for s in result.samples], [s.drafts for s in result.samples]]


def test_traced_pieces_give_the_tokens_of_plain_ones(model: Toy) -> None:
    plain = decode(model, SCD, GUMBEL, None)
    assert decode(model, SCD, GUMBEL, "aot_eager") == plain
    # the pieces serve another engine of an equal decoder
    assert model.compiler is not None
    seconds, graphs = dict(model.compiler.seconds), counters["stats"]["unique_graphs"]
    again = generate(model, sjd(6, Coupled()), model.encode(PROMPTS), SEEDS, sampling=GUMBEL)
    assert again.tokens.tolist() == plain[0]
    assert model.compiler.seconds == seconds
    assert counters["stats"]["unique_graphs"] == graphs  # no piece is compiled again in silence


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_traced_pieces_of_other_decoders(name: str, nets: dict[str, str]) -> None:
    model = adapted_toy(GRID, torch.float32)
    decoder = DECODERS[name](nets)
    assert decode(model, decoder, GUMBEL, "aot_eager") == decode(model, decoder, GUMBEL, None)


@pytest.mark.slow
def test_traced_pieces_of_a_lossy_verifier(model: Toy) -> None:
    decoder = sjd(6, verifier=Grouped(group=4), lossless=False)
    assert decode(model, decoder, SAMPLING, "aot_eager") == decode(model, decoder, SAMPLING, None)


@pytest.fixture
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor looks for a compiler by setuptools, which puts its own libraries on the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.slow
@pytest.mark.usefixtures("own_path")
def test_inductors_code_for_two_windows_in_one_process(model: Toy) -> None:
    for window in (4, 6):  # each with kernels of its own
        decoder = sjd(window, Coupled())
        assert decode(model, decoder, GUMBEL, "inductor") == decode(model, decoder, GUMBEL, None)


@pytest.mark.slow
@pytest.mark.usefixtures("own_path")
def test_inductor_mixes_the_same_random_numbers() -> None:
    # 64-bit products that wrap around; it takes the product of an arange for an index, which must not
    noise, place = Noise(torch.arange(7) * 2**40 + 5, length=60), torch.arange(50).expand(7, -1)
    tree = Tree.static([0, 0, 0, *range(1, 49)], chain=1, device=place.device)

    def numbers(place: torch.Tensor) -> list[torch.Tensor]:
        uniform = noise.uniform(place, Purpose.ACCEPT, torch.arange(7), 3)
        coin = noise.uniform(place, Purpose.ACCEPT, torch.arange(7), tree.number)
        return [uniform, coin, noise._field(place, Purpose.SAMPLE, 30)]

    compiled = torch.compile(numbers, dynamic=False, fullgraph=True)
    for expected, found in zip(numbers(place), compiled(place), strict=True):
        assert torch.equal(expected, found)


def test_what_cannot_be_compiled_runs_as_it_is(model: Toy, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such card")

    compiler = Compiler(refuse)
    plain = decode(model, AR, GUMBEL, None)
    model.compiler = compiler
    for _ in range(2):
        assert generate(model, AR, model.encode(PROMPTS), SEEDS, sampling=GUMBEL).tokens.tolist() == plain[0]
    assert list(compiler.left_out) == ["AutoregressiveEngine.settle"]
    assert caplog.text.count("AutoregressiveEngine.settle runs as it is, not compiled:") == 1
    assert "no such card" in caplog.text


def test_a_shape_that_cannot_be_compiled_later_runs_as_it_is() -> None:
    def refuse_large(graph: Any, inputs: Any) -> Any:
        if len(inputs[0]) > 4:
            raise RuntimeError("too large")
        return graph.forward

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    compiler = Compiler(refuse_large)
    piece = compiler.piece(double, ())
    for size in (1, 1, 2, 2, 3, 5, 6):  # in the middle of a run, after the first calls
        assert piece(torch.ones(size)).tolist() == [2.0] * size
    assert "too large" in compiler.left_out["double"]
    spent = compiler.seconds["double"]
    assert compiler.entry()["seconds"] == {"double": round(spent, 2)}
    assert compiler.entry({"double": spent})["seconds"] == {}  # what an earlier run of this process has compiled


def test_float64_is_left_as_it_is() -> None:
    model = adapted_toy(GRID)
    model.compiler = Compiler()
    generate(model, AR, model.encode(PROMPTS[:1]), [1], sampling=SAMPLING)
    assert model.compiler.entry() == {"backend": "inductor", "seconds": {}}


def test_code_is_kept_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    Compiler()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    Compiler()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/somewhere/sjd2/inductor"
