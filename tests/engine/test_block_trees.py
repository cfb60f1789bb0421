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
from sjd2.decoding.interfaces import Draft, Drafter, DraftRun, Judgement, Refiner
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

CODES, PLACES = 4, 4
IMAGES = torch.tensor(list(itertools.product(range(CODES), repeat=PLACES)))


def static(*parents: int) -> Tree:
    return Tree.static([0, *parents], chain=4, device=torch.device("cpu"))


# a main chain 1, 2, 3; siblings 4, 5 of 1 and 6 of 2; 7 continues 4
TREE, COPY = static(0, 1, 2, 0, 0, 1, 4), {7: 2}
# siblings at the first depth alone; 5, 6 continue 4
FORK, COPIES = static(0, 1, 2, 0, 4, 5), {5: 2, 6: 3}


@dataclass
class Drafts:
    """All drafts of a tree under a random causal model: tokens [n, S-1], p [n, S, V], q [n, S-1, V] as recorded, prob [n].

    tables: the model, [V^k, V] after k tokens.
    """

    tree: Tree
    tokens: Tensor
    p: Tensor
    q: Tensor
    prob: Tensor
    tables: list[Tensor]

    @property
    def paths(self) -> list[list[int]]:
        """Return the draft tokens, from 0, that lead to each slot."""
        return [(row[1:].nonzero()[:, 0]).tolist() for row in self.tree.seen[0]]

    def ar(self) -> Tensor:
        """Return the model's distribution of all images of four tokens: [V^4]."""
        prob = torch.ones(len(IMAGES), dtype=self.p.dtype)
        for place, table in enumerate(self.tables):
            prob = prob * table[history(IMAGES[:, :place])].gather(-1, IMAGES[:, place, None])[:, 0]
        return prob


def history(tokens: Tensor) -> Tensor:
    """Number what came before: [n, k] -> [n]."""
    return (tokens * CODES ** torch.arange(tokens.shape[1] - 1, -1, -1)).sum(1)


def drafts(seed: int, tree: Tree, copies: dict[int, int] | None = None) -> Drafts:
    """Enumerate. q depends on the left token, as a corrected one does. copies: slots that repeat another one, and its q."""
    generator = torch.Generator().manual_seed(seed)

    def tables(depth: int, lacks: int) -> Tensor:
        x = (torch.randn(CODES**depth, CODES, generator=generator).double() * 1.5).exp()
        x[depth::2, lacks] = 0  # some distributions lack a code
        return x / x.sum(-1, keepdim=True)

    target = [tables(depth, 0) for depth in range(PLACES)]
    draft = [tables(min(depth, 1), 1) for depth in range(PLACES)]
    slots, ancestors = tree.parents.shape[1], tree.seen[0, :, 1:]
    tokens = torch.tensor(list(itertools.product(range(CODES), repeat=slots - 1)))
    before = [history(tokens[:, path]) for path in ancestors]
    q, prob = [], torch.ones(len(tokens), dtype=torch.float64)
    for slot in range(1, slots):
        parent, earlier, depth = (int(field[0, slot]) for field in (tree.parents, tree.before, tree.depth))
        if copies and slot in copies:
            prob = prob * (tokens[:, slot - 1] == tokens[:, copies[slot] - 1])
            q.append(q[copies[slot] - 1])
            continue
        own = draft[depth - 1][before[parent] % CODES if depth > 1 else before[parent]]
        q.append(without(q[earlier - 1], tokens[:, earlier - 1]) if earlier else own)
        prob = prob * q[-1].gather(-1, tokens[:, slot - 1, None])[:, 0]
    p = torch.stack([target[int(path.sum())][before[slot]] for slot, path in enumerate(ancestors)], 1)
    drawn = prob > 0
    return Drafts(tree, tokens[drawn], p[drawn], torch.stack(q, 1)[drawn], prob[drawn], target)


def judged(verifier: Block, d: Drafts, end: int = 0) -> Verification:
    """Judge with coins for which the path ends at slot `end`, if it can."""
    never, p, tree = torch.zeros_like(d.tokens, dtype=torch.bool), d.tree.parent_probs(d.p), d.tree
    coin = (~tree.seen[0, end, 1:]).double().expand(len(d.tokens), -1)
    judgement = verifier.judge(
        DraftRun(p=p, q=d.q, token=d.tokens, depth=tree.depth[:, 1:], certain=never, inside=None, coin=coin, shape=tree)
    )
    assert judgement.tested is not None
    return Verification(
        verifier=verifier, sampler=CdfSampler(Noise(d.tokens[:, 0])), draft=Draft(pad(d.tokens, (1, 0)), d.q, shape=tree),
        target=d.p, p=p, tested=judgement.tested, accept_prob=judgement.accept_prob, coin=coin,
        accepted=judgement.accepted, weight=judgement.weight, fresh_coin=None, certain=never, positions=d.tokens,
    )  # fmt: skip


def ends(test: Verification, tree: Tree) -> Tensor:
    """Return the probability that the path ends at each slot, the first in order that passes: [n, S]."""
    assert tree.order is not None
    passes = pad(test.accept_prob, (1, 0), value=1.0)[:, tree.order.argsort()]
    missed = pad((1 - passes[:, :-1]).cumprod(1), (1, 0), value=1.0)
    return (passes * missed)[:, tree.order]


def ends_by_token(d: Drafts, passes: Tensor | None = None) -> Tensor:
    """Return the same of tests from parent to child, with these probabilities [n, S-1] or those of a test token by token."""
    if passes is None:
        passes = accept_prob(after_siblings(EXACT, d.tree.parent_probs(d.p), d.q, d.tokens, d.tree), d.q, d.tokens)
    passes = pad(passes, (1, 0), value=1.0)
    reach, stay = torch.ones_like(passes), torch.ones_like(passes)
    for slot in range(1, passes.shape[1]):
        parent = int(d.tree.parents[0, slot])
        reach[:, slot] = reach[:, parent] * stay[:, parent] * passes[:, slot]
        stay[:, parent] = stay[:, parent] * (1 - passes[:, slot])
    return reach * stay


def ends_of_tails(test: Verification, d: Drafts) -> Tensor:
    """Return the same where siblings are tested token by token and the runs without siblings jointly: [n, S]."""
    assert d.tree.tails is not None
    passes, once = pad(test.accept_prob, (1, 0), value=1.0), test.accept_prob.clone()
    for slots, real in zip(d.tree.tails.slots, d.tree.tails.real, strict=True):
        for place, slot in enumerate(tail := slots[real].tolist()):
            # that this one or a later one passes, given that it or the one before does
            some, above = (1 - (1 - passes[:, tail[first:]]).prod(1) for first in (place, max(place - 1, 0)))
            once[:, slot - 1] = some if place == 0 else torch.where(above > 0, some / above, 0.0)
    return ends_by_token(d, once)


def committed(verifier: Block, d: Drafts) -> Tensor:
    """Return the distribution of four committed tokens [V^4]: the path, the token drawn after it, and AR's after these."""
    out = torch.zeros(len(IMAGES), dtype=d.p.dtype)
    for slot, path in enumerate(d.paths):
        test = judged(verifier, d, slot)
        found = ends(test, d.tree) if verifier.apart else ends_of_tails(test, d)
        left, _ = test.next_probs(torch.full((len(d.tokens),), slot))
        mass = (found[:, slot] * d.prob)[:, None] * left / left.sum(1, keepdim=True).clamp(min=1e-300)
        joint = torch.zeros(CODES ** len(path), CODES, dtype=d.p.dtype)
        joint = joint.index_add_(0, history(d.tokens[:, path]), mass).flatten()
        for table in d.tables[len(path) + 1 :]:
            joint = (joint[:, None] * table).flatten()
        out += joint
    return out


TAILS = Block(siblings="by_token")


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
        d = drafts(seed, TREE)
        found, target = ends(judged(Block(), d), TREE), d.ar()
        assert float((found.sum(1) - 1).abs().max()) < 1e-12
        assert float((committed(Block(), d) - target).abs().max()) < 1e-12
        gains.append(float((d.prob[:, None] * (found - ends_by_token(d)) * TREE.depth).sum()))
        for name, wrong, of in zip(broken, (Block(), OnTarget()), (drafts(seed, TREE, COPY), d), strict=True):
            broken[name] = max(broken[name], float((committed(wrong, of) - target).abs().max()))
    assert min(broken.values()) > 0.001, broken
    assert min(gains) > 0.005, gains


@pytest.mark.parametrize(("tree", "copies"), [(TREE, COPY), (FORK, COPIES)], ids=["tree", "fork"])
def test_tails_with_copies_have_the_target_distribution(tree: Tree, copies: dict[int, int]) -> None:
    gains = []
    for seed in (1, 3):
        d = drafts(seed, tree, copies)
        found = ends_of_tails(judged(TAILS, d), d)
        assert float((found.sum(1) - 1).abs().max()) < 1e-12
        assert float((committed(TAILS, d) - d.ar()).abs().max()) < 1e-12
        gains.append(float((d.prob[:, None] * (found - ends_by_token(d)) * tree.depth).sum()))
    assert max(gains) > 0.005 or tree is TREE, gains  # whose runs are of one token each


class AllAsked(Block):
    """Takes every run as decided on, also those that the path did not reach."""

    @staticmethod
    def decided(accepted: Tensor, weight: Tensor, tree: Tree) -> Tensor:
        return weight


def misstated(verifier: Block, d: Drafts) -> tuple[float, float]:
    """Return how far the stated, and the recorded, distributions of what is carried over are from the true ones."""
    stated_by = recorded_by = 0.0
    assert d.tree.follow is not None
    for last, path in enumerate(d.paths):
        test = judged(verifier, d, last)
        found = ends(test, d.tree) if verifier.apart else ends_of_tails(test, d)
        stated, end = test.draft_probs(), found[:, last] * d.prob
        assert stated is not None
        for depth in range(len(path) + 2, PLACES):  # beyond the token that is drawn now
            slot = int(d.tree.follow[last, depth]) - 1
            above = (d.tree.depth[0, 1:] < depth).nonzero()[:, 0]
            given = history(d.tokens[:, above])
            true = torch.zeros(CODES ** len(above), CODES, dtype=d.p.dtype)
            true = true.index_put_((given, d.tokens[:, slot]), end, accumulate=True)[given]
            reached = true.sum(1) > 1e-9
            true = true[reached] / true[reached].sum(1, keepdim=True)
            far = [float((true - q[reached, slot]).abs().sum()) / max(len(true), 1) for q in (stated, d.q)]
            stated_by, recorded_by = max(stated_by, far[0]), max(recorded_by, far[1])
    return stated_by, recorded_by


@pytest.mark.parametrize("siblings", ["jointly", "by_token"])
def test_what_was_not_accepted_has_the_stated_distribution(siblings: str) -> None:
    d = drafts(0, TREE) if siblings == "jointly" else drafts(0, FORK, COPIES)
    stated, recorded = misstated(Block(siblings=siblings), d)
    assert stated < 1e-9
    assert recorded > 0.001
    assert misstated(AllAsked(siblings="by_token"), drafts(0, FORK, COPIES))[0] > 0.001


# ---- whole decoders


def block(
    window: int, chain: Drafter, weights: str | None = None, refiner: Refiner | None = None, corrected: int = 0,
    verifier: Block | None = None, **shape,
) -> Decoder:  # fmt: skip
    drafter = Front(chain=chain, weights=weights if corrected else None, corrected=corrected, **shape)
    return Decoder(
        name="block", window=window, lossless=True, drafter=drafter, verifier=verifier or Block(),
        refiner=refiner or Coupled(),
    )  # fmt: skip


BRANCHES = {"siblings": (2, 1), "sibling_temperature": 0.1, "copies": 3}
LOSSLESS = {
    "siblings": (lambda n: block(13, Jacobi(), **BRANCHES), GUIDED, LINE),
    "resampled": (lambda n: block(9, Jacobi(), refiner=Resample(), siblings=(2, 1), copies=2), CUT, LINE),
    "k-ary tree": (lambda n: block(13, Jacobi(), siblings=(2, 1), copies=2, full=True), GUIDED, LINE),
    "corrected": (lambda n: block(13, Jacobi(), n["front"], corrected=3, **BRANCHES), GUIDED, LINE),
    "corrected, forced": (lambda n: block(13, Jacobi(), n["front"], corrected=1, rest=True, **BRANCHES), CUT, FORCED),
    "noise": (lambda n: block(11, Denoise(), n["front"], corrected=2, siblings=(1, 1), copies=3), GUIDED, LINE),
    "tails": (lambda n: block(14, Jacobi(), verifier=TAILS, siblings=(2,), copies=4), GUIDED, LINE),
    "corrected tails": (
        lambda n: block(14, Jacobi(), n["front"], corrected=2, verifier=TAILS, siblings=(2,), copies=4),
        CUT,
        FORCED,
    ),
    "noise and tails": (
        lambda n: block(12, Denoise(), n["front"], corrected=2, verifier=TAILS, siblings=(1, 1), copies=3),
        GUIDED,
        LINE,
    ),
    "noise in branches": (lambda n: block(9, Denoise(steps=3), siblings=(1, 1), copies=2), GUIDED, LINE),
}


@pytest.mark.parametrize(
    "name", by_default(LOSSLESS, [], slow=LOSSLESS.keys() - {"corrected, forced", "corrected tails"})
)
def test_trees_under_block_verification_have_the_enumerated_distribution(name: str, nets: dict[str, str]) -> None:
    make, sampling, grid = LOSSLESS[name]
    assert abs(z_score(make(nets), sampling, grid)) < 5


@pytest.mark.parametrize("verifier", [Block(), TAILS])
def test_each_draft_token_has_a_coin_of_its_own(verifier: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[Tensor] = []

    def judge(verifier: Block, run: DraftRun) -> Judgement:
        passes.append(run.coin[0])
        return verifier.judge_tree(run, run.shape) if verifier.apart else verifier.judge_tails(run, run.shape)

    monkeypatch.setattr(Block, "judge", judge)
    decode(adapted_toy(GRID), block(13, Jacobi(), verifier=verifier, **BRANCHES), prompts=["one"])
    coins = torch.cat(passes)
    assert len(coins.unique()) == len(coins) == 12 * len(passes)


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


@pytest.mark.parametrize(("full", "verifier"), [(False, Block()), (True, Block()), (False, TAILS)])
def test_gumbel_matching_returns_exactly_the_tokens_of_ar(full: bool, verifier: Block, nets: dict[str, str]) -> None:
    model, sampling = adapted_toy(GRID), replace(SAMPLING, sampler="gumbel")
    shape = {"siblings": (1, 1), "copies": 2, "full": True} if full else {"siblings": (2, 1, 1), "copies": 4}
    decoder = block(24, Denoise(), nets["front"], corrected=3, verifier=verifier, **shape)
    assert torch.equal(decode(model, decoder, sampling).tokens, decode(model, AR, sampling).tokens)
