"""PathSpec's relaxed test against its description, in plain loops over chains; windows and settings that are refused."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from baselines.pathspec import CrossPath, JacobiPaths
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.interfaces import Draft
from sjd2.decoding.noise import Noise
from sjd2.decoding.refine import Coupled, Resample
from sjd2.decoding.sampling import CdfSampler
from sjd2.decoding.verify import Verification, verify
from sjd2.errors import UserError
from sjd2.models.layout import TokenGrid
from tests.helpers.decoders import GUIDED, SAMPLING, decode, paths
from tests.helpers.enumeration import is_caught
from tests.helpers.toy import Toy

CODES, LENGTH = 3, 2
DEEP = [(0, 1), (1, 2), (0, 3), (1, 4)]  # depth - 1, slot; chain by chain
WINDOW = 1 + 2 * LENGTH


def distributions(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, CODES, generator=torch.Generator().manual_seed(seed)).double().softmax(-1)


def described(x: tuple[int, ...], p: list, q: list, delta: float) -> tuple[list[float], list[list[float]]]:
    """Return the acceptance probability of each draft token by the description, and what each leaves of p when rejected."""

    def test(left: list, own: int, other: int) -> float:
        return min(1.0, (left[x[own]] + delta * left[x[other]]) / q[own][x[own]])

    def rejected(left: list, slot: int) -> list[float]:
        rest = [max(0.0, a - b) for a, b in zip(left, q[slot], strict=True)]
        return [a / sum(rest) for a in rest]

    prob, left = [0.0] * 4, [[]] * 4
    root = p[0]
    for depth, slot in DEEP:
        own, other = slot - 1, (slot + LENGTH - 1) % (2 * LENGTH)
        before = root if depth == 0 else p[slot - 1]
        prob[own], left[own] = test(before, own, other), rejected(before, own)
        if depth == 0:
            root = left[own]
    return prob, left


def verified(x: list[tuple[int, ...]], p: torch.Tensor, q: torch.Tensor, verifier: CrossPath) -> Verification:
    """Return the code's verification of a pass with draft tokens x, one row each."""
    rows = len(x)
    model = SimpleNamespace(device=torch.device("cpu"), layout=SimpleNamespace(vocabulary=CODES))
    shape = JacobiPaths().bind(model, WINDOW).shape
    tokens = torch.cat([torch.zeros(rows, 1, dtype=torch.long), torch.tensor(x)], 1)
    draft = Draft(tokens, q.expand(rows, -1, -1), shape=shape)
    noise, positions = Noise(torch.arange(rows), torch.float64), 1 + shape.depth[:, 1:].expand(rows, -1)
    state = SimpleNamespace(
        noise=noise, sampler=CdfSampler(noise), iteration=torch.zeros(rows, dtype=torch.long),
        draft_positions=lambda _: positions, forced_slots=lambda size, _: torch.full((rows, size), -1),
        committed=torch.ones(rows, dtype=torch.long),
    )  # fmt: skip
    return verify(verifier, draft, p.expand(rows, -1, -1), state)


@pytest.mark.parametrize("delta", [0.0, 0.3, 2.0])
def test_the_relaxed_test_is_its_description(delta: float) -> None:
    p, q = distributions(WINDOW, 1), distributions(WINDOW - 1, 2)
    x = list(itertools.product(range(CODES), repeat=WINDOW - 1))
    test = verified(x, p, q, CrossPath(delta=delta))
    wanted = [described(row, p.tolist(), q.tolist(), delta) for row in x]
    assert torch.allclose(test.accept_prob, torch.tensor([prob for prob, _ in wanted]).double(), atol=1e-12)
    # the token after the accepted path: of what the last rejected child has left, or a bonus token
    for end, rejected in ((0, 3), (1, 2), (3, 4), (2, None), (4, None)):
        probs, bonus = test.next_probs(torch.full((len(x),), end))
        after = [p[end].tolist() if rejected is None else left[rejected - 1] for _, left in wanted]
        assert bonus.eq(rejected is None).all()
        assert torch.allclose(probs / probs.sum(-1, keepdim=True), torch.tensor(after).double(), atol=1e-12)


def relaxed(window: int, delta: float) -> Decoder:
    return Decoder(
        name="pathspec-relaxed", window=window, lossless=False, drafter=JacobiPaths(), verifier=CrossPath(delta=delta),
        refiner=Resample(),
    )  # fmt: skip


def test_without_relaxation_it_decodes_as_pathspec_and_with_it_faster() -> None:
    toy = Toy(TokenGrid(2, 5, 9, row_end=20), dtype=torch.float64)
    wanted, got, fast = (decode(toy, d) for d in (paths(9, Resample()), relaxed(9, 0.0), relaxed(9, 20.0)))
    assert torch.equal(got.tokens, wanted.tokens)
    assert [s.accepted for s in got.samples] == [s.accepted for s in wanted.samples]
    assert sum(s.forwards for s in fast.samples) < sum(s.forwards for s in wanted.samples)


@pytest.mark.full
def test_the_relaxed_test_is_lossy() -> None:
    assert is_caught(relaxed(7, 1.0), GUIDED)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: JacobiPaths(paths=1), "one chain is decoder=sjd"),
        (lambda: JacobiPaths(init="down"), "decoder.drafter.init"),
        (lambda: paths(8), "give 7 or 9"),
        (lambda: paths(2), "give 3,"),
        (lambda: paths(7, Coupled(coupling="gumbel")), "with the same noise"),
        (lambda: paths(7, Resample(record=False)), "record=true"),
        (lambda: CrossPath(delta=-1.0), "0 .exact verification"),
        (lambda: relaxed(7, 0.1).check_sampling(SAMPLING.__class__(sampler="gumbel")), "nothing to relax"),
    ],
)
def test_what_cannot_run_is_refused(make, part: str) -> None:
    with pytest.raises(UserError, match=part):
        make()
