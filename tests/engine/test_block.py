"""Block verification: its decision enumerated in float64, then whole decoders against the enumerated distribution."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from baselines.eagle.eagle_drafter import Eagle
from baselines.pathspec import JacobiPaths
from baselines.reuse import Reuse
from sjd2.decoding.block import Block, joint_weights
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.interfaces import Draft, Drafter, DraftRun, Judgement
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.refine import Coupled, Keep, Resample
from sjd2.decoding.sampling import accept_prob, residual
from sjd2.decoding.verify import Exact, Verification
from sjd2.denoising.denoise import Denoise
from sjd2.errors import UserError
from sjd2.front.front_drafter import Front
from tests.helpers.chains import CODES, DRAFTS, ar_probs, chains, judge
from tests.helpers.decoders import AR, CUT, FORCED, GRID, GUIDED, LINE, PATHS, SAMPLING, decode, sjd
from tests.helpers.enumeration import is_caught, z_score
from tests.helpers.tiers import by_default
from tests.helpers.toy import Toy, adapted_toy


def lengths(judged: Judgement | Verification, joint: bool) -> Tensor:
    """Return the probability of each accepted length of each draft: [n, 4]."""
    h = torch.nn.functional.pad(judged.accept_prob, (1, 1), value=1.0)
    if joint:  # the last one that passes
        h[:, -1] = 0
        return h[:, :-1] * (1 - h[:, 1:]).flip(1).cumprod(1).flip(1)
    h[:, -1] = 0
    return h[:, :-1].cumprod(1) * (1 - h[:, 1:])


def committed_probs(tokens: Tensor, p: Tensor, q: Tensor, length: Tensor, weight: Tensor) -> Tensor:
    """Return the distribution of four committed tokens [3^4]: accepted ones, the next one, and AR's after these."""
    drawn = q.gather(-1, tokens[..., None])[..., 0].prod(1)
    out = torch.zeros((CODES,) * (DRAFTS + 1), dtype=p.dtype)
    target = {tuple(t[:k].tolist()): p[n, k] for n, t in enumerate(tokens) for k in range(DRAFTS + 1)}
    for n, t in enumerate(tokens):
        for k in length[n].nonzero()[:, 0].tolist() if drawn[n] else ():
            left = p[n, k]
            if k < DRAFTS:
                left = residual((weight[n, k] * p[n, k])[None], q[n, k][None], t[k][None])[0]
            for rest in itertools.product(range(CODES), repeat=DRAFTS + 1 - k):
                image = (*t[:k].tolist(), *rest)
                prob = drawn[n] * length[n, k] * left[rest[0]] / left.sum()
                for place in range(k + 1, DRAFTS + 1):
                    prob = prob * target[image[:place]][image[place]]
                out[image] += prob
    return out


@pytest.mark.parametrize("joint", [True, False], ids=["draft model", "jacobi"])
def test_the_decision_has_the_target_distribution_and_is_never_shorter(joint: bool) -> None:
    broken, gains = 0.0, []
    for seed in range(3):
        tokens, p, q = chains(seed, joint)
        judged, target = judge(Block(), tokens, p, q), ar_probs(tokens, p)
        length = lengths(judged, joint=True)
        assert float((length.sum(1) - 1).abs().max()) < 1e-12
        assert float((committed_probs(tokens, p, q, length, judged.weight) - target).abs().max()) < 1e-12
        # negative control: the residual of one token by itself, after a joint decision
        own = committed_probs(tokens, p, q, length, torch.ones_like(judged.weight))
        broken = max(broken, float((own - target).abs().max()))
        drawn = q.gather(-1, tokens[..., None])[..., 0].prod(1)
        by_token = lengths(judge(Exact(), tokens, p, q), joint=False)
        gains.append(float((drawn[:, None] * (length - by_token) * torch.arange(DRAFTS + 1)).sum()))
    assert broken > 0.001
    assert min(gains) > -1e-12
    assert max(gains) > 0.005


@pytest.mark.parametrize("joint", [True, False], ids=["draft model", "jacobi"])
def test_what_was_not_accepted_has_the_stated_distribution_and_couples_to_p(joint: bool) -> None:
    broken = 0.0
    for seed in range(3):
        tokens, p, q = chains(seed, joint)
        test = verification(tokens, p, q)
        length, drawn = lengths(test, joint=True), q.gather(-1, tokens[..., None])[..., 0].prod(1)
        for k in range(DRAFTS):
            # of X_k given X_1 .. X_{k-1} and that k - 1 or fewer were accepted
            mass = drawn * length[:, : k + 1].sum(1)
            prefix = (tokens[:, :k] * CODES ** torch.arange(k)).sum(1)
            found = torch.zeros(CODES**k, CODES, dtype=p.dtype)
            found = found.index_put_((prefix, tokens[:, k]), mass, accumulate=True)[prefix]
            reached = found.sum(1) > 0
            found, target = (found / found.sum(1, keepdim=True))[reached], p[reached, k]
            stated = test.draft_probs()[reached, k]
            assert float((found - stated).abs().max()) < 1e-12
            assert float((coupled(found, stated, target) - target).abs().max()) < 1e-12
            # negative control: coupled from the recorded distribution
            broken = max(broken, float((coupled(found, q[reached, k], target) - target).abs().max()))
    assert broken > 0.05


def verification(tokens: Tensor, p: Tensor, q: Tensor) -> Verification:
    judged, never = judge(Block(), tokens, p, q), torch.zeros_like(tokens, dtype=torch.bool)
    draft = Draft(torch.nn.functional.pad(tokens, (1, 0)), q)
    return Verification(
        verifier=Block(), sampler=None, draft=draft, target=p, p=p[:, :-1], tested=p[:, :-1], coin=p[:, :-1, 0],
        accept_prob=judged.accept_prob, accepted=judged.accepted, weight=judged.weight, fresh_coin=None, certain=never,
        positions=tokens,
    )  # fmt: skip


def coupled(true: Tensor, q: Tensor, p: Tensor) -> Tensor:
    """Return the distribution of a draft token of `true` that is coupled to p as if it were one of q: [n, V]."""
    every = torch.arange(CODES).expand(len(p), -1)
    wide = (p[:, None].expand(-1, CODES, -1), q[:, None].expand(-1, CODES, -1), every)
    stays, left = accept_prob(*wide), residual(*wide)
    moves = (true * (1 - stays))[..., None] * left / left.sum(-1, keepdim=True)
    return true * stays + moves.sum(1)


def test_weights_are_the_recursion_of_the_paper() -> None:
    ratio = torch.rand(50, 20, generator=torch.Generator().manual_seed(0)).double() * 3
    ratio[::7, 5], ratio[:, 9] = 0, 1
    weight, expected = torch.ones(50, dtype=ratio.dtype), []
    for column in ratio.T:
        weight = (weight * column).clamp(max=1)
        expected.append(weight)
    got = joint_weights(ratio.log())
    assert torch.allclose(got, torch.stack(expected, 1), atol=1e-12)
    assert torch.equal(got == 1, torch.stack(expected, 1) == 1)  # exactly: a certain token may not fail by rounding


def test_certain_tokens_are_never_where_a_run_ends() -> None:
    tokens, p, q = chains(0, joint=False)
    certain = torch.tensor([[True, False, True]]).expand(len(tokens), -1)
    judged = judge(Block(), tokens, p, q, certain=certain)
    length = lengths(judged, joint=True)
    assert float(length[:, 0].max()) == 0
    assert float(length[:, 2].max()) == 0
    # one that may not be committed ends the run before it
    inside = torch.tensor([[True, True, False]]).expand(len(tokens), -1)
    judged, shorter = judge(Block(), tokens, p, q, inside=inside), judge(Block(), tokens[:, :2], p[:, :3], q[:, :2])
    assert torch.equal(judged.accept_prob[:, :2], shorter.accept_prob)
    assert not judged.weight[:, 2].any()  # so its recorded distribution stays true


def test_deterministic_drafts_and_greedy_targets() -> None:
    tokens, p, q = chains(0, joint=False)
    one_hot = torch.nn.functional.one_hot(tokens, CODES).to(p)
    got, same = judge(Block(), tokens, p, None), judge(Block(), tokens, p, one_hot)
    assert torch.allclose(got.accept_prob, same.accept_prob, atol=1e-12)
    greedy = torch.nn.functional.one_hot(p.argmax(-1), CODES).to(p)
    accepted = judge(Block(), tokens, greedy, q).accepted
    assert torch.equal(accepted, (tokens == greedy[:, :-1].argmax(-1)).cumprod(1).bool())  # as token by token


# ---- whole decoders


def block(window: int, drafter: Drafter, refiner: object = None, verifier: Exact | None = None) -> Decoder:
    return Decoder(
        name="block", window=window, lossless=True, drafter=drafter, verifier=verifier or Block(), refiner=refiner
    )


LOSSLESS = {
    "sjd": (lambda n: block(4, Jacobi(), Resample()), GUIDED, LINE),
    "scd": (lambda n: block(5, Jacobi(), Coupled()), GUIDED, LINE),
    "scd forced": (lambda n: block(4, Jacobi(init="left"), Coupled()), CUT, FORCED),
    "one-hot": (lambda n: block(4, Jacobi(), Resample(record=False)), GUIDED, LINE),
    "sjd++": (lambda n: block(4, Jacobi(), Reuse(threshold=0.3)), GUIDED, LINE),
    "sjd2 age": (lambda n: block(5, Denoise(steps=1), Coupled()), CUT, LINE),
    "sjd2 slot": (lambda n: block(5, Denoise(steps=3, levels="slot", clean=2, early=0.5), Coupled()), GUIDED, LINE),
    "sjd-fc": (
        lambda n: block(5, Front(chain=Jacobi(), weights=n["front"], corrected=1, rest=True), Coupled()),
        GUIDED,
        LINE,
    ),
    "sjd2-fc": (lambda n: block(5, Front(chain=Denoise(), weights=n["front"], corrected=2), Coupled()), GUIDED, LINE),
    "eagle": (lambda n: block(4, Eagle(weights=n["eagle"], shape="chain")), GUIDED, LINE),
}


class OnChains(Block):
    """Refuses trees."""

    joint_trees = False


FULL = ("scd", "sjd2 slot")


@pytest.mark.parametrize("name", by_default(LOSSLESS, [], slow=LOSSLESS.keys() - FULL))
def test_block_verification_has_the_enumerated_distribution(name: str, nets: dict[str, str]) -> None:
    make, sampling, grid = LOSSLESS[name]
    assert abs(z_score(make(nets), sampling, grid)) < 5


class JointRatio(Block):
    """Each prefix passes with its joint weight: longer runs, and another distribution."""

    def judge(self, run: DraftRun) -> Judgement:
        judged, survival = super().judge(run), joint_weights(self.log_ratio(run))
        return replace(judged, accepted=(run.coin < survival).flip(1).cumsum(1).flip(1) > 0)


def test_a_joint_ratio_alone_is_caught() -> None:
    assert is_caught(block(5, Jacobi(), Coupled(), JointRatio()), GUIDED)


@pytest.mark.parametrize("name", ["scd", "sjd2 slot", "eagle"])
def test_block_verification_under_gumbel_returns_exactly_the_tokens_of_ar(name: str, nets: dict[str, str]) -> None:
    # there it is token by token, and so it is at temperature 0
    model, decoder = adapted_toy(GRID), LOSSLESS[name][0](nets)
    sampling = replace(SAMPLING, sampler="gumbel")
    assert torch.equal(decode(model, decoder, sampling).tokens, decode(model, AR, sampling).tokens)
    greedy = replace(SAMPLING, temperature=0.0)
    by_token = decode(model, replace(decoder, verifier=Exact()), greedy)
    got = decode(model, decoder, greedy)
    assert torch.equal(got.tokens, by_token.tokens)
    assert [s.accepted for s in got.samples] == [s.accepted for s in by_token.samples]


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: block(20, Front(chain=Jacobi(), siblings=(1,)), Coupled(), OnChains()), "judges a chain"),
        (lambda: block(7, JacobiPaths(), Coupled()), "judges a chain"),
        (lambda: block(7, Eagle(shape="static", tree=PATHS)), "judges a chain"),
        (lambda: block(5, Jacobi(), Coupled(coupling="gumbel")), "coupling=maximal"),
        (lambda: replace(block(5, Denoise(), Coupled()), rule="paper", lossless=False), "rule=paper"),
        (lambda: replace(sjd(5, Keep(), lossless=False), verifier=Block()), "later draft tokens"),
    ],
)
def test_what_block_verification_cannot_judge_is_refused(make: object, part: str) -> None:
    with pytest.raises(UserError, match=part):
        make()


class Hidden(Front):
    """A tree that does not report itself."""

    is_tree = False


def test_a_tree_that_does_not_report_itself_is_refused() -> None:
    with pytest.raises(UserError, match="returned a tree"):
        decode(Toy(GRID), block(12, Hidden(chain=Jacobi(), siblings=(1,)), Coupled(), OnChains()))
