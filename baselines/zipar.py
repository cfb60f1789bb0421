"""ZipAR (arXiv 2412.04062): a row of the image starts before the row above it is complete, so several rows grow at once.

# B samples, R model rows (2B with guidance, else B), S slots of a pass, G grid rows, V image vocabulary, N image-phase tokens
Tokens are committed out of raster order, so this decoder has an engine of its own. Slot i of a pass belongs to grid row
`low + i`: it feeds that row's last token and its output draws the next one. Keys and values lie at their token's place in the
raster; a token sees the prompt and what is decoded before it in raster order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.engine import Engine, Prompt
from sjd2.decoding.interfaces import Rows
from sjd2.decoding.noise import Purpose
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.verify import EXACT
from sjd2.errors import UserError
from sjd2.models.base import Condition, ImageModel
from sjd2.models.kv_cache import RowCache, additive
from sjd2.models.spec import ModelSpec


class RasterCache(RowCache):
    """A cache whose passes are written at `entries` [R, S], anywhere; `attn_mask` [R, S, span] is the whole mask."""

    entries: Tensor

    def window(
        self, width: int, dtype: torch.dtype, attn_mask: Tensor | None = None, past: bool = False
    ) -> dict[str, Any]:
        assert attn_mask is not None  # ZipAR gives every pass its whole mask
        self.slots, self.span = self.entries, attn_mask.shape[2]
        return {"attention_mask": additive(attn_mask, dtype)[:, None]}


@dataclass(kw_only=True)
class Board(Rows):
    """The rows in flight: which codes each sample has, and which keys and values are stored."""

    drawn: Tensor  # [B, G] codes of each grid row that are drawn
    fed: Tensor  # [B, N] positions whose own token's keys and values are stored
    tested: Tensor  # [B] first token of the next row while it is under test, -1: none
    tested_probs: Tensor  # [B, V] the distribution it was drawn from
    image_entry: Tensor  # [R] cache entry of the image's first token in each model row: its prompt tokens


@dataclass
class PassPlan:
    """What the slots of a pass do, all [B, S]."""

    row: Tensor  # grid row
    feed: Tensor  # position whose token is fed, -1: the slot is idle
    token: Tensor  # what is fed
    real: Tensor  # the token fed is that position's own, no stand-in
    aim: Tensor  # position that the output draws
    grows: Tensor  # a row that has begun draws its next code
    opens: Tensor  # a row draws its first code
    whole: Tensor  # nothing is missing from the context of a first code


class ZipEngine(Engine):
    """Every pass draws the next code of each grid row that has begun, and begins the next row where it may."""

    raster: ClassVar[bool] = False
    decoder: ZipAR
    cache: RasterCache
    state: Board

    @torch.inference_mode()
    def __init__(
        self, model: ImageModel, decoder: RowsDecoder, rows: int, prompt: int, sampling: SamplingParams
    ) -> None:
        layout, device = model.layout, model.device
        super().__init__(model, decoder, rows, prompt + len(layout.prefix), sampling)
        self.first = len(layout.prefix)  # the header is prefilled
        self.delay = min(decoder.delay, layout.columns)
        # a row is `delay` columns shorter than the one above, and one more pass stores the keys of its last token
        self.size = min(layout.rows, layout.columns // self.delay + 1)
        self.header = torch.arange(len(layout.prefix), device=device)
        self.last = len(layout.prefix) + layout.columns - 1 + layout.stride * torch.arange(layout.rows, device=device)
        self.capacity = self.prompt + self.total + self.size * decoder.slots  # idle slots write after everything
        self.cache = RasterCache(len(model.cache(1, 1).layers), self.branches * rows, self.capacity, device)
        common = self.empty_rows(slack=0)
        self.state = Board(
            **common,
            drawn=torch.full((rows, layout.rows), layout.columns, device=device),  # empty rows look finished
            fed=torch.ones(rows, self.total, dtype=torch.bool, device=device),
            tested=torch.full_like(common["committed"], -1),
            tested_probs=torch.zeros(rows, layout.vocabulary, dtype=self.dtype, device=device),
            image_entry=torch.zeros_like(common["image_start"]),
        )

    @torch.inference_mode()
    def clear(self) -> None:
        super().clear()
        self.state.drawn.fill_(self.model.layout.columns)  # of which `committed` is counted
        self.state.fed.fill_(True)

    def prompts(self, condition: Condition) -> list[Prompt]:
        return [self._with_header(prompt) for prompt in super().prompts(condition)]

    def _with_header(self, prompt: Prompt) -> Prompt:
        """Append the forced header to prompts: it costs no pass of its own."""
        if not len(self.header):
            return prompt
        width, lengths = len(self.header), prompt.lengths
        embeds = pad(prompt.embeds, (0, 0, 0, width))
        header = self.model.embed(self.state.forced[self.header][None]).expand(len(embeds), -1, -1)
        place = (lengths[:, None] + torch.arange(width, device=lengths.device))[..., None]
        return Prompt(embeds.scatter(1, place.expand_as(header), header), lengths + width)

    def place(self, index: Tensor, prompts: list[Prompt], token: Tensor) -> None:
        state = self.state
        for branch, prompt in enumerate(prompts):  # header tokens keep their place in the raster
            state.image_entry[index + branch * self.num_rows] = prompt.lengths - self.first
        state.tokens[index] = state.forced.clamp(min=0)
        state.tokens[index, self.first] = token
        state.drawn[index], state.fed[index] = 0, False
        state.drawn[index, 0] = 1
        state.fed[index[:, None], self.header] = True
        state.iteration[index], state.tested[index] = 0, -1
        state.committed[index] = self._count()[index]

    @torch.inference_mode()
    def step(self) -> None:
        """Run one pass over all samples: plan its slots, forward, draw, test a row's first code, commit."""
        plan = self._plan()
        p = self._forward(plan.feed, plan.token, plan.real, plan.feed)
        drawn = self.state.sampler.draw(p, plan.aim, Purpose.SAMPLE)
        taken = plan.grows | plan.opens
        if self.decoder.adaptive:
            drawn, taken = self._test(plan, p, drawn, taken)
        self._commit(plan, drawn, taken)

    def _plan(self) -> PassPlan:
        state, layout = self.state, self.model.layout
        row = self._low() + torch.arange(self.size, device=state.fed.device)
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
        return PassPlan(row, feed, token, real, aim, grows, opens, whole)

    def _low(self) -> Tensor:
        """Return the first grid row that is not done, as its last keys are not stored: [B, 1]."""
        return self.state.fed[:, self.last].sum(1, keepdim=True)

    def _stand_in(self, row: Tensor) -> Tensor:
        """Return the position whose token stands in for the missing last token of the row above: [B, S] -> [B, S].

        Its nearest known neighbour upwards, the latest token one row higher; the first row has only its own latest.
        """
        layout = self.model.layout
        source = (row - 2).clamp(min=0)
        return len(layout.prefix) + source * layout.stride + self.state.drawn.gather(1, source) - 1

    def _forward(self, feed: Tensor, token: Tensor, real: Tensor, since: Tensor) -> Tensor:
        """Run the slots of a pass and return the next-token distribution at each: [B, S, V].

        feed, token, real [B, S] as in `PassPlan`; since [B, S]: from there to its own place a slot sees what the pass feeds.
        """
        state, count, slots = self.state, self.branches, feed.shape[1]
        fed = pad(state.fed, (0, 1))  # a place for what is not real
        fed = fed.scatter(1, torch.where(real, feed, self.total), True)[:, : self.total]
        place = torch.arange(self.total, device=fed.device)
        at = feed[..., None]
        seen = ((place < at) & fed[:, None]) | ((place >= since[..., None]) & (place <= at))  # [B, S, N]
        state.fed = fed
        entry, feed = state.image_entry[:, None], feed.repeat(count, 1)
        idle = self.prompt + self.total + torch.arange(slots, device=fed.device)
        self.cache.entries = torch.where(feed < 0, idle, entry + feed)
        span = self.prompt + self.total
        if self.cache.reads:  # a device would have to be asked, and every span is a shape of its own
            span = int((entry + feed.clamp(min=0)).max()) + 1
        column = torch.arange(span, device=fed.device) - entry  # [R, span] position of each entry, < 0: the prompt
        inside = ((column >= 0) & (column < self.total))[:, None]
        seen = seen.repeat(count, 1, 1).gather(2, column.clamp(0, self.total - 1)[:, None].expand(-1, slots, -1))
        attn_mask = (seen & inside) | (column < 0)[:, None]
        x = self.model.embed(token).repeat(count, 1, 1)
        hidden = self.model.forward(x, state.image_start[:, None] + feed.clamp(min=0), self.cache, attn_mask)
        return self.probs(self.model.logits(hidden))

    def _test(self, plan: PassPlan, probs: Tensor, drawn: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        """Adapt the window: take a row's first token only if it passes under one more column (the paper's adaptive window).

        A draft token x of q passes with min(1, p(x) / q(x)), p its distribution now; else it is recovered from norm(max(0, p
        - q)) and tested again in the next pass. Once the row above is complete nothing is left to wait for.
        """
        state, sampler = self.state, self.state.sampler
        slot = plan.opens.int().argmax(1, keepdim=True)  # [B, 1] at most one row opens
        opens, whole = plan.opens.gather(1, slot), plan.whole.gather(1, slot)
        p = probs.gather(1, slot[..., None].expand(-1, -1, probs.shape[-1]))  # [B, 1, V]
        token, position = drawn.gather(1, slot), plan.aim.gather(1, slot)
        q, draft, running = state.tested_probs[:, None], state.tested.clamp(min=0)[:, None], state.tested[:, None] >= 0
        accept_prob = sampler.accept_prob(EXACT, p, q, draft, position)
        passes = state.noise.uniform(position, Purpose.ACCEPT, state.iteration) < accept_prob
        recovered = sampler.recover(p, q, draft, passes, position, Purpose.RESIDUAL, state.iteration)
        token = torch.where(running, recovered, token)
        takes = opens & (whole | (running & passes))
        state.tested = torch.where(opens & ~takes, token, -1)[:, 0]
        state.tested_probs = p[:, 0]
        return drawn.scatter(1, slot, token), taken & (plan.grows | takes)

    def _commit(self, plan: PassPlan, drawn: Tensor, taken: Tensor) -> None:
        state = self.state
        board = pad(state.tokens, (0, 1))  # a place for what is not taken
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

    def peek(self) -> dict[str, Tensor]:
        """Return `rows` [B, G], the codes that each grid row has: tokens are not committed in raster order."""
        return {"rows": self.state.drawn}


class RowsDecoder(BaseDecoder):
    """Decoders whose grid rows grow at once: `delay` tokens behind the row above at least, `slots` each in a pass."""

    @property
    def delay(self) -> int:
        raise NotImplementedError

    @property
    def slots(self) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class ZipAR(RowsDecoder):
    """The settings of ZipAR.

    window_size: tokens of a row that must be there before the next row starts; from `columns` on it is plain AR.
    adaptive: window_size is a minimum: the first token of a row is tested like a draft token against its distribution one
    column later, until it passes or the row above is complete. Without, rows start after exactly window_size tokens.
    """

    name: str
    lossless: bool
    window_size: int
    adaptive: bool = True
    engine: ClassVar[type[Engine]] = ZipEngine

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise UserError(f"decoder.window_size must be 1 or more, got {self.window_size}.")
        if self.lossless:
            raise UserError("ZipAR draws tokens before their context is complete; set decoder.lossless=false.")

    def check(self, spec: ModelSpec) -> None:
        if spec.layout.preview is not None:
            raise UserError(
                f"decoder '{self.name}' lets the rows of one grid overlap, and {spec.name} draws a preview before its grid; "
                "use another decoder."
            )

    @property
    def delay(self) -> int:
        return self.window_size

    @property
    def window(self) -> int:
        """Return 1: nothing is drafted, as in AR; how many rows grow at once follows from window_size."""
        return 1
