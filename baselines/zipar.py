"""ZipAR (arXiv 2412.04062): a row of the image starts before the row above it is complete, so several rows grow at once.

# B samples, R model rows (2B with guidance, else B), S slots of a pass, G grid rows, V image vocabulary, N image-phase tokens
Tokens are committed out of raster order, so this decoder has a loop of its own, with the methods of `loop.Decoding`. Slot i
of a pass belongs to grid row `low + i`: it feeds that row's last token and its output draws the next one. Keys and values
lie at their token's place in the raster; a token sees the prompt and what is decoded before it in raster order.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from sjd2.decoding.noise import Noise, Purpose
from sjd2.decoding.sampling import SamplingParams, draw_tokens
from sjd2.decoding.verify import Exact
from sjd2.decoding.window import Sample
from sjd2.errors import UserError
from sjd2.models.base import Condition, ImageModel
from sjd2.models.kv_cache import RowCache, additive


@dataclass(frozen=True, kw_only=True)
class ZipAR:
    """The settings of ZipAR; `start` opens its loop.

    window_size: tokens of a row that must be there before the next row starts; from `columns` on it is plain AR.
    adaptive: window_size is a minimum: the first token of a row is tested like a speculative draft against its law one
    column later, until it passes or the row above is complete. Without, rows start after exactly window_size tokens.
    """

    name: str
    lossless: bool
    window_size: int
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise UserError(f"decoder.window_size must be 1 or more, got {self.window_size}.")
        if self.lossless:
            raise UserError("ZipAR draws tokens before their context is complete; set decoder.lossless=false.")

    @property
    def ahead(self) -> int:
        """Return 0: nothing waits as a guess."""
        return 0

    @property
    def window(self) -> int:
        """Return 1: as in AR nothing waits as a guess; how many rows grow at once follows from window_size."""
        return 1

    def check(self, spec: object) -> None:
        """Every model with a raster of tokens will do."""

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Any sampling parameters will do."""

    def prepare(self, model: ImageModel) -> None:
        """Nothing to prepare."""

    def start(self, model: ImageModel, rows: int, prompt: int, sampling: SamplingParams) -> ZipDecoding:
        """Open a loop of `rows` rows for prompts of up to `prompt` tokens."""
        return ZipDecoding(model, self, rows, prompt, sampling)


class RasterCache(RowCache):
    """A cache whose passes are written at `entries` [R, S], anywhere; `visible` [R, S, span] is the whole mask."""

    entries: Tensor

    def window(self, width: int, dtype: torch.dtype, visible: Tensor | None = None) -> Tensor:
        self.slots, self.span = self.entries, visible.shape[2]
        return additive(visible, dtype)[:, None]


@dataclass
class Board:
    """The samples in flight. Position n is the n-th of the N image-phase tokens, forced ones included."""

    tokens: Tensor  # [B, N] forced tokens are there from the start, the others once they are drawn
    drawn: Tensor  # [B, G] codes drawn in each grid row
    fed: Tensor  # [B, N] bool, whose keys and values are those of the token itself
    committed: Tensor  # [B] tokens that count as decoded
    iteration: Tensor  # [B] the sample's own pass counter
    tested: Tensor  # [B] first token of the next row while it is under test, -1: none
    law: Tensor  # [B, V] the law it was drawn from
    begins: Tensor  # [R] cache entry of the image's first token in each model row: its prompt tokens
    starts: Tensor  # [R] position id of that token
    noise: Noise


@dataclass
class Plan:
    """What the slots of a pass do, all [B, S]."""

    row: Tensor  # grid row
    feed: Tensor  # position whose token is fed, -1: the slot is idle
    token: Tensor  # what is fed
    real: Tensor  # the token fed is that position's own, no stand-in
    aim: Tensor  # position that the output draws
    grows: Tensor  # a row that has begun draws its next code
    opens: Tensor  # a row draws its first code
    whole: Tensor  # nothing is missing from the context of a first code


class ZipDecoding:
    """B samples in flight. `admit` starts some, `step` is one pass, `collect` hands out a finished one."""

    @torch.inference_mode()
    def __init__(self, model: ImageModel, decoder: ZipAR, rows: int, prompt: int, sampling: SamplingParams) -> None:
        self.model, self.decoder, self.sampling = model, decoder, sampling
        layout, device = model.layout, model.device
        wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        self.branches = 2 if sampling.guided else 1
        self.total = layout.length
        self.delay = min(decoder.window_size, layout.columns)
        # a row is `delay` columns behind the one above, and one more pass stores the keys of its last token
        self.size = min(layout.rows, layout.columns // self.delay + 1)
        self.header = torch.arange(len(layout.prefix), device=device)
        self.last = len(layout.prefix) + layout.columns - 1 + layout.stride * torch.arange(layout.rows, device=device)
        self.forced = layout.forced().to(device)
        self.prompt = prompt + len(layout.prefix)
        capacity = self.prompt + self.total + self.size  # idle slots write behind everything
        self.cache = RasterCache(len(model.cache(1, 1).layers), self.branches * rows, capacity, device)
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        self.state = Board(
            tokens=self.forced.clamp(min=0).repeat(rows, 1),
            drawn=torch.full((rows, layout.rows), layout.columns, device=device),  # empty rows look finished
            fed=torch.ones(rows, self.total, dtype=torch.bool, device=device),
            committed=zeros + self.total,
            iteration=zeros.clone(),
            tested=zeros - 1,
            law=torch.zeros(rows, layout.vocabulary, dtype=wide, device=device),
            begins=zeros.repeat(self.branches),
            starts=zeros.repeat(self.branches),
            noise=Noise(zeros.clone(), wide),
        )
        self.history: list[Tensor] = []  # per pass [B]: tokens committed
        self.started = [0] * rows  # pass at which the row was admitted
        self.dropped = 0  # passes at the front of the history that no row needs any more
        self.seconds = {"prefill": 0.0, "decode": 0.0}

    @torch.inference_mode()
    def admit(self, rows: list[int], condition: Condition, seeds: list[int]) -> None:
        """Prefill prompts and the forced header into these rows, and draw their first code."""
        begin = self.now()
        state, layout, index = self.state, self.model.layout, torch.tensor(rows, device=self.model.device)
        state.noise.put(index, torch.tensor(seeds, device=index.device))
        prompts = [(condition.embeds, condition.lengths), (condition.uncond_embeds, condition.uncond_lengths)]
        prompts = [self._with_header(*branch) for branch in prompts]
        longest = max(embeds.shape[1] for embeds, _ in prompts)
        if longest > self.prompt:
            self.cache.reserve(self.cache.capacity + longest - self.prompt)
            self.prompt = longest
        ends = []
        for branch, (embeds, lengths) in enumerate(prompts[: self.branches]):
            place = index + branch * len(state.committed)
            ends.append(self._prefill(embeds, lengths, place).expand(len(rows), -1))
            state.begins[place] = lengths - len(layout.prefix)  # header tokens keep their place in the raster
            state.starts[place] = self.model.image_start(lengths - len(layout.prefix))
        law = self.sampling.probs(self.model.logits(torch.cat(ends)[:, None]))  # [b, 1, V]
        first = torch.full((len(rows), 1), len(layout.prefix), device=index.device)
        noise = Noise(state.noise.seeds[index], state.noise.dtype)
        state.tokens[index] = self.forced.clamp(min=0)
        drawn = draw_tokens(law, noise, first, Purpose.SAMPLE, 0, self.sampling.sampler)
        state.tokens[index, len(layout.prefix)] = drawn[:, 0]
        state.drawn[index], state.fed[index] = 0, False
        state.drawn[index, 0] = 1
        state.fed[index[:, None], self.header] = True
        state.iteration[index], state.tested[index] = 0, -1
        state.committed[index] = self._count()[index]
        for row in rows:
            self.started[row] = self.dropped + len(self.history)
        oldest = min(self.started) - self.dropped
        self.dropped, self.history = self.dropped + oldest, self.history[oldest:]
        self.seconds["prefill"] += self.now() - begin

    def _with_header(self, embeds: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Append the forced header to prompts [b, P, D] of `lengths` [b]: it costs no pass of its own."""
        if not len(self.header):
            return embeds, lengths
        width = len(self.header)
        joined = torch.nn.functional.pad(embeds, (0, 0, 0, width))
        header = self.model.embed(self.forced[self.header][None]).expand(len(embeds), -1, -1)
        place = (lengths[:, None] + torch.arange(width, device=lengths.device))[..., None]
        return joined.scatter(1, place.expand_as(header), header), lengths + width

    def _prefill(self, embeds: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """Run prompts [b, P, D] (or one shared prompt [1, P, D]) into model rows; return the last hidden states."""
        count, width = embeds.shape[:2]
        scratch = self.model.cache(count, width)
        hidden = self.model.forward(embeds, torch.arange(width, device=embeds.device).expand(count, -1), scratch)
        scratch.lengths = lengths
        sources = torch.arange(count, device=embeds.device) if count > 1 else torch.zeros_like(rows)
        self.cache.take_rows(rows, scratch, sources)
        return hidden[torch.arange(count, device=embeds.device), lengths - 1]

    @torch.inference_mode()
    def step(self) -> None:
        """One pass: every row that has begun draws its next code, and the next row begins where it may."""
        plan = self._plan()
        law = self._forward(plan)
        drawn = draw_tokens(law, self.state.noise, plan.aim, Purpose.SAMPLE, 0, self.sampling.sampler)
        taken = plan.grows | plan.opens
        if self.decoder.adaptive:
            drawn, taken = self._test(plan, law, drawn, taken)
        self._commit(plan, drawn, taken)

    def _plan(self) -> Plan:
        state, layout = self.state, self.model.layout
        low = state.fed[:, self.last].sum(1, keepdim=True)  # rows above are done: their last keys are stored
        row = low + torch.arange(self.size, device=low.device)
        alive = (row < layout.rows) & (state.committed < self.total)[:, None]
        row = row.clamp(max=layout.rows - 1)
        drawn, above = state.drawn.gather(1, row), state.drawn.gather(1, (row - 1).clamp(min=0))
        high = (state.drawn > 0).sum(1, keepdim=True)  # the row that begins next
        begin = len(layout.prefix) + row * layout.stride
        begun = alive & (row < high)
        grows = begun & (drawn < layout.columns)
        opens = alive & (row == high) & (above >= self.delay)
        closes = begun & (drawn == layout.columns)  # no draw, only the keys of the row's last code
        if layout.row_end is None:  # the slot that opens the next row feeds that code itself
            closes &= row + 1 < high
        whole = above == layout.columns
        feed = torch.where(opens, begin - 1, begin + drawn - 1)
        real = grows | closes | (opens & (whole if layout.row_end is None else True))
        source = torch.where(real | ~opens, feed, self._stand_in(row))
        token = state.tokens.gather(1, source.clamp(min=0, max=self.total - 1))
        aim = torch.where(opens, begin, begin + drawn).clamp(max=self.total - 1)
        feed = torch.where(grows | closes | opens, feed, -1)
        return Plan(row, feed, token, real, aim, grows, opens, whole)

    def _stand_in(self, row: Tensor) -> Tensor:
        """Return the position whose token stands in for the missing last token of the row above: [B, S] -> [B, S].

        Its nearest known neighbour upwards, the latest token one row higher; the first row has only its own latest.
        """
        layout = self.model.layout
        source = (row - 2).clamp(min=0)
        return len(layout.prefix) + source * layout.stride + self.state.drawn.gather(1, source) - 1

    def _forward(self, plan: Plan) -> Tensor:
        """Run the slots of a pass and return the law behind each: [B, S, V]."""
        state, count = self.state, self.branches
        fed = torch.nn.functional.pad(state.fed, (0, 1))  # a place for what is not real
        fed = fed.scatter(1, torch.where(plan.real, plan.feed, self.total), True)[:, : self.total]
        place = torch.arange(self.total, device=fed.device)
        feed = plan.feed[..., None]
        seen = ((place < feed) & fed[:, None]) | (place == feed)  # [B, S, N]; a stand-in is seen by itself alone
        state.fed = fed
        begins, feed = state.begins[:, None], plan.feed.repeat(count, 1)
        behind = self.prompt + self.total + torch.arange(self.size, device=fed.device)
        self.cache.entries = torch.where(feed < 0, behind, begins + feed)
        span = self.prompt + self.total
        if self.cache.reads:  # a device would have to be asked, and every span is a shape of its own
            span = int((begins + feed.clamp(min=0)).max()) + 1
        column = torch.arange(span, device=fed.device) - begins  # [R, span] position of each entry, < 0: the prompt
        inside = ((column >= 0) & (column < self.total))[:, None]
        seen = seen.repeat(count, 1, 1).gather(2, column.clamp(0, self.total - 1)[:, None].expand(-1, self.size, -1))
        visible = (seen & inside) | (column < 0)[:, None]
        x = self.model.embed(plan.token).repeat(count, 1, 1)
        hidden = self.model.forward(x, state.starts[:, None] + feed.clamp(min=0), self.cache, visible)
        return self.sampling.probs(self.model.logits(hidden))

    def _test(self, plan: Plan, law: Tensor, drawn: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        """Adapt the window: take a row's first token only if it passes under one more column (the paper's adaptive window).

        A draft x of law q passes with min(1, p(x) / q(x)), p its law now; else it is redrawn from norm(max(0, p - q)) and
        tested again in the next pass. Once the row above is complete nothing is left to wait for.
        """
        state = self.state
        slot = plan.opens.int().argmax(1, keepdim=True)  # [B, 1] at most one row opens
        opens, whole = plan.opens.gather(1, slot)[:, 0], plan.whole.gather(1, slot)[:, 0]
        p = law.gather(1, slot[..., None].expand(-1, -1, law.shape[-1]))[:, 0]
        token, place = drawn.gather(1, slot)[:, 0], plan.aim.gather(1, slot)
        draft, running = state.tested.clamp(min=0), state.tested >= 0
        if self.sampling.sampler == "gumbel":  # the token is a function of its law: it passes if it is still the same
            passes = token == draft
        else:
            test = Exact()
            u = state.noise.uniform(place, Purpose.ACCEPT, state.iteration)[:, 0]
            passes = u < test.chance(p, state.law, draft)
            rest = test.rest(p, state.law, draft)[:, None]
            other = draw_tokens(rest, state.noise, place, Purpose.RESIDUAL, state.iteration, "cdf")[:, 0]
            token = torch.where(running, torch.where(passes, draft, other), token)
        taken_now = opens & (whole | (running & passes))
        state.tested = torch.where(opens & ~taken_now, token, -1)
        state.law = p
        return drawn.scatter(1, slot, token[:, None]), taken & (plan.grows | taken_now[:, None])

    def _commit(self, plan: Plan, drawn: Tensor, taken: Tensor) -> None:
        state = self.state
        board = torch.nn.functional.pad(state.tokens, (0, 1))  # a place for what is not taken
        state.tokens = board.scatter(1, torch.where(taken, plan.aim, self.total), drawn)[:, : self.total]
        state.drawn = state.drawn.scatter_add(1, plan.row, taken.long())
        before, state.committed = state.committed, self._count()
        state.iteration = state.iteration + 1
        self.history.append(state.committed - before)

    def _count(self) -> Tensor:
        """Count decoded tokens [B]: a row's end comes with its last code, header and footer with the first and last."""
        layout, drawn = self.model.layout, self.state.drawn
        complete = (drawn == layout.columns).sum(1)
        count = len(layout.prefix) + drawn.sum(1) + complete * (layout.row_end is not None)
        return count + (complete == layout.rows) * len(layout.suffix)

    def finished(self) -> list[int]:
        """Return the rows that have all their tokens (waits for the device)."""
        return (self.state.committed.cpu() >= self.total).nonzero()[:, 0].tolist()

    def look(self) -> dict[str, Tensor]:
        """Return `rows` [B, G], the codes that each grid row has: tokens are not committed in raster order."""
        return {"rows": self.state.drawn}

    def collect(self, row: int) -> Sample:
        """Return the finished row's sample; the prefill's tokens are what the other passes did not commit."""
        passes = self.history[self.started[row] - self.dropped :]
        moves = torch.stack(passes)[:, row].cpu().tolist() if passes else []
        accepted = [self.total - sum(moves), *(move for move in moves if move > 0)]
        return Sample(self.state.tokens[row].cpu().numpy().copy(), len(accepted), 0, accepted)

    def now(self) -> float:
        """Return the time in seconds, after the device has finished what was asked of it."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
