"""SJD2's drafting: fresh slots start as Gaussian noise and lose some of it in every pass (arXiv 2510.08994, section 4.2).

# B samples, R model rows, S slots of a pass, K denoising steps, V image vocabulary, D width
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft, Drafter, State
from sjd2.denoising.embedding_space import EmbeddingSpace, sinusoid
from sjd2.denoising.schedule import Schedule, alpha_sigma
from sjd2.errors import UserError, choose
from sjd2.models.base import ImageModel


@dataclass(kw_only=True)
class Denoise(Drafter):
    """Feed noisy embeddings at slots of level > 0 and walk their levels down to clean.

    steps: K. levels: `age` lowers a slot by one level per pass (the paper); `slot` gives level by place in the window: 0 for
    the first `clean` slots, rising to K at the last, reached by larger DDIM jumps.
    early: with levels=slot or age, feed a slot clean at once where the law its token was drawn from has a maximum of at least
    `early` (null: never); exact, since it reads the law and not the token.
    nearest: the token of a noisy slot is the entry nearest to its embedding by cosine similarity (rule=paper); it is then
    no draw from the recorded law, so verification is not exact.
    """

    steps: int = 1
    levels: str = "age"
    clean: int = 0
    early: float | None = None
    nearest: bool = False
    schedule: Schedule = field(default_factory=Schedule)
    extra: int = field(default=0, init=False)

    recorded = True

    def __post_init__(self) -> None:
        choose("decoder.levels", self.levels, ("age", "slot"))
        if self.steps < 1:
            raise UserError(f"decoder.steps must be 1 or more, got {self.steps}; without noise use decoder=scd or sjd.")
        if self.clean < 0:
            raise UserError(f"decoder.clean must be 0 or more, got {self.clean}.")
        if self.early is not None and not 0 < self.early <= 1:
            raise UserError(f"decoder.early must lie in (0, 1], or null for never, got {self.early}.")

    @property
    def exact(self) -> bool:
        return not self.nearest

    def check(self, spec: object, window: int) -> None:
        """Raise `UserError` if the model has no SJD2 fine-tuning, or no slot of the window would be noisy."""
        if spec.adapter is None:
            raise UserError(
                f"decoder=sjd2 needs a fine-tuned model: make one with stage=finetune finetune=sjd2 model={spec.name} and "
                "give its folder as model.adapter=, or use the training-free decoder=scd."
            )
        if window < 2:
            raise UserError("decoder=sjd2 needs a window of 2 or more; a window of 1 is decoder=ar.")
        if not self.nearest and self.early is None:
            if self.levels == "age" and self.steps >= window - 1:
                raise UserError(
                    f"decoder.steps={self.steps} in a window of {window} leaves no slot clean in time under rule=exact, so no "
                    f"pass commits more than AR's; take fewer than {max(window - 1, 2)} steps or a wider window."
                )
            if self.levels == "slot" and self.clean == 0:
                raise UserError(
                    "decoder.levels=slot with decoder.clean=0 keeps the first guess noisy, so no pass commits more than AR's; "
                    f"set decoder.clean, e.g. to {window // 2}."
                )
        if self.levels == "slot" and self.clean >= window - 1:
            raise UserError(
                f"decoder.clean={self.clean} leaves no noisy slot in a window of {window}; that decoder is decoder=scd."
            )

    def prepare(self, model: ImageModel) -> None:
        self.settings = model.adapter.settings
        self.layout = model.layout
        self.model = model
        self.space = EmbeddingSpace(model, normalised=self.settings.normalised)
        times = self.schedule.times(self.steps).to(self.space.table)
        self.alpha, self.sigma = alpha_sigma(times, self.settings.path)
        width = self.space.table.shape[1]
        if model.adapter.code is not None:
            self.codes = model.adapter.code(times).to(self.space.table)  # [K + 1, D]
            self.extra = 0
        else:
            self.codes = torch.zeros(len(times), width).to(self.space.table)
            self.appended = self.space.model_input(sinusoid(times[1:], width)).to(model.dtype)  # [K, D]
            self.extra = self.steps

    def _by_slot(self, size: int, device: torch.device) -> Tensor:
        """Return the level of each slot under levels=slot: [S]."""
        slot = torch.arange(size, device=device)
        rise = (slot - self.clean).clamp(min=0) * self.steps
        return torch.div(rise + size - 2 - self.clean, max(size - 1 - self.clean, 1), rounding_mode="floor").clamp(
            0, self.steps
        ) * (slot > self.clean)

    def fill(self, draft: Draft, fresh: Tensor, state: State) -> Draft:
        """Denoise the slots that were there before by one step and start the fresh ones [B, S] as pure noise."""
        size, vocabulary = draft.tokens.shape[1], self.layout.vocabulary
        positions = state.positions(size)
        free = state.at(positions) < 0
        guess = (torch.arange(size, device=fresh.device) > 0) & (positions >= state.committed[:, None]) & free
        tokens = torch.where(fresh, state.noise.codes(positions, vocabulary), draft.tokens)
        probs = torch.where(fresh[:, 1:, None], 1.0 / vocabulary, draft.probs)
        old = torch.zeros_like(tokens) if draft.level is None else draft.level
        level = (
            torch.minimum(self._by_slot(size, tokens.device), old) if self.levels == "slot" else (old - 1).clamp(min=0)
        )
        if self.early is not None:
            sure = torch.nn.functional.pad(probs.amax(-1) >= self.early, (1, 0))
            level = level.masked_fill(sure, 0)
        level = torch.where(fresh, self.steps, level) * guess
        latent = self._denoise(draft.latent, tokens, old, level, fresh, state, positions)
        if self.nearest:
            tokens = torch.where(level > 0, self.space.nearest(latent), tokens)
        tokens = state.force(tokens)
        noisy = self.space.model_input(latent + self.codes[level])
        clean = self.model.embed(tokens)
        embeds = torch.where((level > 0)[..., None], noisy.to(clean.dtype), clean)
        return replace(draft, tokens=tokens, probs=probs, level=level, latent=latent, embeds=embeds)

    def _denoise(
        self,
        latent: Tensor | None,
        tokens: Tensor,
        old: Tensor,
        new: Tensor,
        fresh: Tensor,
        state: State,
        positions: Tensor,
    ) -> Tensor:
        """Step from level to level by DDIM: e' = (s'/s) e + (a' - a s'/s) e0, eq. 3 in a form that allows a = 0.

        tokens, old, new [B, S] -> [B, S, D]; e0 is the normalised embedding of each slot's present token.
        """
        start = state.noise.normal(positions, self.space.table.shape[1])
        if latent is None:
            return start
        ratio = self.sigma[new] / self.sigma[old].clamp(min=torch.finfo(self.sigma.dtype).tiny)
        ratio = torch.where(old > 0, ratio, 0.0)
        pull = self.alpha[new] - self.alpha[old] * ratio
        moved = ratio[..., None] * latent + pull[..., None] * self.space.normal(tokens)
        return torch.where(fresh[..., None], start, moved)

    def append(
        self, x: Tensor, positions: Tensor, level: Tensor, gate: Tensor, start: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Put the K timestep tokens behind the pass (arXiv 2510.08994): x [B, S, D] -> [B, S + K, D] and so on.

        A noisy slot sees the token of its own level; the tokens see themselves only and stand at the image's start [R].
        """
        rows, size, steps = len(positions), x.shape[1], self.steps
        x = torch.cat([x, self.appended.expand(len(x), -1, -1)], 1)
        positions = torch.cat([positions, start[:, None].expand(-1, steps)], 1)
        gate = torch.cat([gate, gate.new_ones(rows, steps)], 1)
        if visible is None:
            visible = torch.ones(size, size, dtype=torch.bool, device=x.device).tril().expand(rows, -1, -1)
        own = level.repeat(rows // len(level), 1)[..., None] == torch.arange(1, steps + 1, device=x.device)
        below = torch.cat([own.new_zeros(steps, size), torch.eye(steps, dtype=torch.bool, device=x.device)], 1)
        visible = torch.cat([torch.cat([visible, own], 2), below.expand(rows, -1, -1)], 1)
        return x, positions, visible, gate
