"""Replayed passes give exactly the tokens of plain ones: on a CPU, with tests/helpers/tape.py in place of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from baselines.pjd import ParallelJacobi
from baselines.zipar import ZipAR
from sjd2.compiler import Compiler
from sjd2.decoding.block import Block
from sjd2.decoding.cuda_graph import Graphs, Replayed
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import StepInfo, generate, stream, warm_up
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.refine import Coupled, Keep, Resample
from sjd2.decoding.verify import Exact
from sjd2.decoding.window import WindowEngine
from sjd2.denoising.denoise import Denoise
from sjd2.errors import UserError
from tests.helpers import tape
from tests.helpers.bounded_spans import as_on_a_gpu
from tests.helpers.decoders import AR, GRID, KINDS, PROMPTS, SAMPLING, sjd, sjd2
from tests.helpers.fault import Fault
from tests.helpers.toy import Toy, adapted_toy

SEEDS = list(range(1, len(PROMPTS) + 1))


def paper(window: int, steps: int) -> Decoder:
    drafter = Denoise(steps=steps, nearest=True)
    return Decoder(
        name="sjd2", window=window, lossless=False, drafter=drafter, verifier=Exact(), refiner=Keep(), rule="paper"
    )


DECODERS = {name: KINDS[name] for name in ("ar", "front", "paths", "eagle")}
DECODERS |= {"sjd2": lambda n: sjd2(9, steps=2, levels="slot", clean=3), "sjd2 paper": lambda n: paper(9, 2)}
DECODERS |= {
    "zipar": lambda n: ZipAR(name="zipar", lossless=False, window_size=2),
    "pjd": lambda n: ParallelJacobi(name="pjd", lossless=False, context=2, drafts=3),
}
DECODERS |= {"block": lambda n: sjd(7, Coupled(), verifier=Block())}


@pytest.fixture(scope="module")
def model() -> Toy:
    return adapted_toy(GRID)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several graphs within one small image."""
    monkeypatch.setattr("sjd2.decoding.cuda_graph.BUCKET", 16)
    monkeypatch.setattr("sjd2.decoding.cuda_graph.PROMPT", 1)


@pytest.mark.parametrize("name", DECODERS)
def test_replayed_passes_give_the_tokens_of_the_plain_engine(
    model: Toy, name: str, nets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(model)
    monkeypatch.setattr(model, "logits", fault)
    decoder, graphs = DECODERS[name](nets), Graphs(tape.record)
    plain = generate(model, decoder, model.encode(PROMPTS), SEEDS, sampling=SAMPLING)
    with as_on_a_gpu():
        # the second batch has a longer prompt: keys and values move; the third finds everything in place
        first = generate(model, decoder, model.encode(PROMPTS[:2]), SEEDS[:2], sampling=SAMPLING, graphs=graphs)
        engine = graphs.kept
        then = generate(model, decoder, model.encode(PROMPTS[2:4]), SEEDS[2:4], sampling=SAMPLING, graphs=graphs)
        again = generate(model, decoder, model.encode(PROMPTS[:2]), SEEDS[:2], sampling=SAMPLING, graphs=graphs)
        seen: list[StepInfo] = []
        last = generate(model, decoder, model.encode(PROMPTS[1:2]), SEEDS[1:2], sampling=SAMPLING, graphs=graphs,
                        on_step=seen.append)  # fmt: skip
    assert torch.equal(last.tokens, plain.tokens[1:2])  # a smaller batch, in rows of the same engine
    assert [s.accepted for s in last.samples] == [s.accepted for s in plain.samples[1:2]]
    assert {len(x) for info in seen for x in (info.committed, info.accepted, info.tokens, *info.peek().values())} == {1}
    assert isinstance(engine, Replayed)
    assert engine is graphs.kept
    assert any(engine.graphs.values())
    assert all(prefill.replay.__func__ is tape.Tape.replay for prefill in engine.prefills.values())
    assert 2 in engine.prefills  # the third batch's prompts are shorter than the room that the second one made
    assert torch.equal(first.tokens, plain.tokens[:2])
    assert torch.equal(then.tokens, plain.tokens[2:4])
    assert torch.equal(again.tokens, plain.tokens[:2])
    assert [s.accepted for s in again.samples] == [s.accepted for s in plain.samples[:2]]
    assert [s.drafts for s in again.samples] == [s.drafts for s in plain.samples[:2]]
    for sample in (
        plain.samples if name not in ("ar", "zipar", "pjd") else ()
    ):  # what a pass commits: accepted draft tokens, and one drawn at most
        assert 0 <= sum(sample.accepted[1:]) - sample.drafts.accepted <= sample.forwards - 1
    with as_on_a_gpu(), pytest.raises(UserError, match="the model's distribution is not finite"):
        # noted in a replayed pass, reported when the host next looks
        generate(model, decoder, model.encode(PROMPTS[:2]), SEEDS[:2], sampling=SAMPLING, graphs=graphs,
                 on_step=fault.after(1, torch.nan))  # fmt: skip


@pytest.mark.parametrize("name", ["zipar", "pjd"])
def test_rows_that_a_warm_up_has_left_in_an_image_stay_empty(model: Toy, name: str, nets: dict[str, str]) -> None:
    decoder, graphs = DECODERS[name](nets), Graphs(tape.record)
    with as_on_a_gpu():
        warm_up(model, decoder, model.encode(PROMPTS[:2]), sampling=SAMPLING, graphs=graphs)
        engine = graphs.start(model, decoder, 1, 3, SAMPLING)
        for _ in range(2):
            engine.step()
        assert engine.finished() == [0, 1]


@pytest.mark.parametrize("name", ["ar", "sjd2", "eagle"])
def test_a_device_that_cannot_record_runs_the_passes_as_they_are(
    model: Toy, name: str, nets: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        tape.record(work)  # as on a GPU: the host has gone through the pass, the device has done nothing of it
        raise RuntimeError("operation not permitted when stream is capturing")

    decoder = DECODERS[name](nets)
    plain = generate(model, decoder, model.encode(PROMPTS[:2]), SEEDS[:2], sampling=SAMPLING)
    with as_on_a_gpu():
        graphs = Graphs(refuse)
        for count in (2, 1, 2):  # the next batches, a smaller one among them, do not try again
            condition = model.encode(PROMPTS[:count])
            found = generate(model, decoder, condition, SEEDS[:count], sampling=SAMPLING, graphs=graphs)
            assert torch.equal(found.tokens, plain.tokens[:count])
            assert [s.accepted for s in found.samples] == [s.accepted for s in plain.samples[:count]]
    assert caplog.text.count("not as CUDA graphs: operation not permitted when stream is capturing.") == 1


def test_keys_of_a_draft_network_may_move_alone(
    model: Toy, nets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the head's cache has room for a tree beside the model's: a longer prompt may outgrow just the one
    monkeypatch.setattr("sjd2.decoding.cuda_graph.BUCKET", 64)
    decoder = KINDS["eagle"](nets)
    for start in range(1, 9):  # tokens of the first prompt; one of them leaves room in the model's cache alone
        graphs = Graphs(tape.record)
        with as_on_a_gpu():
            engine = graphs.start(model, decoder, 1, start, SAMPLING)
            before = engine.cache.capacity, engine.state.memory.cache.capacity
            engine.capacity, engine.prompt = engine.capacity + 1, start + 1
            engine.graphs[64] = lambda: None
            engine.grow()
            moved = (engine.cache.capacity, engine.state.memory.cache.capacity) != before
        assert not (moved and engine.graphs)


@pytest.mark.parametrize("name", ["sjd2"])
def test_refilled_rows_may_be_replayed(model: Toy, name: str, nets: dict[str, str]) -> None:
    decoder = DECODERS[name](nets)
    plain = generate(model, decoder, model.encode(PROMPTS), SEEDS, sampling=replace(SAMPLING, sampler="gumbel"))
    with as_on_a_gpu():
        requests = zip(PROMPTS, SEEDS, strict=True)
        sampling = replace(SAMPLING, sampler="gumbel")
        for index, sample in stream(model, decoder, requests, rows=2, sampling=sampling, graphs=Graphs(tape.record)):
            assert (sample.tokens == plain.samples[index].tokens).all()


def test_another_batch_size_adapter_or_sampling_opens_another_engine(
    model: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, decoder = Graphs(tape.record), sjd(4)
    engine = graphs.start(model, decoder, 2, 5, SAMPLING)
    assert graphs.start(model, decoder, 2, 3, SAMPLING) is engine
    assert graphs.start(model, decoder, 1, 3, SAMPLING) is engine  # the last batch of a run: a row stays empty
    assert graphs.start(model, decoder, 3, 5, SAMPLING) is not engine
    assert graphs.start(model, decoder, 2, 5, replace(SAMPLING, top_k=3)) is not engine
    assert graphs.start(model, decoder, 2, 5, replace(SAMPLING, min_p=0.1)) is not engine
    assert graphs.start(model, sjd(5), 2, 5, SAMPLING) is not engine  # another window of the same decoder
    engine = graphs.start(model, decoder, 2, 5, SAMPLING)
    model.compiler = Compiler()
    other = graphs.start(model, decoder, 2, 5, SAMPLING)
    model.compiler = None
    assert other is not engine
    assert graphs.start(model, decoder, 2, 5, SAMPLING) is not other  # its passes are compiled
    engine = graphs.start(model, decoder, 2, 5, SAMPLING)
    monkeypatch.setattr(model, "adapter", None)
    assert graphs.start(model, decoder, 2, 5, SAMPLING) is not engine
    monkeypatch.setattr(WindowEngine, "replayable", False)
    assert not isinstance(graphs.start(model, decoder, 2, 5, SAMPLING), Replayed)


class Remembers(Jacobi):
    """A drafter that keeps a tensor where no graph looks: what it drafted from, one pass ago."""

    def propose(self, carried, fresh, state):
        filled = super().propose(carried, fresh, state)
        last = getattr(self, "last", None)
        self.last = filled.tokens
        if last is None or len(last) != len(filled.tokens):
            return filled
        tokens = torch.cat([filled.tokens[:, :1], last[:, 1:]], 1)
        return replace(filled, tokens=state.force(tokens), probs=None)


def test_a_part_that_keeps_tensors_of_its_own_is_found_out(model: Toy) -> None:
    def decoder() -> Decoder:
        refiner = Resample(record=False)
        return Decoder(name="x", window=6, lossless=True, drafter=Remembers(), verifier=Exact(), refiner=refiner)

    plain = generate(model, decoder(), model.encode(PROMPTS), SEEDS, sampling=SAMPLING)
    with as_on_a_gpu():
        eager = generate(model, decoder(), model.encode(PROMPTS), SEEDS, sampling=SAMPLING)
        graph = generate(model, decoder(), model.encode(PROMPTS), SEEDS, sampling=SAMPLING, graphs=Graphs(tape.record))
    assert torch.equal(eager.tokens, plain.tokens)
    assert [s.accepted for s in graph.samples] != [s.accepted for s in plain.samples]


def test_ar_costs_a_graph_per_bound(model: Toy) -> None:
    graphs = Graphs(tape.record)
    with as_on_a_gpu():
        generate(model, AR, model.encode(PROMPTS[:1]), [1], sampling=SAMPLING, graphs=graphs)
    # prompt and image are 33 tokens; a bound's first pass is not replayed
    assert sorted(graphs.kept.graphs) == [16, 32, 33]
    assert [level for level, replay in graphs.kept.graphs.items() if replay] == [16, 32]


def test_graphs_need_a_gpu_and_are_asked_for_by_one_setting(cli) -> None:
    assert cli("decoder=ar", "device=cpu", "runtime.graph=true") == 1
    assert "runtime.graph=true needs a GPU" in cli.err
    assert cli("decoder=ar", "runtime.graph=maybe") == 1
    assert "runtime.graph must be true or false" in cli.err
