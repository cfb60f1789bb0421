"""Our rules beside those of the methods' public code, on the same logits and the same random numbers (docs/public-code.md).

Where public code decides otherwise, a test states how, and enumerates what it does to the output distribution.
# V image vocabulary
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.gsd import Grouped
from baselines.lantern import Relaxed
from sjd2.decoding.interfaces import Draft, Refiner, Verifier
from sjd2.decoding.refine import Coupled, Resample
from sjd2.decoding.sampling import accept_prob, residual, without
from sjd2.decoding.shapes import CHAIN, Tree
from sjd2.decoding.verify import EXACT, Verification, verify
from tests.helpers.replay import GivenNoise, draft_of, exact, recorded, state, target_of

SJD, SCD, GSD, PAC, LANTERN = (recorded(name) for name in ("sjd", "scd", "gsd", "sjd_pac", "lantern"))


def normalised(mass: Tensor) -> Tensor:
    return mass / mass.sum(-1, keepdim=True)


def distance(p: Tensor, q: Tensor) -> float:
    """Total variation."""
    return float((p - q).abs().sum() / 2)


def random_probs(count: int, vocabulary: int, seed: int) -> Tensor:
    logits = torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed)).double()
    return (1.5 * logits).softmax(-1)


def decided(case: dict[str, Any], verifier: Verifier, refiner: Refiner) -> tuple[Verification, int, Draft]:
    """Decide a recorded chain; return the test, how many draft tokens are accepted, and the refined draft."""
    given = GivenNoise(
        None if "table" not in case else -torch.log(-torch.log(exact(case["table"]))),
        accept=case["coins"],
        fresh=case["fresh"],
        couple=case["recover"],
        residual=case["recover"],
        sample=case["fresh"],
    )
    here, draft = state(given, len(case["tokens"])), draft_of(case)
    test = verify(verifier, draft, target_of(case), here)
    accepted = int(CHAIN.accepted_path(test.accepted, None).length)
    check_next_token(case["outcome"], test, accepted, here, bonus_is_drawn_alike="table" not in case)
    return test, accepted, refiner(draft, test, here)


def check_next_token(outcome: dict[str, Any], test: Verification, accepted: int, here, bonus_is_drawn_alike) -> None:
    """Compare the token after the accepted ones, and the distribution it is drawn from."""
    probs, bonus = test.next_probs(torch.tensor([accepted]))
    position = torch.tensor([[accepted + 1]])
    token = here.sampler.draw_next(probs[:, None], bonus[:, None], position, here.iteration)
    if not bonus:
        torch.testing.assert_close(
            normalised(probs[0]), exact(outcome["residuals"][str(accepted + 1)]), atol=2e-7, rtol=0
        )
    if not bonus or bonus_is_drawn_alike:
        assert int(token) == outcome["tokens"][accepted]


def check_prefix(case: dict[str, Any], test: Verification, accepted: int) -> None:
    outcome = case["outcome"]
    assert accepted + 1 == outcome["matched"]
    assert case["tokens"][1 : accepted + 1] == outcome["tokens"][:accepted]
    if "target" in outcome:
        torch.testing.assert_close(test.target[0], exact(outcome["target"]), atol=2e-7, rtol=0)


# ---- SJD


@pytest.mark.parametrize("case", SJD["cases"])
def test_sjd_decides_as_its_code(case: dict[str, Any]) -> None:
    test, accepted, refined = decided(case, EXACT, Resample())
    check_prefix(case, test, accepted)
    tokens, record = case["outcome"]["tokens"], case["outcome"]["record"]
    assert refined.tokens[0, accepted + 2 :].tolist() == tokens[accepted + 1 : -1]
    assert set(record[accepted + 1 :]) <= {"target"}
    assert torch.equal(refined.probs, test.p)


def test_sjd_code_records_a_uniform_first_token_as_certain() -> None:
    """Theirs is exact as well, but accepts a first token with sum(p) / V; recorded as 1 / V it passes with sum min(p, 1/V)."""
    assert SJD["init"]["recorded_probability_of_its_token"] == [1.0] * 3
    assert SJD["init"]["entries_recorded"] == 1
    p = random_probs(1, 12, 0)[0]
    every = torch.arange(12)
    uniform = torch.full_like(p, 1 / 12)
    one_hot = accept_prob(p.expand(12, -1), None, every)
    left = normalised(residual(p.expand(12, -1), None, every))
    assert distance((one_hot / 12) + ((1 - one_hot)[:, None] * left).mean(0), p) < 1e-12
    assert float(one_hot.mean()) == pytest.approx(1 / 12)
    assert float(accept_prob(p.expand(12, -1), uniform.expand(12, -1), every).mean()) > 0.4


def test_sjd_code_warps_the_residual_twice() -> None:
    """Harmless for masks and top-k, not for a temperature: the residual is sharpened once more, and the output is biased."""
    case = SJD["warped_residual"]
    p, q = ((exact(case[name]) / case["temperature"]).softmax(-1) for name in ("target_logits", "draft_logits"))
    ours = normalised(residual(p, q, torch.tensor(0)))
    theirs = normalised(ours ** (1 / case["temperature"]))
    torch.testing.assert_close(theirs, exact(case["residual"]), atol=2e-7, rtol=0)
    rejected = (q - p).clamp(min=0).sum()
    assert distance(torch.minimum(p, q) + rejected * ours, p) < 1e-12
    assert distance(torch.minimum(p, q) + rejected * theirs, p) > 0.04


def test_sjd_code_lets_the_shortest_row_decide_for_all() -> None:
    """A token accepted and not committed is tested again beside the distribution it was accepted from: biased for B > 1."""
    case = SJD["batch"]
    assert case["matched_by_row_and_used_for_all"] == 1 + min(case["accepted_by_row"])
    assert case["row_0_slot_2_token_kept"]
    assert case["row_0_slot_2_record"] == "draft"
    accepted = torch.tensor([[True, True], [False, True]])
    assert CHAIN.accepted_path(accepted, None).length.tolist() == case["accepted_by_row"]  # ours: each row its own
    q, p = exact([1.0, 0.0]), exact([0.5, 0.5])
    assert distance(after_two_tests(q, p, p, stale=True), exact([0.25, 0.75])) < 1e-12
    assert distance(after_two_tests(q, p, p, stale=False), p) < 1e-12


# ---- SCD


def after_two_tests(q: Tensor, p1: Tensor, p2: Tensor, *, stale: bool) -> Tensor:
    """Return the distribution of a token of q coupled to p1 and then verified against p2.

    stale: where the coupling accepted it, q stays beside it; else p1 is recorded either way.
    """
    every = torch.arange(len(q))

    def verified(record: Tensor, token: Tensor) -> Tensor:
        """Return what a draft token [V] of `record` becomes: [V, V]."""
        prob = accept_prob(p2.expand(len(q), -1), record.expand(len(q), -1), token)[:, None]
        return prob * torch.eye(len(q)).double() + (1 - prob) * normalised(residual(p2, record, every[0]))

    kept = torch.minimum(q, p1)
    moved = (1 - kept.sum()) * normalised(residual(p1, q, every[0]))
    return kept @ verified(q if stale else p1, every) + moved @ verified(p1, every)


@pytest.mark.parametrize("case", SCD["maximal"])
def test_scd_maximal_decides_as_its_code_and_records_the_new_distribution(case: dict[str, Any]) -> None:
    test, accepted, refined = decided(case, EXACT, Coupled())
    check_prefix(case, test, accepted)
    assert refined.tokens[0, 1:].tolist() == case["outcome"]["tokens"][:-1]  # all slots, beyond the first rejection too
    assert torch.equal(refined.probs, test.p)
    stale = ["draft" if ok else "target" for ok in test.accepted[0].tolist()]
    assert case["outcome"]["record"] == [*stale, "target"]  # theirs: the old one beside tokens that were accepted


def test_scd_codes_record_is_not_exact() -> None:
    """Two passes of one slot, enumerated: with the old distribution beside accepted tokens the output is not the target."""
    worst = 0.0
    for seed in range(4):
        q, p1, p2 = random_probs(3, 6, seed)
        assert distance(after_two_tests(q, p1, p2, stale=False), p2) < 1e-12
        worst = max(worst, distance(after_two_tests(q, p1, p2, stale=True), p2))
    assert worst > 0.1


@pytest.mark.parametrize("case", SCD["gumbel"])
def test_scd_gumbel_decides_as_its_code(case: dict[str, Any]) -> None:
    test, accepted, refined = decided(case, EXACT, Coupled(coupling="gumbel"))
    check_prefix(case, test, accepted)
    assert refined.tokens[0, accepted + 2 :].tolist() == case["outcome"]["tokens"][accepted + 1 : -1]
    assert set(case["outcome"]["record"][accepted + 1 :]) <= {"target"}
    assert torch.equal(refined.probs, test.p)


def test_scd_code_draws_neighbouring_tokens_with_one_noise_row_in_its_single_steps() -> None:
    """Passes of one token leave the table where it is, so the next position takes the same noise: dependent, not exact."""
    moves = {(step["window"], step["matched"]): step["first_row_after"] for step in SCD["noise_table"]}
    assert moves == {(32, 3): 3, (32, 1): 1, (1, 1): 0}
    # two codes, one noise: both positions take code 0 with min(p, q), where independent draws do with p q
    p, q = 0.5, 0.5
    pair = exact([[min(p, q), max(0, p - q)], [max(0, q - p), 1 - max(p, q)]])
    assert distance(pair, exact([[p * q, p * (1 - q)], [(1 - p) * q, (1 - p) * (1 - q)]])) == pytest.approx(0.5)


# ---- GSD


def grouped() -> Verifier:
    table = exact(GSD["embeds"])
    return Grouped().bind(
        SimpleNamespace(embed=lambda tokens: table[tokens]), 6
    )  # the released settings are the defaults


@pytest.mark.parametrize("case", GSD["cases"])
def test_gsd_decides_as_its_code(case: dict[str, Any]) -> None:
    assert min(case["ranks"]) >= 7  # all groups are complete on the side of less likely codes
    test, accepted, refined = decided(case, grouped(), Resample())
    check_prefix(case, test, accepted)
    assert refined.tokens[0, accepted + 2 :].tolist() == case["outcome"]["tokens"][accepted + 1 : -1]


def test_gsd_code_tests_the_seven_least_likely_codes_without_a_group() -> None:
    """Their slice begins below 0 there, is empty, and the exact rule is taken instead; our groups end where the ranks end."""
    case = GSD["accept_probs"]
    p, q = exact(case["target_logits"]).softmax(-1), exact(case["draft_logits"]).softmax(-1)
    rank, token, theirs = (exact([row[key] for row in case["found"]]) for key in ("rank", "token", "accept_prob"))
    token = token.long()
    pairs = p.expand(len(token), -1), q.expand(len(token), -1), token
    ours, exactly = grouped().accept_prob(*pairs), accept_prob(*pairs)
    low = rank < 7
    torch.testing.assert_close(ours[~low], theirs[~low], atol=2e-7, rtol=0)
    torch.testing.assert_close(exactly[low], theirs[low], atol=2e-7, rtol=0)
    assert float((ours - theirs)[low].abs().max()) > 0.05


# ---- SJD-PAC


def tree_of(case: dict[str, Any], chain: int = 1) -> Draft:
    """Return recorded draft tokens of a tree, each sibling beside the draft distribution without the earlier ones."""
    tokens, parents = case["tokens"], case["parents"]
    tree = Tree.static(parents, chain=chain, device=torch.device("cpu"))
    if "draft_logits" not in case:  # chosen by score: one-hot
        return Draft(torch.tensor([tokens]), shape=tree)
    by_depth = exact(case["draft_logits"]).softmax(-1)
    probs = by_depth[tree.depth[0, 1:] - 1]
    for slot in range(1, len(tokens)):
        for earlier in tree.earlier[0, slot].nonzero()[:, 0].tolist():
            probs[slot - 1] = without(probs[slot - 1], torch.tensor(tokens[earlier]))
    return Draft(torch.tensor([tokens]), probs[None], shape=tree)


def pac_decided(case: dict[str, Any]) -> tuple[Verification, Any, Tensor, Draft]:
    """Return the test, the accepted path, the distribution of the token after it, and the coupled draft."""
    draft, target = tree_of(case, PAC["chain"]), exact([case["target_logits"]]).softmax(-1)
    moves = {ahead["slot"]: ahead["draws"][0] for ahead in case["outcome"].get("ahead", [])}
    couple = [moves.get(position, 0.5) for position in range(1, PAC["chain"])]
    here = state(GivenNoise(accept=case["coins"], couple=couple), len(case["tokens"]))
    test = verify(EXACT, draft, target, here)
    path = draft.shape.accepted_path(test.accepted, None)
    return test, path, normalised(test.next_probs(path.end)[0][0]), Coupled()(draft, test, here)


@pytest.mark.parametrize("case", PAC["cases"][:-1])
def test_sjd_pac_decides_as_its_code(case: dict[str, Any]) -> None:
    """The same path through the tree, the same residual after all siblings, the same coupled tokens beyond the tree."""
    outcome = case["outcome"]
    test, path, probs, refined = pac_decided(case)
    length = int(path.length)
    assert path.slots[0, 1 : length + 1].tolist() == outcome["nodes"]
    assert length + 1 == outcome["matched"]
    torch.testing.assert_close(probs, exact(outcome["next_mass"]), atol=2e-7, rtol=0)
    for ahead in outcome.get("ahead", []):
        slot = ahead["slot"]
        assert ahead["record"] == "target"
        if slot > 2 or test.accepted[0, slot - 1]:  # elsewhere theirs is not the coupling, see below
            assert int(refined.tokens[0, slot]) == ahead["tokens"][0]


def test_sjd_pac_code_draws_a_uniform_token_after_a_fully_accepted_chain() -> None:
    """The last output of the pass is dropped there, and a filler is committed instead: not exact."""
    case = PAC["cases"][-1]
    _, path, probs, _ = pac_decided(case)
    assert int(path.length) == PAC["chain"] - 1 == len(case["outcome"]["nodes"])
    theirs, p = exact(case["outcome"]["next_mass"]), exact(case["target_logits"]).softmax(-1)[PAC["chain"] - 1]
    torch.testing.assert_close(theirs, torch.full_like(p, 1 / len(p)), atol=2e-7, rtol=0)
    assert distance(probs, p) < 1e-12
    assert distance(theirs, p) > 0.2


def after_siblings_drawn(q: Tensor, p1: Tensor, p2: Tensor, *, from_residual: bool) -> Tensor:
    """Return the output at a slot with one sibling: a token of q coupled to p1, a sibling drawn, both tested against p2."""
    out, left, none = torch.zeros_like(q), normalised((p1 - q).clamp(min=0)), torch.tensor(0)
    kept, moved = torch.minimum(q, p1), (p1 - q).clamp(min=0)
    after_main = normalised(residual(p2, p1, none))
    for main in torch.arange(len(q)):
        record = without(p1, main)
        siblings = kept[main] * (left if from_residual else record)
        siblings = siblings + moved[main] * (without(left, main) if from_residual else record)
        passes = float(accept_prob(p2, p1, main))
        out[main] += (kept + moved)[main] * passes
        for sibling in torch.arange(len(q)):
            weight = siblings[sibling] * (1 - passes)
            again = float(accept_prob(after_main, record, sibling))
            out[sibling] += weight * again
            out += weight * (1 - again) * normalised(residual(after_main, record, none))
    return out


def test_sjd_pac_codes_siblings_are_no_draws_from_their_record() -> None:
    """They come from the residual of the coupling and are verified as draws from the target without the main token."""
    for case in PAC["cases"]:
        test, *_ = pac_decided(case)
        for ahead in case["outcome"].get("ahead", []):
            if ahead["slot"] > 2:
                left = normalised(residual(test.p, test.draft.probs, test.draft.tokens[:, 1:]))[0, ahead["slot"] - 1]
                torch.testing.assert_close(left, exact(ahead["mass"]), atol=2e-7, rtol=0)
    worst = 0.0
    for seed in range(4):
        q, p1, p2 = random_probs(3, 6, seed)
        assert distance(after_siblings_drawn(q, p1, p2, from_residual=False), p2) < 1e-12
        worst = max(worst, distance(after_siblings_drawn(q, p1, p2, from_residual=True), p2))
    assert worst > 0.02


def test_sjd_pac_code_moves_tokens_inside_the_tree_to_the_last_siblings_residual() -> None:
    """Only the main token was tested there, so it is no draw from the new distribution, which is recorded beside it."""
    seen = 0
    for case in PAC["cases"]:
        test, *_ = pac_decided(case)
        for ahead in case["outcome"].get("ahead", []):
            if ahead["slot"] == 2 and not test.accepted[0, 1]:
                last = int(test.draft.shape.last[0, 1])
                left = normalised(residual(test.tested, test.draft.probs, test.draft.tokens[:, 1:]))[0, last - 1]
                torch.testing.assert_close(left, exact(ahead["mass"]), atol=2e-7, rtol=0)
                seen += 1
    assert seen > 0
    worst = 0.0
    for seed in range(4):
        q, p = random_probs(2, 6, seed)
        left, none = normalised((p - q).clamp(min=0)), torch.tensor(0)
        token = torch.minimum(q, p)
        for main, mass in enumerate((q - p).clamp(min=0)):
            token = token + mass * normalised(residual(left, without(q, torch.tensor(main)), none))
        worst = max(worst, distance(token, p))
    assert worst > 0.02


# ---- EAGLE and LANTERN


@pytest.mark.parametrize("case", LANTERN["dynamic"] + LANTERN["static"])
def test_eagle_trees_are_accepted_as_by_their_code(case: dict[str, Any]) -> None:
    draft = tree_of(case)
    here = state(GivenNoise(accept=case["coins"]), len(case["tokens"]))
    test = verify(EXACT, draft, exact([case["target_logits"]]).softmax(-1), here)
    path = draft.shape.accepted_path(test.accepted, None)
    assert path.slots[0, 1 : int(path.length) + 1].tolist() == case["outcome"]["nodes"]
    probs = normalised(test.next_probs(path.end)[0][0])
    torch.testing.assert_close(probs, exact(case["outcome"]["next_mass"]), atol=2e-7, rtol=0)


@pytest.mark.parametrize("delta", [0.3, 3.0])
def test_lantern_accepts_as_its_code_and_leaves_another_residual(delta: float, tmp_path) -> None:
    """Both accept x with (p(x) + S(x)) / q(x). After a rejection p loses A(x) here, whose mass x had borrowed.

    Theirs: all neighbours, whether they lent or not; on LlamaGen's static trees q loses them instead, so that p keeps all.
    """
    p, q = exact(LANTERN["target_logits"]).softmax(-1), exact(LANTERN["draft_logits"]).softmax(-1)
    codes, drafts = exact(LANTERN["codes"]), [row for row in LANTERN["drafts"] if row["delta"] == delta]
    budget = {"delta": delta, "lam": None} if delta <= 1 else {"delta": None, "lam": delta}
    settings = Relaxed(neighbours=drafts[0]["neighbours"] + 1, cache=str(tmp_path), **budget)
    ours = settings.bind(SimpleNamespace(codebook=codes, device=torch.device("cpu")), 2)
    other, outputs = 0.0, {name: torch.zeros_like(p) for name in ("ours", "lumina1", "llamagen1")}
    for row in drafts:
        token = torch.tensor(row["token"])
        assert float(ours.accept_prob(p, q, token)) == pytest.approx(row["static_accept_prob"], abs=2e-7)
        assert float(ours.accept_prob(p, None, token)) == pytest.approx(row["dynamic_accept_prob"], abs=2e-7)
        near = ours.table[token].long()
        lent = p[near].cumsum(0)[0] <= (delta if delta <= 1 else (delta - 1) * p[token])
        further = (codes - codes[token]).norm(dim=1).argsort()[1 : len(near) + 2]  # one code more than may lend
        nearby = torch.zeros_like(p).index_fill(0, further, 1.0) * float(lent)
        nearby_or_x = nearby.index_fill(0, token[None], 1.0)
        expected = {
            "dynamic": p * (1 - nearby_or_x),
            "lumina1": (p * (1 - nearby) - q).clamp(min=0),
            "llamagen1": (p - q * (1 - nearby)).clamp(min=0),
        }
        for kind, left in expected.items():
            if f"{kind}_residual" in row:
                theirs = exact(row[f"{kind}_residual"])
                torch.testing.assert_close(theirs, normalised(left), atol=2e-7, rtol=0)
                mine = normalised(ours.residual(p, None if kind == "dynamic" else q, token))
                other = max(other, distance(mine, theirs))
        accepted = row["static_accept_prob"]
        for name, output in outputs.items():  # of one draft token of q
            output[token] += q[token] * accepted
            if accepted < 1:
                left = ours.residual(p, q, token) if name == "ours" else exact(row[f"{name}_residual"])
                output += q[token] * (1 - accepted) * normalised(left)
    assert other > 0.1
    assert all(distance(output, p) > 0.02 for output in outputs.values())  # all three are lossy
