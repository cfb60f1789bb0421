"""PJD against a slow reference that follows its description sample by sample, and against AR where it is exact."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from baselines.pjd import ParallelJacobi
from sjd2.decoding.generate import stream
from sjd2.decoding.noise import Noise, Purpose
from sjd2.decoding.sampling import SamplingParams, draw
from sjd2.errors import UserError
from sjd2.models.layout import TokenGrid
from tests.helpers.decoders import AR, GUIDED, PROMPTS, SAMPLING, decode
from tests.helpers.tiers import by_default
from tests.helpers.toy import Toy, chi_square_z, enumerate_probs
from tests.helpers.zipar_book import PROMPT, Book, counts

PLAIN = TokenGrid(4, 6, 12)
FORCED = TokenGrid(4, 6, 12, prefix=(20, 21), row_end=22, suffix=(23,))


def pjd(context: int, drafts: int) -> ParallelJacobi:
    return ParallelJacobi(name="pjd", lossless=False, context=context, drafts=drafts)


@dataclass
class Row:
    """One grid row: its committed codes, and draft tokens with the distributions they were drawn from."""

    codes: list[int]
    drafts: list[tuple[int, Tensor]]


class Described:
    """PJD by its description: one sample, one forward pass over all that was ever fed, no cache."""

    def __init__(self, model: Toy, decoder: ParallelJacobi, seed: int, prompt: str, sampling: SamplingParams) -> None:
        self.book = Book(model, sampling, decoder.context, False)
        self.grid, self.decoder, self.prompt = model.layout, decoder, prompt
        self.noise, self.iteration = Noise(torch.tensor([seed]), torch.float64), 0
        self.in_flight = min(self.grid.rows, self.grid.columns // min(decoder.context, self.grid.columns) + 1)

    def number(self, place: int, purpose: Purpose) -> Tensor:
        iteration = 0 if purpose in (Purpose.SAMPLE, Purpose.INIT) else torch.tensor([self.iteration])
        return self.noise.uniform(torch.tensor([[place]]), purpose, iteration)[0, 0]

    def run(self) -> tuple[list[int], int]:
        """Return the codes in raster order and the number of passes, the prefill among them."""
        grid, header = self.grid, len(self.grid.prefix)
        self.fed = [(n, self.book.forced[n], tuple(range(n))) for n in range(header)]
        self.kept = {n: n for n in range(header)}
        first = self.book.probs([tuple(self.fed)], self.prompt)[0, -1]
        self.rows = [Row([], []) for _ in range(grid.rows)]
        self.rows[0].codes.append(int(draw(first, self.number(header, Purpose.SAMPLE))))
        passes = 1
        while any(len(row.codes) < grid.columns for row in self.rows):
            self.turn()
            self.iteration, passes = self.iteration + 1, passes + 1
        return [code for row in self.rows for code in row.codes], passes

    def inputs(self) -> list[tuple[int, int, int, bool]]:
        """Return per row with an input: row, position, token, whether it is the position's own."""
        grid, place, found = self.grid, self.book.place, []
        begun = sum(len(row.codes) > 0 for row in self.rows)
        low = next((r for r in range(grid.rows) if place(r, grid.columns - 1) not in self.kept), grid.rows)
        for r in range(low, min(low + self.in_flight, grid.rows)):
            codes = self.rows[r].codes
            whole = r > 0 and len(self.rows[r - 1].codes) == grid.columns
            if codes and (len(codes) < grid.columns or grid.row_end is not None or r + 1 < begun):
                found.append((r, place(r, len(codes) - 1), codes[-1], True))
            elif r == begun and len(self.rows[r - 1].codes) >= min(self.decoder.context, grid.columns):
                at = place(r, 0) - 1
                if grid.row_end is not None:
                    found.append((r, at, self.book.forced[at], True))
                else:
                    found.append((r, at, self.rows[r - 1 if whole else max(r - 2, 0)].codes[-1], whole))
        return found

    def turn(self) -> None:
        """Run one pass."""
        grid, place, inputs = self.grid, self.book.place, self.inputs()
        base = len(self.fed)
        self.kept |= {at: base + i for i, (_, at, _, own) in enumerate(inputs) if own}
        for _, at, token, _ in inputs:
            self.fed.append((at, token, tuple(entry for other, entry in self.kept.items() if other < at)))
        entries: dict[int, list[int]] = {r: [base + i] for i, (r, *_) in enumerate(inputs)}
        lengths = {}
        for r, *_ in inputs:
            row = self.rows[r]
            above = grid.columns if r == 0 else len(self.rows[r - 1].codes)
            lengths[r] = min(self.decoder.drafts, above - len(row.codes)) if len(row.codes) < grid.columns else 0
            for i in range(len(row.drafts), lengths[r]):
                code = int(self.number(place(r, len(row.codes) + i), Purpose.INIT) * grid.vocabulary)
                row.drafts.append((code, torch.full((grid.vocabulary,), 1 / grid.vocabulary).double()))
            for i in range(lengths[r] - 1):
                at = place(r, len(row.codes) + i)
                saw = [entry for other, entry in self.kept.items() if other < at] + entries[r][1:]
                entries[r].append(len(self.fed))
                self.fed.append((at, row.drafts[i][0], tuple(saw)))
        probs = self.book.probs([tuple(self.fed)], self.prompt)[0][-len(self.fed) :]
        growing = [r for r, *_ in inputs if len(self.rows[r].codes) < grid.columns]
        for r in growing:
            self.test(r, lengths[r], entries[r], probs, r == growing[0])

    def test(self, r: int, length: int, entries: list[int], probs: Tensor, first: bool) -> None:
        """Accept a row's draft tokens from the left, recover one in the first row, redraw the others."""
        row, start = self.rows[r], len(self.rows[r].codes)
        rejected = False
        drafts = []
        for i in range(length):
            (x, q), p, at = row.drafts[i], probs[entries[i]], self.book.place(r, start + i)
            if not rejected and self.number(at, Purpose.ACCEPT) < p[x] / q[x]:
                row.codes.append(x)
                if i < length - 1:
                    self.kept[at] = entries[i + 1]
                continue
            if first and not rejected:
                row.codes.append(int(draw((p - q).clamp(min=0), self.number(at, Purpose.RESIDUAL))))
            else:
                drafts.append((int(draw(p, self.number(at, Purpose.FRESH))), p))
            rejected = True
        row.drafts = drafts + row.drafts[length:]


@pytest.mark.parametrize("grid", [PLAIN, FORCED], ids=["plain", "forced"])
@pytest.mark.parametrize("settings", by_default([(1, 3), (2, 2), (3, 4), (6, 3)], [(1, 3), (2, 2)]))
def test_tokens_and_passes_are_those_of_the_description(grid: TokenGrid, settings: tuple[int, int]) -> None:
    model, decoder = Toy(grid, dtype=torch.float64), pjd(*settings)
    for seed, (prompt, sample) in enumerate(zip(PROMPTS, decode(model, decoder).samples, strict=True), 1):
        codes, passes = Described(model, decoder, seed, prompt, SAMPLING).run()
        assert sample.tokens[model.layout.free.numpy()].tolist() == codes
        assert sample.forwards <= passes  # passes that commit nothing are none
        assert sum(sample.accepted) == grid.length


@pytest.mark.parametrize("grid", [PLAIN, FORCED], ids=["plain", "forced"])
def test_a_context_of_a_whole_row_gives_the_tokens_of_ar_under_gumbel(grid: TokenGrid) -> None:
    model, sampling = Toy(grid, dtype=torch.float64), replace(SAMPLING, sampler="gumbel")
    expected = decode(model, AR, sampling).tokens
    for decoder in (pjd(6, 1), pjd(6, 3), pjd(99, 5)):
        assert torch.equal(decode(model, decoder, sampling).tokens, expected)


def test_tokens_do_not_depend_on_the_batch_or_on_refilling() -> None:
    model, decoder = Toy(FORCED, dtype=torch.float64), pjd(2, 3)
    together = decode(model, decoder).samples
    requests = [(prompt, seed + 1) for seed, prompt in enumerate(PROMPTS)]
    for row, sample in stream(model, decoder, requests, rows=2, sampling=SAMPLING):
        assert (sample.tokens == together[row].tokens).all()
        assert sample.accepted == together[row].accepted


@pytest.mark.full
def test_a_whole_row_has_the_distribution_of_ar_and_less_has_not() -> None:
    model = Toy(TokenGrid(3, 3, 2))
    expected = enumerate_probs(model, PROMPT, GUIDED)[1]
    assert abs(chi_square_z(counts(model, pjd(3, 2), GUIDED), expected)) < 5
    assert abs(chi_square_z(counts(model, pjd(1, 2), GUIDED), expected)) > 5


def test_bad_settings_are_refused() -> None:
    for settings, part in ({"context": 0}, "context must be 1"), ({"drafts": 0}, "drafts must be 1"):
        with pytest.raises(UserError, match=part):
            ParallelJacobi(**{"name": "pjd", "lossless": False, "context": 2, "drafts": 2} | settings)
    with pytest.raises(UserError, match="lossless=false"):
        ParallelJacobi(name="pjd", lossless=True, context=4, drafts=2)
