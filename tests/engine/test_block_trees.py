"""Block verification on trees: its decision enumerated in float64, then decoders against the enumerated distribution."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from sjd2.decoding.block import Block
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.interfaces import Draft, Drafter, DraftRun, Refiner
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.noise import Noise
from sjd2.decoding.refine import Coupled, Resample
from sjd2.decoding.sampling import CdfSampler, accept_prob, without
from sjd2.decoding.shapes import Tree
from sjd2.decoding.verify import EXACT, Verification, after_siblings
from sjd2.denoising.denoise import Denoise
from sjd2.front.front_drafter import Front
from tests.helpers.decoders import AR, CUT, FORCED, GRID, GUIDED, LINE, SAMPLING, decode
from tests.helpers.enumeration import is_caught, z_score
from tests.helpers.tiers import by_default
from tests.helpers.toy import adapted_toy

# a main chain 1, 2, 3; siblings 4, 5 of 1 and 6 of 2; 7 continues 4
TREE = Tree.static([0, 0, 1, 2, 0, 0, 1, 4], chain=4, device=torch.device("cpu"))
COPIES = {7: 2}
CODES = 4
SLOTS, PLACES = TREE.parents.shape[1], TREE.deepest + 1
PATHS = [[s for s in range(1, SLOTS) if TREE.seen[0, slot, s]] for slot in range(SLOTS)]
IMAGES = torch.tensor(list(itertools.product(range(CODES), repeat=PLACES)))


@dataclass
class Drafts:
    """All drafts of the tree under a random causal model: tokens [n, 7], p [n, 8, V], q [n, 7, V] as recorded, prob [n].

    tables: the model, [V^k, V] after k tokens.
    """

    tokens: Tensor
    p: Tensor
    q: Tensor
    prob: Tensor
    tables: list[Tensor]

    def ar(self) -> Tensor:
        """Return the model's distribution of all images of four tokens: [V^4]."""
        prob = torch.ones(len(IMAGES), dtype=self.p.dtype)
        for place, table in enumerate(self.tables):
            prob = prob * table[history(IMAGES[:, :place])].gather(-1, IMAGES[:, place, None])[:, 0]
        return prob


def history(tokens: Tensor) -> Tensor:
    """Number what came before: [n, k] -> [n]."""
    return (tokens * CODES ** torch.arange(tokens.shape[1] - 1, -1, -1)).sum(1)


def drafts(seed: int, copies: dict[int, int] | None = None) -> Drafts:
    """Enumerate. q depends on the left token, as a corrected one does. copies: slots that repeat the token of another slot."""
    generator = torch.Generator().manual_seed(seed)

    def tables(depth: int, lacks: int) -> Tensor:
        x = (torch.randn(CODES**depth, CODES, generator=generator).double() * 1.5).exp()
        x[depth::2, lacks] = 0  # some distributions lack a code
        return x / x.sum(-1, keepdim=True)

    target = [tables(depth, 0) for depth in range(PLACES)]
    draft = [tables(min(depth, 1), 1) for depth in range(PLACES)]
    tokens = torch.tensor(list(itertools.product(range(CODES), repeat=SLOTS - 1)))
    before = [history(tokens[:, [s - 1 for s in path]]) for path in PATHS]
    q, prob = [], torch.ones(len(tokens), dtype=torch.float64)
    for slot in range(1, SLOTS):
        parent, earlier, depth = (int(field[0, slot]) for field in (TREE.parents, TREE.before, TREE.depth))
        own = draft[depth - 1][before[parent] % CODES if depth > 1 else before[parent]]
        q.append(without(q[earlier - 1], tokens[:, earlier - 1]) if earlier else own)
        if copies and slot in copies:
            prob = prob * (tokens[:, slot - 1] == tokens[:, copies[slot] - 1])
        else:
            prob = prob * q[-1].gather(-1, tokens[:, slot - 1, None])[:, 0]
    p = torch.stack([target[len(path)][before[slot]] for slot, path in enumerate(PATHS)], 1)
    drawn = prob > 0
    return Drafts(tokens[drawn], p[drawn], torch.stack(q, 1)[drawn], prob[drawn], target)


def judged(verifier: Block, d: Drafts) -> Verification:
    never, p = torch.zeros_like(d.tokens, dtype=torch.bool), TREE.parent_probs(d.p)
    coin = torch.full_like(p[..., 0], 0.5)
    judgement = verifier.judge(
        DraftRun(p=p, q=d.q, token=d.tokens, depth=TREE.depth[:, 1:], certain=never, inside=None, coin=coin, shape=TREE)
    )
    assert judgement.tested is not None
    return Verification(
        verifier=verifier, sampler=CdfSampler(Noise(d.tokens[:, 0])),
        draft=Draft(pad(d.tokens, (1, 0)), d.q, shape=TREE), target=d.p, p=p,
        tested=judgement.tested, accept_prob=judgement.accept_prob, coin=coin, accepted=judgement.accepted,
        weight=judgement.weight, fresh_coin=None, certain=never, positions=d.tokens,
    )  # fmt: skip


def ends(test: Verification) -> Tensor:
    """Return the probability that the path ends at each slot, the first in order that passes: [n, 8]."""
    assert TREE.order is not None
    passes = pad(test.accept_prob, (1, 0), value=1.0)[:, TREE.order.argsort()]
    missed = pad((1 - passes[:, :-1]).cumprod(1), (1, 0), value=1.0)
    return (passes * missed)[:, TREE.order]


def ends_by_token(d: Drafts) -> Tensor:
    """Return the same of tests from parent to child, on what earlier siblings have left: [n, 8]."""
    tested = after_siblings(EXACT, TREE.parent_probs(d.p), Draft(pad(d.tokens, (1, 0)), d.q, shape=TREE))
    passes = pad(accept_prob(tested, d.q, d.tokens), (1, 0), value=1.0)
    reach, stay = torch.ones_like(passes), torch.ones_like(passes)
    for slot in range(1, SLOTS):
        parent = int(TREE.parents[0, slot])
        reach[:, slot] = reach[:, parent] * stay[:, parent] * passes[:, slot]
        stay[:, parent] = stay[:, parent] * (1 - passes[:, slot])
    return reach * stay


def committed(test: Verification, d: Drafts) -> Tensor:
    """Return the distribution of four committed tokens [V^4]: the path, the token drawn after it, and AR's after these."""
    out, end = torch.zeros(len(IMAGES), dtype=d.p.dtype), ends(test) * d.prob[:, None]
    for slot, path in enumerate(PATHS):
        left, _ = test.next_probs(torch.full((len(d.tokens),), slot))
        mass = end[:, slot, None] * left / left.sum(1, keepdim=True).clamp(min=1e-300)  # 0 where nothing ends
        prefix = history(d.tokens[:, [s - 1 for s in path]])
        joint = torch.zeros(CODES ** len(path), CODES, dtype=d.p.dtype).index_add_(0, prefix, mass).flatten()
        for table in d.tables[len(path) + 1 :]:
            joint = (joint[:, None] * table).flatten()
        out += joint
    return out


class OnTarget(Block):
    """Siblings weighed on the target's distribution instead of what their parent has left of it."""

    def tree_weights(self, run: DraftRun, tree: Tree) -> tuple[Tensor, Tensor, Tensor]:
        weight, tested, survival = super().tree_weights(run, tree)
        later = tree.rank[0, 1:] > 0
        survival[:, later] = self.log_ratio(run).exp().clamp(max=1)[:, later]
        return weight, tested, survival


def test_the_decision_has_the_target_distribution_and_accepts_more() -> None:
    gains, broken = [], {"copies": 0.0, "siblings weighed on the target": 0.0}
    for seed in (1, 3):
        d = drafts(seed)
        test, target = judged(Block(), d), d.ar()
        assert float((ends(test).sum(1) - 1).abs().max()) < 1e-12
        assert float((committed(test, d) - target).abs().max()) < 1e-12
        gains.append(float((d.prob[:, None] * (ends(test) - ends_by_token(d)) * TREE.depth).sum()))
        for name, wrong, of in zip(broken, (Block(), OnTarget()), (drafts(seed, COPIES), d), strict=True):
            broken[name] = max(broken[name], float((committed(judged(wrong, of), of) - target).abs().max()))
    assert min(broken.values()) > 0.001, broken
    assert min(gains) > 0.005, gains


def test_what_was_not_accepted_has_the_stated_distribution() -> None:
    d, broken = drafts(0), 0.0
    test = judged(Block(), d)
    stated, end = test.draft_probs(), ends(test) * d.prob[:, None]
    assert stated is not None
    assert TREE.follow is not None
    for last, path in enumerate(PATHS):
        for depth in range(len(path) + 2, PLACES):  # what is carried over, beyond the token that is drawn now
            slot = int(TREE.follow[last, depth])
            above = [s - 1 for s in range(1, SLOTS) if TREE.depth[0, s] < depth]
            given = history(d.tokens[:, above])
            found = torch.zeros(CODES ** len(above), CODES, dtype=d.p.dtype)
            found = found.index_put_((given, d.tokens[:, slot - 1]), end[:, last], accumulate=True)[given]
            reached = found.sum(1) > 1e-9
            if not reached.any():
                continue
            found = found[reached] / found[reached].sum(1, keepdim=True)
            assert float((found - stated[reached, slot - 1]).abs().max()) < 1e-9, (last, slot)
            broken = max(broken, float((found - d.q[reached, slot - 1]).abs().max()))
    assert broken > 0.05  # the recorded ones are others


# ---- whole decoders


def block(
    window: int, chain: Drafter, weights: str | None = None, refiner: Refiner | None = None, corrected: int = 0, **shape
) -> Decoder:
    drafter = Front(chain=chain, weights=weights if corrected else None, corrected=corrected, **shape)
    return Decoder(
        name="block", window=window, lossless=True, drafter=drafter, verifier=Block(), refiner=refiner or Coupled()
    )


BRANCHES = {"siblings": (2, 1), "copies": 3}
LOSSLESS = {
    "siblings": (lambda n: block(13, Jacobi(), **BRANCHES), GUIDED, LINE),
    "resampled": (lambda n: block(9, Jacobi(), refiner=Resample(), siblings=(2, 1), copies=2), CUT, LINE),
    "k-ary tree": (lambda n: block(13, Jacobi(), siblings=(2, 1), copies=2, full=True), GUIDED, LINE),
    "corrected": (lambda n: block(13, Jacobi(), n["front"], corrected=3, **BRANCHES), GUIDED, LINE),
    "corrected, forced": (lambda n: block(13, Jacobi(), n["front"], corrected=3, **BRANCHES), CUT, FORCED),
    "noise": (lambda n: block(11, Denoise(), n["front"], corrected=2, siblings=(1, 1), copies=3), GUIDED, LINE),
    "noise in branches": (lambda n: block(9, Denoise(steps=3), siblings=(1, 1), copies=2), GUIDED, LINE),
}


@pytest.mark.parametrize("name", by_default(LOSSLESS, [], slow=LOSSLESS.keys() - {"corrected, forced"}))
def test_trees_under_block_verification_have_the_enumerated_distribution(name: str, nets: dict[str, str]) -> None:
    make, sampling, grid = LOSSLESS[name]
    assert abs(z_score(make(nets), sampling, grid)) < 5


@dataclass(frozen=True, kw_only=True)
class Copying(Front):
    """Branches repeat the main chain's tokens, which the decision has used."""

    def separated(self) -> Front:
        return self


@pytest.mark.slow
def test_copies_of_the_main_chain_are_caught() -> None:
    decoder = replace(
        block(13, Jacobi(), siblings=(2, 1), copies=3), drafter=Copying(chain=Jacobi(), siblings=(2, 1), copies=3)
    )
    assert is_caught(decoder, GUIDED)


@pytest.mark.parametrize("full", [False, True])
def test_gumbel_matching_returns_exactly_the_tokens_of_ar(full: bool, nets: dict[str, str]) -> None:
    model, sampling = adapted_toy(GRID), replace(SAMPLING, sampler="gumbel")
    shape = {"siblings": (1, 1), "copies": 2, "full": True} if full else {"siblings": (2, 1, 1), "copies": 4}
    decoder = block(24, Denoise(), nets["front"], corrected=3, **shape)
    assert torch.equal(decode(model, decoder, sampling).tokens, decode(model, AR, sampling).tokens)
