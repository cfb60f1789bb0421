"""ZipAR by its description, every outcome followed; and how often images of a toy model come out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.generate import generate
from sjd2.decoding.sampling import SamplingParams
from tests.helpers.toy import Toy

SAMPLES = 12_000
PROMPT = "a b"
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


def counts(model: Toy, decoder: BaseDecoder, sampling: SamplingParams) -> torch.Tensor:
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
