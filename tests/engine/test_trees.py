"""Tree drafts: enumerated distributions with siblings, corrections and EAGLE heads; negative controls; equalities with AR."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from baselines.eagle.eagle_drafter import Eagle, EagleDrafter
from baselines.pathspec import JacobiPaths, JacobiPathsDrafter
from baselines.reuse import Reuse
from sjd2.decoding.block import Block
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import stream
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.refine import Coupled, Resample
from sjd2.decoding.sampling import without
from sjd2.decoding.shapes import AcceptedPath, Tree
from sjd2.decoding.verify import Exact
from sjd2.denoising.denoise import Denoise
from sjd2.errors import UserError
from sjd2.front.corrector import Corrector
from sjd2.front.front_drafter import Front, FrontDrafter
from sjd2.front.front_shape import branches, front_shape
from sjd2.models.kv_cache import RowCache
from tests.helpers.decoders import AR, CUT, FORCED, GRID, GUIDED, PATHS, PROMPTS, SAMPLING, decode, eagle, front, paths
from tests.helpers.enumeration import is_caught, z_score
from tests.helpers.tiers import by_default
from tests.helpers.toy import Toy

LOSSLESS = {
    "siblings": (lambda n: front(9, n, siblings=(2, 1), copies=2), GUIDED),
    "siblings resampled": (lambda n: front(9, n, siblings=(2, 1), copies=2, refiner=Resample()), CUT),
    "k-ary tree": (lambda n: front(13, n, siblings=(2, 1), copies=2, full=True), GUIDED),
    "gumbel coupling": (
        lambda n: front(9, n, siblings=(2, 1), copies=2, refiner=Coupled(coupling="gumbel")),
        GUIDED,
    ),
    "paths": (lambda n: paths(7), GUIDED),
    "three paths resampled": (lambda n: paths(10, Resample(), paths=3), CUT),
    "paths left": (lambda n: paths(9, init="left"), GUIDED),
    "paths reused": (lambda n: paths(7, Reuse(threshold=0.3)), GUIDED),
    "corrected": (lambda n: front(4, n, corrected=1), GUIDED),
    "corrected twice": (lambda n: front(5, n, corrected=2), CUT),
    "corrected branches": (
        lambda n: front(13, n, siblings=(2, 1), sibling_temperature=0.1, copies=3, corrected=3),
        GUIDED,
    ),
    "corrected below the front": (
        lambda n: front(7, n, refiner=Resample(), siblings=(1,), copies=2, corrected=0, rest=True),
        GUIDED,
    ),
    "noise after branches": (
        lambda n: front(9, n, Denoise(steps=1), siblings=(2, 1), copies=2, corrected=2, rest=True),
        GUIDED,
    ),
    "eagle chain": (lambda n: eagle(4, n, shape="chain"), GUIDED),
    "eagle static": (lambda n: eagle(7, n, shape="static", tree=PATHS), GUIDED),
    "eagle dynamic": (lambda n: eagle(8, n, shape="dynamic", depth=3, top_k=2), CUT),
}


DEFAULT = ("siblings", "paths", "corrected branches", "eagle chain", "eagle dynamic")
SLOW = ("three paths resampled", "paths left", "paths reused", "eagle static", "siblings resampled", "gumbel coupling")


@pytest.mark.parametrize("name", by_default(LOSSLESS, DEFAULT, SLOW))
def test_trees_have_the_enumerated_distribution(name: str, nets: dict[str, str]) -> None:
    make, sampling = LOSSLESS[name]
    assert abs(z_score(make(nets), sampling)) < 5


@pytest.mark.parametrize(
    "name",
    by_default(
        ["corrected branches", "eagle static", "eagle dynamic", "paths"], ["eagle dynamic"], ["paths", "eagle static"]
    ),
)
def test_forced_tokens_in_trees_do_not_change_the_distribution(name: str, nets: dict[str, str]) -> None:
    assert abs(z_score(LOSSLESS[name][0](nets), GUIDED, FORCED)) < 5


@pytest.mark.full
def test_appended_timestep_tokens_in_trees_do_not_change_the_distribution(nets: dict[str, str]) -> None:
    decoder = front(9, nets, Denoise(steps=1), siblings=(2, 1), copies=2, corrected=2)
    assert abs(z_score(decoder, GUIDED, code="appended")) < 5


@pytest.mark.parametrize("corrected", [0, 2])
def test_the_rest_is_corrected_once_a_pass_with_and_without_a_front(
    corrected: int, nets: dict[str, str], model: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, plain = [], Corrector.forward

    def forward(corrector: Corrector, *states: Tensor) -> Tensor:
        calls.append(states[0].shape[1])
        return plain(corrector, *states)

    monkeypatch.setattr(Corrector, "forward", forward)
    result = decode(model, front(8, nets, corrected=corrected, rest=True))
    passes = max(sample.forwards for sample in result.samples) - 1  # the prefill drafts nothing
    assert calls == ([1] * corrected + [7 - corrected]) * passes


class StaleRecord(FrontDrafter):
    """A draft token moved to its corrected distribution, at the front or below, recorded with the one it had before."""

    def couple(self, stale, token, q, place, state):
        moved, _, hidden = super().couple(stale, token, q, place, state)
        return moved, q, hidden


class Unnormalised(FrontDrafter):
    """Siblings drawn without replacement, recorded with the whole distribution."""

    def draw_siblings(self, level, depth, draft, token, q, state):
        super().draw_siblings(level, depth, draft, token, q, state)
        for slots in level.siblings:
            draft.probs[:, slots - 1] = q[:, : len(slots)]


class RecordWithoutTemperature(FrontDrafter):
    """Siblings drawn from q^(1/T), recorded as drawn from q."""

    def draw_siblings(self, level, depth, draft, token, q, state):
        super().draw_siblings(level, depth, draft, token, q, state)
        for slots in level.siblings:
            q = without(q[:, : len(slots)], token[:, : len(slots)].clamp(max=q.shape[-1] - 1))
            token, draft.probs[:, slots - 1] = draft.tokens[:, slots], q


class WholeRecord(EagleDrafter):
    """Children drawn without replacement, recorded with the distribution of the first one."""

    def propose(self, carried, fresh, state):
        draft = super().propose(carried, fresh, state)
        parents, rank = draft.shape.parents[0].tolist(), draft.shape.rank[0].tolist()
        for slot in range(1, state.window):
            first = next(s for s in range(1, state.window) if parents[s] == parents[slot] and rank[s] == 0)
            draft.probs[:, slot - 1] = draft.probs[:, first - 1]
        return draft


class BestFirst(EagleDrafter):
    """Two sampled candidates, the likelier one tried first: chosen by its score, it is no draw from q any more."""

    def propose(self, carried, fresh, state):
        draft = super().propose(carried, fresh, state)
        score = draft.probs[:, 0].gather(1, draft.tokens[:, 1:3])
        draft.tokens[:, 1:3] = draft.tokens[:, 1:3].gather(1, score.argsort(1, descending=True))
        return draft


class Longest(Tree):
    """Each chain tested by itself, the longest accepted one taken: what PathSpec's released code does."""

    def accepted_path(self, accepted, clean):
        paths = [super(Longest, self).accepted_path(accepted & ~other, clean) for other in self._others()]
        best = torch.stack([path.length for path in paths]).argmax(0)
        rows = torch.arange(len(best))
        names = [f.name for f in fields(AcceptedPath) if getattr(paths[0], f.name) is not None]
        pick = {name: torch.stack([getattr(path, name) for path in paths])[best, rows] for name in names}
        return AcceptedPath(**{"can_extend": None} | pick)

    def last_child(self, slots, size):
        return (slots + 1) * (slots % (size // 2) > 0) + (slots == 0)  # of two chains; at the root, that of the first

    def _others(self):
        return [self.lanes[:, 1:] != lane for lane in range(int(self.lanes.max()) + 1)]


class TakesLongest(JacobiPathsDrafter):
    def __init__(self, settings, model, window):
        super().__init__(settings, model, window)
        tree = {field.name: getattr(self.shape, field.name) for field in fields(Tree)}
        self.shape = Longest(**tree | {"ranks": 1})


def broken(settings: Front | Eagle | JacobiPaths, runs: type) -> Front | Eagle | JacobiPaths:
    """Return settings that bind to a drafter of class `runs`."""

    class Broken(type(settings)):
        def bind(self, model, window):
            return runs(self, model, window)

    return Broken(**{field.name: getattr(settings, field.name) for field in fields(settings)})


@pytest.mark.parametrize(
    "drafter",
    [
        lambda n: broken(Front(chain=Jacobi(), weights=n["front"], corrected=1, rest=True), StaleRecord),
        lambda n: broken(Front(chain=Jacobi(), siblings=(1, 1), copies=2), Unnormalised),
        lambda n: broken(
            Front(chain=Jacobi(), siblings=(2,), copies=1, sibling_temperature=0.1), RecordWithoutTemperature
        ),
        lambda n: broken(Eagle(weights=n["eagle"], shape="static", tree=PATHS), WholeRecord),
        lambda n: broken(
            Eagle(weights=n["eagle"], shape="static", tree=((0,), (1,), (0, 0), (1, 0), (0, 1), (1, 1))), BestFirst
        ),
        lambda n: broken(JacobiPaths(), TakesLongest),
    ],
    ids=[
        "stale record",
        "unnormalised siblings",
        "siblings without their temperature",
        "whole record",
        "best first",
        "longest",
    ],
)
def test_broken_trees_are_caught(drafter, nets: dict[str, str]) -> None:
    drafter = drafter(nets)
    refiner = (Resample() if drafter.keeps_lanes else Coupled()) if drafter.num_carried(7) > 1 else None
    decoder = Decoder(name="x", window=7, lossless=True, drafter=drafter, verifier=Exact(), refiner=refiner)
    assert is_caught(decoder, GUIDED)


class NoCompaction(RowCache):
    """Keys and values of an accepted branch stay where they were."""

    def compact(self, path: Tensor) -> None:
        pass


def test_keys_left_in_a_branch_are_caught(nets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sjd2.models.base.RowCache", NoCompaction)
    assert is_caught(front(9, nets, siblings=(2, 1), copies=2), GUIDED)


# ---- equalities


@pytest.fixture(scope="module")
def model() -> Toy:
    return Toy(GRID, dtype=torch.float64, width=16)


MANY = [
    lambda n: front(20, n, siblings=(2, 1, 1), copies=4, corrected=3, rest=True),
    lambda n: front(18, n, siblings=(1, 1), copies=2, full=True),
    lambda n: paths(13, paths=3),
    lambda n: eagle(5, n, shape="chain"),
    lambda n: eagle(7, n, shape="static", tree=PATHS),
    lambda n: eagle(12, n, shape="dynamic", depth=3, top_k=3),
]


@pytest.mark.parametrize("make", MANY)
def test_gumbel_matching_on_trees_returns_exactly_the_tokens_of_ar(model: Toy, make, nets: dict[str, str]) -> None:
    sampling = replace(SAMPLING, sampler="gumbel")
    expected, got = decode(model, AR, sampling), decode(model, make(nets), sampling)
    assert torch.equal(expected.tokens, got.tokens)
    assert sum(s.forwards for s in got.samples) < sum(s.forwards for s in expected.samples)


def jointly(nets: dict[str, str]) -> Decoder:
    return replace(front(20, nets, siblings=(2, 1, 1), copies=4, corrected=3, rest=True), verifier=Block())


@pytest.mark.parametrize("make", [*MANY, jointly])
@pytest.mark.parametrize("rows", by_default([1, 2, 7], [2]))  # 7: some without a request
def test_trees_do_not_depend_on_batch_or_refilling(model: Toy, make, rows: int, nets: dict[str, str]) -> None:
    decoder = make(nets)
    expected = decode(model, decoder).samples
    requests = [(prompt, seed + 1) for seed, prompt in enumerate(PROMPTS)]
    for index, sample in stream(model, decoder, requests, rows=rows, sampling=SAMPLING):
        assert (sample.tokens == expected[index].tokens).all()
        assert sample.accepted == expected[index].accepted
        assert sample.draft_forwards == (sample.forwards - 1) * decoder.num_forwards


@dataclass(frozen=True, kw_only=True)
class ChainAsTree(Jacobi):
    """Jacobi's chain, handed over as a tree of single children."""

    def propose(self, carried, fresh, state):
        draft = super().propose(carried, fresh, state)
        size = draft.tokens.shape[1]
        return replace(draft, shape=Tree.static([0, *range(size - 1)], chain=size, device=draft.tokens.device))


@pytest.mark.parametrize("refiner", [Resample(), Coupled()])
def test_a_tree_of_single_children_is_the_chain(model: Toy, refiner: object) -> None:
    chain, tree = (
        Decoder(name="x", window=7, lossless=True, drafter=drafter, verifier=Exact(), refiner=refiner)
        for drafter in (Jacobi(), ChainAsTree())
    )
    first, second = decode(model, chain), decode(model, tree)
    assert torch.equal(first.tokens, second.tokens)
    assert [s.accepted for s in first.samples] == [s.accepted for s in second.samples]


def test_an_eagle_tree_of_single_children_is_its_chain(model: Toy, nets: dict[str, str]) -> None:
    chain = eagle(4, nets, shape="chain")
    tree = eagle(4, nets, shape="static", tree=((0,), (0, 0), (0, 0, 0)))
    assert torch.equal(decode(model, chain).tokens, decode(model, tree).tokens)


# ---- shapes


def test_the_accepted_path_takes_the_first_accepted_sibling() -> None:
    # 0 -> 1 -> 2, and siblings 3, 4 of 1; 4 -> 5
    tree = Tree.static([0, 0, 1, 0, 0, 4], chain=3, device=torch.device("cpu"))
    accepted = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    path = tree.accepted_path(accepted, None)
    assert path.end.tolist() == [5, 2, 0, 3]
    assert path.length.tolist() == [2, 2, 0, 1]
    assert path.slots[0].tolist() == [0, 4, 5]
    assert tree.follow[4].tolist() == [0, 4, 5]  # the branch itself
    assert tree.follow[3].tolist() == [0, 3, 2]  # a branch without copies continues with the main chain
    clean = torch.tensor([[1, 1, 1, 1, 0, 1]], dtype=torch.bool).expand(4, -1)
    path = tree.accepted_path(accepted, clean)
    assert path.end.tolist() == [4, 2, 0, 3]  # a noisy input may be committed, nothing after it
    assert path.can_extend.tolist() == [False, True, True, True]


def test_a_window_that_is_filled_by_branches_is_told(nets: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sjd2"):
        front(20, nets, siblings=(2, 1), copies=3).bind(Toy(GRID))
        assert not caplog.records
        front(12, nets, siblings=(2, 1), copies=3).bind(Toy(GRID))
    assert "take 8 of 12 slots and leave 4 to the main chain" in caplog.text


def test_branches_are_counted_as_published() -> None:
    # SJD-PAC: K = 3, D = 3 with the root is a tree of 13 nodes, 10 of them beside the main chain
    assert len(branches((2, 2), [2], True)[0]) == 10
    assert len(branches((3, 2, 2), [4], False)[0]) == 3 * 4 + 2 * 3 + 2 * 2
    assert branches((3, 1), [4, 2, 0], False) == ([0, 0, 0, 1, -1, -2, -4, -5, -7, -8], [1, 1, 1, 2, 2, 2, 3, 3, 4, 4])
    built = front_shape(6, siblings=(2, 2), copies=[2], full=True, corrected=0, device=torch.device("cpu"))
    assert built.shape.parents.shape[1] == 16
    assert built.shape.depth[0].tolist() == [0, 1, 2, 3, 4, 5, *[1] * 2, *[2] * 8]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda n: front(8, n, siblings=(3, 2), copies=3), "is too small"),
        (lambda n: front(8, n, siblings=(-1,)), "siblings must be 0 or more"),
        (lambda n: front(9, n, siblings=(1,), sibling_temperature=0), "above 0"),
        (lambda n: Front(chain=Jacobi(), corrected=1), "and only there"),
        (lambda n: Front(chain=Jacobi(), rest=True), "and only there"),
        (lambda n: eagle(4, n, shape="tree"), "did you mean 'static'|Valid"),
        (lambda n: eagle(4, n, shape="static", tree=((0,), (2,))), "without its parent or earlier sibling"),
        (lambda n: eagle(9, n, shape="static", tree=PATHS).check(None), "must be 7"),
        (lambda n: eagle(3, n, shape="static", tree=((0,), (0,))), "repeated node"),
        (lambda n: eagle(2, n, shape="static", tree=((),)), "empty or a repeated"),
        (lambda n: front(9, n, Eagle(weights="x"), siblings=(1,)), "must keep its draft tokens"),
        (lambda n: front(9, n, Front(chain=Jacobi()), siblings=(1,)), "must keep its draft tokens"),
        (lambda n: replace(eagle(4, n, shape="chain"), refiner=Coupled()), "nothing to refine"),
        (lambda n: front(9, n, siblings=(1,), refiner=Resample(record=False)), "record=true"),
        (lambda n: replace(front(9, n, siblings=(1,)), rule="paper", lossless=False), "cannot be combined with trees"),
        (lambda n: replace(front(9, n, siblings=(1,)), refiner=None), "decoder/refiner=coupled"),
    ],
)
def test_wrong_trees_name_the_fix(make, words: str, nets: dict[str, str]) -> None:
    with pytest.raises(UserError, match=words):
        make(nets)
