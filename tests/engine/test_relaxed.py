"""LANTERN, GSD and SJD++ against their definitions, written once more in plain loops; what they promise and what not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import baselines.lantern
from baselines.gsd import Grouped
from baselines.lantern import Relaxed, neighbour_table
from baselines.reuse import Reuse
from sjd2.decoding.interfaces import Draft
from sjd2.decoding.noise import Noise
from sjd2.decoding.sampling import CdfSampler, SamplingParams, draw
from sjd2.decoding.verify import Exact, residual
from sjd2.errors import UserError
from sjd2.models.layout import TokenGrid
from tests.helpers.chains import distance, distributions, output
from tests.helpers.decoders import CUT, GUIDED, decode, sjd
from tests.helpers.enumeration import is_caught, z_score
from tests.helpers.toy import Toy, chi_square_z


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sjd2" / "neighbours"


def model(vocabulary: int, seed: int = 0, width: int = 3, codebook: Tensor | None = None) -> SimpleNamespace:
    table = (
        torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(seed)) if codebook is None else codebook
    )
    return SimpleNamespace(codebook=table, device=torch.device("cpu"), embed=lambda tokens: table[tokens])


def rule(verifier: object, p: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return acceptance probabilities [V] and residuals [V, V] of all draft tokens, from one batched call of odd shape."""
    v = len(p)
    token = torch.arange(v)[None, :, None]
    wide = p.expand(1, v, 1, v)
    other = None if q is None else q.expand(1, v, 1, v)
    left = verifier.residual(wide, other, token)[0, :, 0]
    return verifier.accept_prob(wide, other, token)[0, :, 0], left / left.sum(-1, keepdim=True)


def lantern(
    p: list, q: list, x: int, table: Tensor, k: int, delta: float = 0.0, lam: float = 1.0
) -> tuple[float, list]:
    """LANTERN's definition for one draft: move mass of the nearest codes onto x, then speculative sampling."""
    budget = delta + (lam - 1) * p[x]
    moved, lent = list(p), 0.0
    for z in sorted(range(len(p)), key=lambda z: float((table[z] - table[x]).norm()))[1:k]:
        if lent + p[z] > budget:
            break
        lent, moved[z] = lent + p[z], 0.0
    moved[x] = p[x] + lent
    left = [max(0.0, a - b) for a, b in zip(moved, q, strict=True)]
    return (min(1.0, moved[x] / q[x]) if q[x] else float(moved[x] > 0)), left


def grouped(p: list, q: list, x: int, table: Tensor, group: int, near: float, far: float) -> tuple[float, list]:
    """GSD's definition for one draft: x, G // 2 codes below it by rank of p and the others above it."""
    order = sorted(range(len(p)), key=lambda z: p[z])
    place = order.index(x)
    members = order[max(0, place - group // 2) : place + (group - 1) // 2 + 1]
    close = [z for z in members if abs(p[z] - p[x]) < near and float((table[z] - table[x]).square().sum()) < far]
    mass, other = sum(p[z] for z in close), sum(q[z] for z in close)
    return (min(1.0, mass / other) if other else float(mass > 0)), [max(0.0, a - b) for a, b in zip(p, q, strict=True)]


RULES = {
    "lantern": (Relaxed(neighbours=12, delta=0.2, lam=None), partial(lantern, k=12, delta=0.2)),
    "lantern++": (Relaxed(neighbours=12, lam=3.0), partial(lantern, k=12, lam=3.0)),
    "lantern, few": (Relaxed(neighbours=4, delta=0.3, lam=None), partial(lantern, k=4, delta=0.3)),
    "gsd": (Grouped(group=5, distance=6.0), partial(grouped, group=5, near=0.15, far=6.0)),
}


def misfit(verifier: object, definition: object, seed: int) -> float:
    """Return how far a verifier is from its definition: acceptance, residuals, distribution of the committed token."""
    vocabulary, worst = 12, 0.0
    here = model(vocabulary, seed)
    verifier = verifier.bind(here, 2)
    p, q = distributions(vocabulary, seed)
    for draft in (q, None):
        accept_prob, left = rule(verifier, p, draft)
        wanted = torch.zeros(vocabulary, dtype=p.dtype)
        for x in range(vocabulary):
            other = q if draft is not None else torch.eye(vocabulary, dtype=p.dtype)[x]
            own, after = definition(p.tolist(), other.tolist(), x, here.codebook)
            after = torch.tensor(after, dtype=p.dtype)
            worst = max(worst, abs(own - float(accept_prob[x])))
            wanted[x] += q[x] * own
            if own < 1 - 1e-12:  # else rounding alone keeps it from a sure acceptance, and no residual is left
                worst = max(worst, float((after / after.sum() - left[x]).abs().max()))
                wanted += q[x] * (1 - own) * after / after.sum()
        assert float(wanted.sum()) == pytest.approx(1, abs=1e-12)
        worst = max(worst, distance(wanted, output(p, q, accept_prob, left)))
    return worst


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(8))
def test_rules_are_their_definitions(name: str, seed: int) -> None:
    assert misfit(*RULES[name], seed) < 1e-12


class IgnoresNeighbours(Relaxed):
    """A rejection that leaves the mass of A(x) where it was."""

    def bind(self, model, window):
        bound = super().bind(model, window)
        bound.residual = residual
        return bound


@pytest.mark.parametrize("name", ["lantern", "lantern++"])
def test_a_residual_that_ignores_the_neighbours_is_caught(name: str) -> None:
    verifier, definition = RULES[name]
    broken = IgnoresNeighbours(neighbours=12, delta=verifier.delta, lam=verifier.lam)
    assert max(misfit(broken, definition, seed) for seed in range(8)) > 0.01


@pytest.mark.parametrize("vocabulary", [6, 9, 12])
def test_exact_verification_gives_the_target(vocabulary: int) -> None:
    for seed in range(4):
        p, q = distributions(vocabulary, seed)
        assert distance(output(p, q, *rule(Exact(), p, q)), p) < 1e-12


EXACT = {
    "neighbours": Relaxed(neighbours=1),
    "neighbours, delta": Relaxed(neighbours=1, delta=0.4, lam=None),
    "delta": Relaxed(neighbours=9, delta=0, lam=None),
    "lam": Relaxed(neighbours=9, lam=1),
    "group": Grouped(group=1),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("onehot", [False, True], ids=["sampled", "onehot"])
def test_smallest_settings_are_exact_verification(name: str, onehot: bool) -> None:
    for seed in range(6):
        verifier = EXACT[name].bind(model(9, seed), 2)
        p, q = (probs.float() for probs in distributions(9, seed))
        draft = None if onehot else q
        assert all(map(torch.equal, rule(verifier, p, draft), rule(Exact(), p, draft)))


@pytest.mark.parametrize("lam", [1.5, 5.0])
def test_lantern_plus_plus_bounds_each_accepted_mass(lam: float) -> None:
    for seed in range(10):
        verifier = Relaxed(neighbours=12, lam=lam).bind(model(12, seed), 2)
        p, q = distributions(12, seed)
        accept_prob, left = rule(verifier, p, q)
        assert (q * accept_prob <= lam * p + 1e-12).all()
        assert float(output(p, q, accept_prob, left).sum()) == pytest.approx(1, abs=1e-12)


def test_delta_does_not_bound_the_error() -> None:
    # codes in pairs; the drafts are uniform on one of each pair, the target on the other: delta = 1/4, error 1
    codebook = torch.tensor([[0.0], [0.1], [5.0], [5.1], [11.0], [11.1], [18.0], [18.1]])
    verifier = Relaxed(neighbours=2, delta=0.25, lam=None).bind(model(8, codebook=codebook), 2)
    q = torch.tensor([0.25, 0.0] * 4).double()
    p = 0.25 - q
    accept_prob, left = rule(verifier, p, q)
    assert accept_prob[q > 0].eq(1).all()
    assert distance(output(p, q, accept_prob, left), p) == pytest.approx(1)
    # lam never accepts a code of probability 0
    verifier = Relaxed(neighbours=2, lam=100.0).bind(model(8, codebook=codebook), 2)
    assert distance(output(p, q, *rule(verifier, p, q)), p) < 1e-12


def test_groups_do_not_bound_the_error() -> None:
    # eight equally likely codes, a draft that is always the same one of them and has the seven others in its group
    p, q = torch.zeros(9).double(), torch.zeros(9).double()
    p[1:], q[8] = 1 / 8, 1
    verifier = Grouped().bind(model(9, codebook=torch.zeros(9, 2)), 2)
    accept_prob, left = rule(verifier, p, q)
    assert float(accept_prob[8]) == pytest.approx(1)
    assert distance(output(p, q, accept_prob, left), p) == pytest.approx(7 / 8)


def test_members_too_far_or_too_unlikely_leave_the_group() -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    q = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    here = model(4, codebook=torch.tensor([[0.0], [1.0], [2.0], [9.0]]))

    def accept_prob(**settings) -> float:
        verifier = Grouped(group=8, **settings).bind(here, 2)
        return float(rule(verifier, p, q)[0][2])

    assert accept_prob(probability=2.0, distance=None) == pytest.approx(1.0)
    assert accept_prob(probability=0.15, distance=None) == pytest.approx(0.6 / 0.9)  # code 0 is 0.2 away
    assert accept_prob(probability=0.15, distance=4.0) == pytest.approx(0.5 / 0.5)  # code 3 is 49 away
    assert accept_prob(probability=0.15, distance=1.0) == pytest.approx(0.2 / 0.3)  # the limit itself is outside


@pytest.mark.parametrize("normalise", [False, True])
def test_neighbours_are_sorted_by_distance(tmp_path, monkeypatch, normalise: bool) -> None:
    monkeypatch.setattr(baselines.lantern, "BLOCK", 4)
    codebook = torch.randn(11, 3, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 12)[:, None]
    codebook[7] = codebook[2]  # equal codes: each is the other's neighbour, never its own
    table = neighbour_table(codebook, 6, normalise, tmp_path / "t.npy")
    codes = torch.nn.functional.normalize(codebook, dim=-1) if normalise else codebook
    for code in range(11):
        far = (codes - codes[code]).norm(dim=-1)
        assert len({code, *table[code].tolist()}) == 6
        assert far[table[code].long()].tolist() == pytest.approx(far.sort().values[1:6].tolist())
    assert np.load(tmp_path / "t.npy").dtype == np.uint16


def test_neighbours_are_read_where_they_were_kept(own_cache, monkeypatch) -> None:
    first = Relaxed(neighbours=4).bind(model(9), 2)
    (file,) = own_cache.iterdir()
    monkeypatch.setattr(baselines.lantern, "_nearest", lambda *_: pytest.fail("computed although it was kept"))
    second = Relaxed(neighbours=4).bind(model(9), 2)
    assert torch.equal(first.table, second.table)
    assert list(own_cache.iterdir()) == [file]


@pytest.mark.parametrize("content", ["", "cut", "garbage", "zip", "shape", "range"])
def test_a_broken_file_is_made_anew(own_cache, caplog, content: str) -> None:
    first = Relaxed(neighbours=4).bind(model(9), 2)
    (file,) = own_cache.iterdir()
    whole = file.read_bytes()
    if content == "shape":
        np.save(file, np.zeros((9, 2), np.uint16))
    elif content == "range":
        np.save(file, np.full((9, 3), 9, np.uint16))
    else:
        file.write_bytes({"": b"", "cut": whole[:-5], "garbage": b"\x00" * 500, "zip": b"PK\x03\x04" + whole}[content])
    second = Relaxed(neighbours=4).bind(model(9), 2)
    assert "made anew" in caplog.text
    assert torch.equal(first.table, second.table)
    assert file.read_bytes() == whole
    assert list(own_cache.iterdir()) == [file]


def test_other_codebooks_and_settings_have_other_files(own_cache) -> None:
    for settings, here in (
        ({"neighbours": 4}, model(9)),
        ({"neighbours": 5}, model(9)),
        ({"neighbours": 4, "normalise": True}, model(9)),
        ({"neighbours": 4}, model(9, seed=1)),
        ({"neighbours": 4, "delta": 0.1, "lam": None}, model(9)),  # the budget does not change the table
    ):
        Relaxed(**settings).bind(here, 2)
    assert len(list(own_cache.iterdir())) == 4


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    verifier = Relaxed(neighbours=4, cache=str(tmp_path / "file" / "below")).bind(model(9), 2)
    assert "is not kept" in caplog.text
    assert verifier.table.shape == (9, 3)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Relaxed(delta=0.1), "exactly one"),
        (lambda: Relaxed(lam=None), "exactly one"),
        (lambda: Relaxed(delta=2.0, lam=None), "set lam instead"),
        (lambda: Relaxed(lam=0.5), "from 1"),
        (lambda: Relaxed(neighbours=0), "neighbours must be 1"),
        (lambda: Relaxed(neighbours=10).bind(model(9), 2), "at most"),
        (lambda: Relaxed(neighbours=10).check(SimpleNamespace(layout=TokenGrid(1, 1, 9)), 4), "at most"),
        (lambda: Grouped(group=0), "group must be 1"),
        (lambda: Grouped(probability=0), "above 0"),
        (lambda: Grouped(distance=0.0), "null switches it off"),
        (lambda: Reuse(threshold=1.5), r"\[0, 1\]"),
    ],
)
def test_wrong_settings_are_refused(make: object, part: str) -> None:
    with pytest.raises(UserError, match=part):
        make()


def reused(p: Tensor, q: Tensor, threshold: float, rows: int = 40_000) -> tuple[Tensor, Tensor]:
    """Draw draft tokens from q and reuse them under p: counts of the new ones [V], recorded distribution [V]."""
    drawn = draw(q.expand(rows, -1), torch.rand(rows, generator=torch.Generator().manual_seed(7)).double())
    draft = Draft(torch.stack([torch.zeros_like(drawn), drawn], 1), q.expand(rows, 1, -1))
    place, noise = torch.ones(rows, 1, dtype=torch.long), Noise(torch.arange(rows), torch.float64)
    test = SimpleNamespace(p=p.expand(rows, 1, -1), positions=place, draft_probs=lambda: draft.probs)
    state = SimpleNamespace(iteration=place[:, 0], sampler=CdfSampler(noise))
    new = Reuse(threshold=threshold)(draft, test, state)
    assert torch.equal(new.probs, new.probs[:1].expand_as(new.probs))
    return torch.bincount(new.tokens[:, 1], minlength=len(p)), new.probs[0, 0]


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.25, 1.0])
def test_reuse_records_the_distribution_of_its_tokens(threshold: float) -> None:
    p, q = distributions(6, seed=4, sharpness=1.0)
    counts, record = reused(p, q, threshold)
    wanted = [0.0] * 6  # enumerated: each old token stays or moves
    for x in range(6):
        for y in range(6):
            wanted[y] += float(q[x]) * (float(x == y) if p[x] > threshold else float(p[y]))
    assert record.tolist() == pytest.approx(wanted, abs=1e-12)
    assert abs(chi_square_z(counts, record)) < 5
    if threshold == 1:
        assert torch.allclose(record, p, atol=1e-12)


def test_a_stale_record_is_caught() -> None:
    p, q = distributions(6, seed=4, sharpness=1.0)
    counts, _ = reused(p, q, 0.1)
    assert min(abs(chi_square_z(counts, probs + 1e-9)) for probs in (p, q)) > 5


def test_reuse_needs_records() -> None:
    with pytest.raises(UserError, match="needs the distributions"):
        Reuse()(Draft(torch.zeros(2, 2, dtype=torch.long)), SimpleNamespace(), SimpleNamespace())


@pytest.mark.parametrize(
    ("decoder", "sampling"),
    [
        (sjd(4, Reuse(threshold=0.3)), GUIDED),
        pytest.param(sjd(8, Reuse(threshold=0.1)), SamplingParams(), marks=pytest.mark.full),
        pytest.param(sjd(5, Reuse(), "left"), CUT, marks=pytest.mark.full),
    ],
    ids=["guided", "wide", "cut"],
)
def test_reuse_keeps_the_distribution(decoder, sampling) -> None:
    assert decoder.lossless
    assert abs(z_score(decoder, sampling)) < 5


class StaleReuse(Reuse):
    """A kept draft token keeps the distribution it had: the rule as the paper's abstract states it."""

    def __call__(self, draft, test, state):
        new = super().__call__(draft, test, state)
        kept = test.p.gather(-1, draft.codes(test.p.shape[-1])[..., None]) > self.threshold
        return replace(new, probs=torch.where(kept, draft.probs, test.p))


@pytest.mark.parametrize(
    "decoder",
    [
        sjd(5, StaleReuse(threshold=0.3)),
        sjd(5, verifier=Relaxed(neighbours=2, lam=5.0), lossless=False),
        sjd(5, verifier=Grouped(group=3, distance=None, probability=0.9), lossless=False),
    ],
    ids=["stale reuse", "lantern++", "gsd"],
)
def test_lossy_decoders_are_caught(decoder) -> None:
    assert is_caught(decoder, GUIDED)


@pytest.mark.parametrize("name", EXACT)
def test_smallest_settings_decode_as_sjd(name: str) -> None:
    toy = Toy(TokenGrid(2, 5, 9, row_end=20), dtype=torch.float64)
    prompts, seeds = ["a b", "b", "c a d"] * 4, list(range(12))
    decoders = sjd(4), sjd(4, verifier=EXACT[name], lossless=False)
    wanted, got = (decode(toy, decoder, GUIDED, prompts, seeds) for decoder in decoders)
    assert torch.equal(got.tokens, wanted.tokens)
    assert [s.accepted for s in got.samples] == [s.accepted for s in wanted.samples]
