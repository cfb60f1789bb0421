"""Verifiers that relax by depth, entropy or runs against their definitions in plain loops; the refiner `rising` enumerated."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from baselines import mine_phrases
from baselines.annealed import Annealed
from baselines.entropy_aware import EntropyAware
from baselines.joint_runs import JointRuns, Phrases, PhraseVerifier, RisingRuns, mine
from baselines.rising import Rising
from sjd2.decoding.block import Block
from sjd2.decoding.interfaces import Verifier
from sjd2.decoding.verify import Exact
from sjd2.errors import UserError
from sjd2.models.layout import TokenGrid
from tests.helpers.chains import CODES, DRAFTS, ar_probs, chains, distance, distributions, judge, output
from tests.helpers.decoders import GUIDED, sjd
from tests.helpers.enumeration import is_caught, z_score

# ---- one draft token: acceptance and the distribution of the committed token


def annealed(p: list, q: list, x: int, depth: int) -> float:
    return min(1.0, (1 + 0.5 * 0.7 ** (depth - 1)) * p[x] / q[x])


def entropy(p: list, q: list, x: int, depth: int) -> float:
    """Integrate the rule over u on a fine grid."""
    h = -sum(z * math.log(z) for z in p if z)
    grid = [(k + 0.5) / 20_000 for k in range(20_000)]
    return sum(p[x] / q[x] > h / 2 * (0.5 + (u - 0.5) * (1 - h / 6)) for u in grid) / len(grid)


def released_entropy(p: list, q: list, x: int, depth: int) -> float:
    return min(1.0, p[x] / q[x] * 2 / -sum(z * math.log(z) for z in p if z))


RULES = {
    "annealed": (Annealed(delta=1.5, decay=0.7), annealed, 1e-12),
    "entropy": (EntropyAware(scale=2, width=6), entropy, 1e-4),
    "released entropy": (EntropyAware(scale=2, width=None), released_entropy, 1e-12),
}


@pytest.mark.parametrize("name", RULES)
def test_relaxed_rules_are_their_definitions(name: str) -> None:
    verifier, definition, close = RULES[name]
    moved = 0.0
    for seed, depth in itertools.product(range(3), range(1, DRAFTS + 1)):
        p, q = distributions(6, seed)
        token = torch.arange(6)[:, None].expand(-1, DRAFTS)
        wide = (token, p.expand(6, DRAFTS + 1, -1), q.expand(6, DRAFTS, -1))
        prob = judge(verifier, *wide).accept_prob[:, depth - 1]
        drawn = [x for x in range(6) if q[x] > 0]
        wanted = torch.tensor([definition(p.tolist(), q.tolist(), x, depth) for x in drawn], dtype=p.dtype)
        assert float((prob[drawn] - wanted).abs().max()) < close
        left = verifier.residual(p.expand(6, -1), q.expand(6, -1), torch.arange(6))
        committed = output(p, q, prob, left / left.sum(-1, keepdim=True))
        assert float(committed.sum()) == pytest.approx(1, abs=1e-12)
        moved = max(moved, distance(committed, p))
    assert moved > 0.01  # lossy


def test_the_residual_of_relaxed_acceptance_is_the_best_one() -> None:
    # of all residuals on a grid, none brings the committed token nearer to the target
    (p, q), verifier = distributions(3, 4), Annealed(delta=1.4, decay=1)
    prob = (1.4 * p / q).clamp(max=1).where(q > 0, torch.ones_like(p))
    left = verifier.residual(p[None], q[None], torch.tensor([0]))[0]
    best = distance(output(p, q, prob, (left / left.sum()).expand(3, -1)), p)
    for a, b in itertools.product(np.linspace(0, 1, 21), repeat=2):
        if a + b <= 1:
            other = torch.tensor([a, b, 1 - a - b]).double()
            assert distance(output(p, q, prob, other.expand(3, -1)), p) > best - 1e-12


@pytest.mark.parametrize("verifier", [Annealed(delta=1.0), RisingRuns(alpha=float("inf"))])
def test_smallest_settings_are_exact_verification(verifier: Verifier) -> None:
    case = chains(1, joint=True)
    got, exact = judge(verifier, *case), judge(Exact(), *case)
    assert torch.equal(got.accepted, exact.accepted)
    assert torch.allclose(got.accept_prob, exact.accept_prob, atol=1e-12)


# ---- runs: the whole distribution of four committed tokens


def runs_probs(case: tuple[Tensor, Tensor, Tensor], linked) -> Tensor:
    """Work out the output distribution in plain loops: all draft tokens, all decisions, AR after the drawn token."""
    tokens, p, q = case
    target = {tuple(t[:k].tolist()): p[n, k].tolist() for n, t in enumerate(tokens) for k in range(DRAFTS + 1)}
    out = torch.zeros((CODES,) * (DRAFTS + 1), dtype=p.dtype)

    def spread(prefix: tuple, mass: float) -> None:
        if len(prefix) == DRAFTS + 1:
            out[prefix] += mass
        else:
            for code, prob in enumerate(target[prefix]):
                spread((*prefix, code), mass * prob)

    for n, draft in enumerate(tokens.tolist()):
        ratio = [target[tuple(draft[:k])][draft[k]] / max(float(q[n, k, draft[k]]), 1e-300) for k in range(DRAFTS)]
        reached = math.prod(float(q[n, k, draft[k]]) for k in range(DRAFTS))
        begins = [k for k in range(DRAFTS) if k == 0 or not linked(draft, ratio, k)]
        for begin, end in zip(begins, [*begins[1:], DRAFTS], strict=True) if reached else ():
            passes = min(1.0, math.prod(ratio[begin:end]))
            left = [max(0.0, a - float(b)) for a, b in zip(target[tuple(draft[:begin])], q[n, begin], strict=True)]
            for code, weight in enumerate(left):
                if passes < 1:
                    spread((*draft[:begin], code), reached * (1 - passes) * weight / (sum(left) or 1))
            reached *= passes
        spread(tuple(draft), reached) if reached else None
    return out


def engine_probs(case: tuple[Tensor, Tensor, Tensor], verifier: JointRuns) -> Tensor:
    """The same from what the verifier decides, with the coin of each slot low or high."""
    tokens, p, q = case
    prob = judge(verifier, *case).accept_prob
    drawn = q.gather(-1, tokens[..., None])[..., 0].prod(1)
    lengths = torch.zeros(len(tokens), DRAFTS + 1, dtype=p.dtype)
    for coins in itertools.product((False, True), repeat=DRAFTS):  # whether each coin is below its probability
        low = torch.tensor(coins)
        coin = torch.where(low, prob / 2, (1 + prob) / 2).where(prob < 1, torch.full_like(prob, 0.5))
        length = judge(verifier, *case, coin=coin).accepted.cumprod(1).sum(1)
        share = torch.where(low, prob, 1 - prob).prod(1)
        lengths.scatter_add_(1, length[:, None], share[:, None])
    target = {tuple(t[:k].tolist()): p[n, k] for n, t in enumerate(tokens) for k in range(DRAFTS + 1)}
    out = torch.zeros((CODES,) * (DRAFTS + 1), dtype=p.dtype)
    for n, k in itertools.product(range(len(tokens)), range(DRAFTS + 1)):
        if not drawn[n] * lengths[n, k] > 1e-15:
            continue
        left = p[n, k]
        if k < DRAFTS:
            left = verifier.residual(p[n, k][None], q[n, k][None], tokens[n, k][None])[0]
        for rest in itertools.product(range(CODES), repeat=DRAFTS + 1 - k):
            image = (*tokens[n, :k].tolist(), *rest)
            mass = drawn[n] * lengths[n, k] * left[rest[0]] / left.sum()
            for place in range(k + 1, DRAFTS + 1):
                mass = mass * target[image[:place]][image[place]]
            out[image] += mass
    return out


PAIRS = np.array([[0, 1], [1, 1], [2, 0]])


def in_library(draft: list, ratio: list, k: int) -> bool:
    return [draft[k - 1], draft[k]] in PAIRS.tolist()


def rising(draft: list, ratio: list, k: int) -> bool:
    return ratio[k - 1] >= 0.3 and ratio[k] >= 0.3


def phrases(folder, **more) -> Phrases:
    np.save(folder / "p.npy", PAIRS)
    return Phrases(library=str(folder / "p.npy"), **more)


@pytest.mark.parametrize("kind", ["runs", "phrases"])
def test_runs_have_their_own_distribution(kind: str, tmp_path) -> None:
    moved, small = 0.0, SimpleNamespace(layout=TokenGrid(1, 4, CODES), device=torch.device("cpu"))
    for seed in range(2):
        case = chains(seed, joint=seed == 0)
        verifier = RisingRuns(alpha=0.3) if kind == "runs" else phrases(tmp_path).bind(small, 4)
        wanted = runs_probs(case, rising if kind == "runs" else in_library)
        assert float((wanted - engine_probs(case, verifier)).abs().max()) < 1e-12
        moved = max(moved, float((wanted - ar_probs(case[0], case[1])).abs().sum() / 2))
    assert moved > 0.003  # lossy


def test_forced_tokens_belong_to_no_run() -> None:
    tokens, p, q = chains(0, joint=False)
    certain = torch.tensor([[False, True, False]]).expand(len(tokens), -1)
    got = judge(RisingRuns(alpha=0), tokens, p, q, certain=certain)
    assert got.accept_prob[:, 1].eq(1).all()
    assert torch.allclose(got.accept_prob[:, [0, 2]], judge(Exact(), tokens, p, q).accept_prob[:, [0, 2]])


def test_the_library_is_the_most_frequent_pairs(tmp_path) -> None:
    tokens = np.array([[0, 1, 0, 1, 9, 2, 1], [0, 1, 2, 2, 9, 2, 1]])  # 9 is a row end
    assert mine(tokens, 3, 2).tolist() == [[0, 1], [2, 1]]
    assert phrases(tmp_path, count=2).pairs(3).tolist() == PAIRS[:2].tolist()


def test_a_library_is_written_where_the_command_names_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "tokens").mkdir()
    np.save(tmp_path / "tokens" / "a.npy", np.array([0, 1, 0, 1]))
    file = tmp_path / "library"  # no .npy
    monkeypatch.setattr("sys.argv", ["mine_phrases", str(tmp_path), str(file), "--vocabulary", "3"])
    mine_phrases.main()
    assert Phrases(library=str(file)).pairs(3).tolist() == [[0, 1], [1, 0]]


def test_pairs_are_found_without_a_table_of_all_codes() -> None:
    # 64,000 codes squared would take 4 GB
    wide = SimpleNamespace(layout=TokenGrid(1, 4, 64_000), device=torch.device("cpu"))
    token = torch.tensor([[63_999, 5, 63_999, 63_999], [0, 0, 5, 0]])
    for pairs, wanted in (([[63_999, 5], [0, 0]], [[0, 1, 0, 0], [0, 1, 0, 0]]), ([], [[0] * 4] * 2)):
        verifier = PhraseVerifier(np.array(pairs, dtype=np.int32).reshape(-1, 2), wide)
        assert verifier.linked(SimpleNamespace(token=token), token).int().tolist() == wanted


# ---- rising: another draft distribution, recorded


class FalseRecord(Rising):
    """Records p although the tokens were drawn with a preference."""

    def __call__(self, draft, test, state):
        return replace(super().__call__(draft, test, state), probs=test.p)


EXACT = {
    "fresh": sjd(4, Rising(strength=3.0)),
    "coupled": sjd(4, Rising(strength=3.0, coupled=True)),
    "block": sjd(4, Rising(strength=3.0, coupled=True), verifier=Block()),
}


@pytest.mark.full
@pytest.mark.parametrize("name", EXACT)
def test_rising_keeps_the_distribution(name: str) -> None:
    assert abs(z_score(EXACT[name], GUIDED)) < 5


@pytest.mark.full
def test_a_preference_that_is_not_recorded_is_caught() -> None:
    assert is_caught(sjd(4, FalseRecord(strength=3.0)), GUIDED)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Annealed(delta=0.9), "from 1"),
        (lambda: Annealed(decay=2), r"\[0, 1\]"),
        (lambda: EntropyAware(scale=0), "above 0"),
        (lambda: RisingRuns(alpha=-1), "alpha must be 0"),
        (lambda: Phrases(count=0), "count must be 1"),
        (lambda: Phrases().pairs(3), "needs a library"),
        (lambda: Rising(strength=-1), "strength must be 0"),
    ],
)
def test_wrong_settings_are_refused(make: object, part: str) -> None:
    with pytest.raises(UserError, match=part):
        make()


def test_a_library_of_another_model_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no pairs of codes below 2"):
        phrases(tmp_path).pairs(2)
