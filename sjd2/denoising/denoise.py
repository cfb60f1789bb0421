"""SJD2's drafting: fresh slots start as Gaussian noise and lose some of it in every pass (arXiv 2510.08994, section 4.2).

# B samples, R model rows, S slots of a pass, K denoising steps, V image vocabulary, D width
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sjd2.decoding.interfaces import Draft, Drafter, State
from sjd2.denoising.embedding_space import EmbeddingSpace
from sjd2.denoising.schedule import Schedule, alpha_sigma
from sjd2.errors import UserError, choose
from sjd2.models.base import ImageModel
from sjd2.models.spec import ModelSpec
from sjd2.models.timesteps import sinusoid


@dataclass(frozen=True, kw_only=True)
class Denoise(Drafter):
    """Feed noisy embeddings at slots of level > 0 and walk their levels down to clean.

    steps: K. levels: `age` lowers a slot by one level per pass (the paper); `slot` gives level by place in the window: 0 for
    the first `clean` slots, rising to K at the last, reached by larger DDIM jumps.
    early: with levels=slot or age, feed a slot clean at once where the distribution its token was drawn from has a maximum of
    at least `early` (null: never); exact, since it reads the distribution and not the token.
    nearest: the token of a noisy slot is the entry nearest to its embedding by cosine similarity (rule=paper); it is then
    no draw from the recorded distribution, so verification is not exact.
    """

    steps: int = 1
    levels: str = "age"
    clean: int = 0
    early: float | None = None
    nearest: bool = False
    schedule: Schedule = field(default_factory=Schedule)

    needs_records = True

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

    def check(self, spec: ModelSpec, window: int) -> None:
        """Raise `UserError` if the model has no SJD2 fine-tuning, or the levels leave no draft token clean or none noisy."""
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
                    "decoder.levels=slot with decoder.clean=0 keeps the first draft token noisy, so no pass commits more than "
                    f"AR's; set decoder.clean, e.g. to {window // 2}."
                )
        if self.levels == "slot" and self.clean >= window - 1:
            raise UserError(
                f"decoder.clean={self.clean} leaves no noisy slot in a window of {window}; that decoder is decoder=scd."
            )

    def bind(self, model: ImageModel, window: int) -> Denoiser:
        return Denoiser(self, model, window)


class Denoiser(Drafter):
    """`Denoise` on a model: its embedding space and the codes of its noise levels."""

    def __init__(self, settings: Denoise, model: ImageModel, window: int) -> None:
        adapter = model.adapter
        assert adapter is not None  # check() refuses a model without
        self.settings, self.model = settings, model
        self.space = EmbeddingSpace(model, normalised=adapter.settings.normalised)
        times = settings.schedule.times(settings.steps).to(self.space.table)
        self.moves = _moves(*alpha_sigma(times, adapter.settings.path))
        # with a single level, slots are noisy in their first pass alone: no noise lives on
        self.lasting = settings.steps > 1 or settings.levels == "slot"
        width = self.space.table.shape[1]
        if adapter.code is not None:
            self.codes = adapter.code(times).to(self.space.table)  # [K + 1, D]
        else:
            self.codes = torch.zeros(len(times), width).to(self.space.table)
            self.timesteps = self.space.model_input(sinusoid(times[1:], width)).to(model.dtype)  # [K, D]
        self.by_slot = self._levels_by_slot(window).to(self.space.table.device)  # [S]

    def _levels_by_slot(self, window: int) -> Tensor:
        """Return the level of each slot under levels=slot: [S]."""
        steps, clean = self.settings.steps, self.settings.clean
        slot = torch.arange(window)
        rise = (slot - clean).clamp(min=0) * steps + window - 2 - clean
        level = torch.div(rise, max(window - 1 - clean, 1), rounding_mode="floor").clamp(0, steps)
        return level * (slot > clean)

    def propose(self, carried: Draft, fresh: Tensor, state: State) -> Draft:
        """Denoise the slots that were there before by one step and start the fresh ones [B, S] as pure noise."""
        size, vocabulary = carried.tokens.shape[1], self.model.layout.vocabulary
        positions = state.positions(size)
        tokens = torch.where(fresh, state.noise.codes(positions, vocabulary), carried.tokens)
        assert carried.probs is not None  # the refiner records what it draws from (needs_records)
        probs = torch.where(fresh[:, 1:, None], 1.0 / vocabulary, carried.probs)
        old = torch.zeros_like(tokens) if carried.level is None else carried.level
        level = self._levels(old, probs, fresh, state, positions)
        latent = state.noise.normal(positions, self.space.table.shape[1])
        if carried.latent is not None:
            latent = torch.where(fresh[..., None], latent, self._denoise(carried.latent, tokens, old, level))
        if self.settings.nearest:
            tokens = torch.where(level > 0, self.space.nearest(latent), tokens)
        tokens = state.force(tokens)
        noisy = self.space.model_input(latent + self.codes[level])
        clean = self.model.embed(tokens)
        embeds = torch.where((level > 0)[..., None], noisy.to(clean.dtype), clean)
        return Draft(tokens, probs, embeds, level, latent if self.lasting else None, carried.shape)

    def _levels(self, old: Tensor, probs: Tensor, fresh: Tensor, state: State, positions: Tensor) -> Tensor:
        """Return the level of each slot in the coming pass: old [B, S] -> [B, S]."""
        settings = self.settings
        level = torch.minimum(self.by_slot, old) if settings.levels == "slot" else (old - 1).clamp(min=0)
        if settings.early is not None:
            sure = torch.nn.functional.pad(probs.amax(-1) >= settings.early, (1, 0))
            level = level.masked_fill(sure, 0)
        draft = torch.arange(old.shape[1], device=old.device) > 0
        drafted = draft & (positions >= state.committed[:, None]) & (state.forced_slots(old.shape[1]) < 0)
        return torch.where(fresh, settings.steps, level) * drafted

    def _denoise(self, latent: Tensor, tokens: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Step from level to level by DDIM: e' = (s'/s) e + (a' - a s'/s) e0, eq. 3 in a form that allows a = 0.

        tokens, old, new [B, S] -> [B, S, D]; e0 is the normalised embedding of each slot's present token.
        """
        ratio, pull = self.moves[new, old].split(1, -1)
        return ratio * latent + pull * self.space.normal(tokens)


def _moves(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return s'/s and a' - a s'/s of all pairs of levels: [K + 1] each -> [K + 1 new, K + 1 old, 2]; from clean, 0 and a'."""
    ratio = sigma[:, None] / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)
    ratio[:, 0] = 0.0
    return torch.stack([ratio, alpha[:, None] - alpha * ratio], -1)
