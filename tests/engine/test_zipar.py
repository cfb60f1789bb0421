"""ZipAR against a slow reference that follows its description sample by sample, and against AR where it is AR."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from baselines.zipar import ZipAR
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.generate import generate, stream
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError
from sjd2.models.layout import TokenGrid
from tests.helpers.tiers import by_default
from tests.helpers.toy import Toy, chi_square_z, enumerate_probs

SAMPLES = 12_000
PROMPT = "a b"
PROMPTS = ["one", "two words", "three short words", "four", "five is more"]
AR = Decoder(name="ar", window=1, lossless=True)
SAMPLING = SamplingParams(guidance_scale=2.0, top_k=7)
PLAIN = TokenGrid(4, 6, 12)
FORCED = TokenGrid(4, 6, 12, prefix=(20, 21), row_end=22, suffix=(23,))  # N = 31, 24 free


def zipar(window_size: int, adaptive: bool = True) -> ZipAR:
    return ZipAR(name="zipar", lossless=False, window_size=window_size, adaptive=adaptive)


def decode(
    model: Toy, decoder: ZipAR | Decoder, sampling: SamplingParams = SAMPLING, prompts: list[str] = PROMPTS, seeds=None
):
    return generate(model, decoder, model.encode(prompts), seeds or list(range(1, len(prompts) + 1)), sampling=sampling)


@pytest.fixture(scope="module", params=[PLAIN, FORCED], ids=["plain", "forced"])
def model(request: pytest.FixtureRequest) -> Toy:
    return Toy(request.param, dtype=torch.float64)


# ---- equalities


@pytest.mark.parametrize("sampler", ["cdf", "gumbel"])
def test_a_window_of_a_whole_row_is_ar(model: Toy, sampler: str) -> None:
    sampling = replace(SAMPLING, sampler=sampler)
    expected = decode(model, AR, sampling).tokens
    # under gumbel a first token that is tested against the complete row is AR's too, under cdf it is so in distribution
    for decoder in (zipar(6), zipar(6, False), zipar(99), *([zipar(5)] if sampler == "gumbel" else [])):
        got = decode(model, decoder, sampling)
        assert torch.equal(got.tokens, expected)
        # forced tokens cost no pass of their own
        assert all(sample.forwards == model.layout.free.sum() for sample in got.samples)


@pytest.mark.parametrize("sampler", ["cdf", "gumbel"])
@pytest.mark.parametrize("decoder", [zipar(1), zipar(3), zipar(2, False)])
def test_tokens_do_not_depend_on_the_batch_or_on_refilling(model: Toy, decoder: ZipAR, sampler: str) -> None:
    sampling = replace(SAMPLING, sampler=sampler)
    together = decode(model, decoder, sampling).samples
    alone = [decode(model, decoder, sampling, [prompt], [row + 1]).samples[0] for row, prompt in enumerate(PROMPTS)]
    requests = [(prompt, seed + 1) for seed, prompt in enumerate(PROMPTS)]
    for rows in (1, 3):
        refilled = dict(stream(model, decoder, requests, rows=rows, sampling=sampling))
        for row, sample in enumerate(together):
            for other in (alone[row], refilled[row]):
                assert (other.tokens == sample.tokens).all()
                assert other.accepted == sample.accepted


@pytest.mark.parametrize("window_size", [1, 4])
def test_passes_of_the_fixed_window(model: Toy, window_size: int) -> None:
    grid = model.layout
    for sample in decode(model, zipar(window_size, adaptive=False)).samples:
        assert sample.forwards == len(sample.accepted) == grid.columns + (grid.rows - 1) * window_size


def test_invariants(model: Toy) -> None:
    grid, forced = model.layout, model.layout.forced().numpy()
    for decoder in (zipar(1), zipar(2), zipar(1, False), zipar(4, False)):
        for sample in decode(model, decoder).samples:
            assert sum(sample.accepted) == grid.length
            assert len(sample.accepted) == sample.forwards
            assert min(sample.accepted) >= 1
            assert sample.accepted[0] == len(grid.prefix) + 1
            assert grid.columns + (grid.rows - 1) * decoder.window_size <= sample.forwards <= grid.free.sum()
            assert (sample.tokens[forced >= 0] == forced[forced >= 0]).all()
            assert (sample.tokens[forced < 0] < grid.vocabulary).all()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(UserError, match="window_size must be 1 or more"):
        zipar(0)
    with pytest.raises(UserError, match="lossless=false"):
        ZipAR(name="zipar", lossless=True, window_size=4)


# ---- the distribution


Fed = tuple[tuple[int, int, tuple[int, ...]], ...]  # (position, token, entries of this tuple that it saw)
Slot = tuple[int, int, bool, int]  # position, token, whether the token is the position's own, row that draws or -1


@dataclass(frozen=True)
class Page:
    """One state of a sample after some passes, with its probability."""

    weight: float
    rows: tuple[tuple[int, ...], ...]  # codes of each grid row
    fed: Fed
    kept: tuple[tuple[int, int], ...]  # position -> its latest entry in `fed`, real tokens only
    test: tuple[int, tuple[float, ...]] | None = None  # first token of the next row and its distribution

    def complete(self, columns: int) -> bool:
        return all(len(row) == columns for row in self.rows)


@dataclass(frozen=True)
class Turn:
    """A page and the slots of its next pass."""

    page: Page
    slots: list[Slot]
    fed: Fed
    kept: tuple[tuple[int, int], ...]
    begun: int  # rows that have a code
    whole: bool  # the row above the one that opens is complete


class Book:
    """ZipAR by its description: one forward over all that was ever fed, no cache, every outcome followed."""

    def __init__(self, model: Toy, sampling: SamplingParams, window_size: int, adaptive: bool) -> None:
        self.model, self.grid, self.sampling = model, model.layout, sampling
        self.window_size, self.adaptive = min(window_size, model.layout.columns), adaptive
        self.forced = model.layout.forced().tolist()

    def place(self, row: int, column: int) -> int:
        return len(self.grid.prefix) + row * self.grid.stride + column

    @torch.inference_mode()
    def probs(self, many: list[Fed], prompt: str) -> torch.Tensor:
        """Return the distribution after everything fed, of pages that have fed equally many tokens: -> [pages, fed, V]."""
        condition, logits, size = self.model.encode([prompt]), [], len(many[0])
        tokens = torch.tensor([[token for _, token, _ in fed] for fed in many], dtype=torch.long)
        places = torch.tensor([[place for place, _, _ in fed] for fed in many], dtype=torch.long)
        saw = torch.eye(size, dtype=torch.bool).repeat(len(many), 1, 1)
        for page, fed in enumerate(many):
            for entry, (_, _, others) in enumerate(fed):
                saw[page, entry, list(others)] = True
        branches = [(condition.embeds, condition.lengths), (condition.uncond_embeds, condition.uncond_lengths)]
        for embeds, lengths in branches[: 2 if self.sampling.guided else 1]:
            n = int(lengths[0])
            visible = torch.ones(len(many), n + size, n + size, dtype=torch.bool)
            visible[:, :n] = torch.ones(n, n + size).tril().bool()
            visible[:, n:, n:] = saw
            x = torch.cat([embeds[:1, :n].expand(len(many), -1, -1), self.model.embed(tokens)], 1)
            positions = torch.cat([torch.arange(n).expand(len(many), -1), n + places], 1)
            logits.append(self.model.logits(self.model.forward(x, positions, None, visible))[:, n - 1 :])
        return self.sampling.probs(torch.cat(logits)).double()

    def run(self, prompt: str) -> dict[tuple[int, ...], float]:
        """Return the probability of every outcome, codes in raster order."""
        header = len(self.grid.prefix)
        fed = tuple((n, self.forced[n], tuple(range(n))) for n in range(header))
        first = self.probs([fed], prompt)[0, -1].tolist()
        empty, kept = ((),) * (self.grid.rows - 1), tuple((n, n) for n in range(header))
        pages = [Page(p, ((code,), *empty), fed, kept) for code, p in enumerate(first) if p > 0]
        done: dict[tuple[int, ...], float] = {}
        while pages:
            for page in pages:
                if page.complete(self.grid.columns):
                    codes = tuple(itertools.chain(*page.rows))
                    done[codes] = done.get(codes, 0.0) + page.weight
            turns = [self.turn(page) for page in pages if not page.complete(self.grid.columns)]
            pages = []
            for _, group in itertools.groupby(sorted(turns, key=lambda t: len(t.fed)), key=lambda t: len(t.fed)):
                turned = list(group)
                for turn, probs in zip(turned, self.probs([turn.fed for turn in turned], prompt), strict=True):
                    pages += self.outcomes(turn, probs[-len(turn.slots) :])
        return done

    def turn(self, page: Page) -> Turn:
        """Return what the next pass of a page feeds."""
        columns, rows = self.grid.columns, page.rows
        begun = sum(len(row) > 0 for row in rows)
        slots: list[Slot] = []
        for number, row in enumerate(rows[:begun]):
            stored = self.place(number, columns - 1) in dict(page.kept)
            if len(row) < columns:
                slots.append((self.place(number, len(row) - 1), row[-1], True, number))
            elif not stored and (self.grid.row_end is not None or number + 1 < begun):
                slots.append((self.place(number, columns - 1), row[-1], True, -1))
        whole = False
        if begun < len(rows) and len(rows[begun - 1]) >= self.window_size:
            whole, before = len(rows[begun - 1]) == columns, self.place(begun, 0) - 1
            if self.forced[before] >= 0:
                slots.append((before, self.forced[before], True, begun))
            else:
                stand_in = rows[begun - 1] if whole else rows[max(begun - 2, 0)]
                slots.append((before, stand_in[-1], whole, begun))
        fed, kept = list(page.fed), dict(page.kept)
        kept |= {place: len(fed) + i for i, (place, _, real, _) in enumerate(slots) if real}
        for place, token, _, _ in slots:
            fed.append((place, token, tuple(entry for other, entry in kept.items() if other < place)))
        return Turn(page, slots, tuple(fed), tuple(kept.items()), begun, whole)

    def outcomes(self, turn: Turn, probs: torch.Tensor) -> list[Page]:
        """Follow every outcome of one pass."""
        page, choices = turn.page, []  # per slot that draws: (row, code or None, first token under test, probability)
        for (_, _, _, row), p in zip(turn.slots, probs, strict=True):
            if 0 <= row < turn.begun or (row >= 0 and not self.adaptive):
                choices.append([(row, code, None, float(p[code])) for code in range(len(p))])
            elif row >= 0:
                choices.append(self.first(page, row, p, turn.whole))
        pages = []
        for chosen in itertools.product(*choices):
            rows, test, weight = [list(row) for row in page.rows], None, page.weight
            for row, code, under_test, p in chosen:
                weight *= p
                test = under_test or test
                if code is not None:
                    rows[row].append(code)
            if weight > 0:
                pages.append(Page(weight, tuple(tuple(row) for row in rows), turn.fed, turn.kept, test))
        return pages

    def first(self, page: Page, row: int, p: torch.Tensor, whole: bool) -> list:
        """Follow the first token of a row under the adaptive window."""
        record = tuple(p.tolist())
        if page.test is None:
            return [(row, code, None, w) if whole else (row, None, (code, record), w) for code, w in enumerate(record)]
        draft, q = page.test[0], torch.tensor(page.test[1], dtype=torch.float64)
        passes = min(1.0, float(p[draft] / q[draft]))
        left = (p - q).clamp(min=0)
        out = [(row, draft, None, passes)]
        for code, w in enumerate((left / left.sum()).tolist() if left.sum() > 0 else ()):
            out.append((row, code, None, (1 - passes) * w) if whole else (row, None, (code, record), (1 - passes) * w))
        return out


SMALL = TokenGrid(3, 3, 2)
WIDE = TokenGrid(2, 4, 2)
ENDED = TokenGrid(2, 4, 2, prefix=(20, 21), row_end=22, suffix=(23,))
GUIDED = SamplingParams(guidance_scale=2.0)
CASES = {
    "fixed": (SMALL, 1, False, GUIDED),
    "adaptive": (SMALL, 1, True, GUIDED),
    "adaptive wide": (WIDE, 1, True, SamplingParams(temperature=0.8)),
    "fixed 2": (WIDE, 2, False, GUIDED),
    "row ends, fixed": (ENDED, 1, False, GUIDED),
    "row ends, adaptive": (ENDED, 1, True, GUIDED),
}


def counts(model: Toy, decoder: ZipAR, sampling: SamplingParams) -> torch.Tensor:
    """Decode SAMPLES images and count every outcome, in the order of `enumerate_probs`."""
    free = model.layout.free
    digits = model.layout.vocabulary ** torch.arange(int(free.sum()) - 1, -1, -1)
    tokens = []
    for part in range(0, SAMPLES, 4000):
        seeds = list(range(part, part + 4000))
        tokens.append(generate(model, decoder, model.encode([PROMPT] * 4000), seeds, sampling=sampling).tokens)
    return torch.bincount(
        (torch.cat(tokens)[:, free] * digits).sum(1), minlength=model.layout.vocabulary ** len(digits)
    )


def by_the_book(model: Toy, sampling: SamplingParams, window_size: int, adaptive: bool) -> torch.Tensor:
    book = Book(model, sampling, window_size, adaptive).run(PROMPT)
    codes = itertools.product(range(model.layout.vocabulary), repeat=int(model.layout.free.sum()))
    return torch.tensor([book.get(code, 0.0) for code in codes], dtype=torch.float64)


@pytest.mark.parametrize("name", by_default(CASES, ["fixed", "adaptive", "row ends, adaptive"]))
def test_the_distribution_is_that_of_the_description_and_not_ar(name: str) -> None:
    grid, window_size, adaptive, sampling = CASES[name]
    model = Toy(grid)
    expected = by_the_book(model, sampling, window_size, adaptive)
    assert float(expected.sum()) == pytest.approx(1, abs=1e-5)
    found = counts(model, zipar(window_size, adaptive), sampling)
    assert abs(chi_square_z(found, expected)) < 5
    assert abs(chi_square_z(found, enumerate_probs(model, PROMPT, sampling)[1])) > 5  # negative control: AR
    other = by_the_book(model, sampling, window_size, not adaptive)
    assert abs(chi_square_z(found, other)) > 5  # negative control: the other window


def test_the_book_of_a_whole_row_is_ar() -> None:
    model = Toy(ENDED)
    expected = enumerate_probs(model, PROMPT, GUIDED)[1]
    for window_size, adaptive in ((4, True), (4, False), (3, True)):
        assert torch.allclose(by_the_book(model, GUIDED, window_size, adaptive), expected, atol=1e-5)


def test_a_test_against_the_whole_row_has_the_distribution_of_ar() -> None:
    model = Toy(SMALL)
    assert abs(chi_square_z(counts(model, zipar(2), GUIDED), enumerate_probs(model, PROMPT, GUIDED)[1])) < 5
