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
from sjd2.decoding.interfaces import Draft, Refiner, Verifier
from sjd2.decoding.refine import Coupled, Resample
from sjd2.decoding.sampling import accept_prob, residual
from sjd2.decoding.shapes import CHAIN
from sjd2.decoding.verify import EXACT, Verification, verify
from tests.helpers.replay import GivenNoise, draft_of, exact, recorded, state, target_of

SJD, SCD, GSD = recorded("sjd"), recorded("scd"), recorded("gsd")


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
