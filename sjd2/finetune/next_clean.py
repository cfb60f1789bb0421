"""SJD2's fine-tuning: predict the next clean token from inputs that carry noise (arXiv 2510.08994, section 4.1).

# B samples, P prompt tokens, N image-phase tokens, K levels, T timestep tokens, V image vocabulary, D width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from sjd2.adapters import Adapter, AdapterSettings
from sjd2.denoising.schedule import Schedule, alpha_sigma
from sjd2.denoising.space import EmbeddingSpace, sinusoid
from sjd2.errors import UserError, choose
from sjd2.finetune.loop import step_rng, train, warmup_decay
from sjd2.finetune.windows import Segments, draw_segments, in_place_mask, window_mask
from sjd2.models.base import Backbone


class TokenData(Protocol):
    """Captioned images as tokens; a pure function of the seed, so that a resumed run sees what an undisturbed one sees."""

    def batch(self, n: int, seed: int, held_out: bool = False) -> tuple[list[str], Tensor]:
        """Return n captions and codes [n, rows * columns]."""
        ...


@dataclass(kw_only=True)
class FinetuneSJD2:
    """Next-clean-token prediction on any `ImageModel`: plain cross-entropy, noise on normalised embeddings.

    steps, batch_size, lr, warmup, decay, weight_decay: AdamW. levels: K is drawn from these per step.
    context: `windows` trains noisy windows behind a clean copy of the image, which is what decoding feeds; `in_place` noises
    the one sequence (the paper). corrupt: largest share of wrong tokens in a window, drawn from the model's own law, since
    drafts are wrong before they are accepted. unconditional: share of empty prompts. shortest, longest: window lengths.
    """

    adapter: AdapterSettings
    data: TokenData
    steps: int
    batch_size: int
    lr: float
    warmup: int = 50
    decay: float = 0.6
    weight_decay: float = 0.0
    levels: tuple[int, ...] = (1, 2, 4)
    schedule: Schedule = field(default_factory=Schedule)
    context: str = "windows"
    corrupt: float = 0.5
    unconditional: float = 0.1
    shortest: int = 8
    longest: int = 40
    bf16: bool = False
    validate_every: int = 200
    validation_images: int = 64

    needs_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choose("finetune.context", self.context, ("windows", "in_place"))
        if min(self.steps, self.batch_size, *self.levels) < 1:
            raise UserError("finetune.steps, finetune.batch_size and finetune.levels must be 1 or more.")
        if not 1 < self.shortest <= self.longest:
            raise UserError(f"finetune needs 1 < shortest <= longest, got {self.shortest} and {self.longest}.")
        if not 0 <= self.corrupt <= 1:
            raise UserError(f"finetune.corrupt is a share, 0 to 1, got {self.corrupt}.")

    def run(
        self,
        *,
        model: Backbone,
        out: Path,
        log: Callable[[int, dict[str, float]], None] | None,
        device: str,
        seed: int,
    ) -> dict[str, float]:
        """Train and write the adapter to out/final/; return validation losses in nats, tuned and untuned."""
        torch.manual_seed(seed)
        # statistics of the untuned embeddings: full fine-tuning moves the table, and inference reads the saved one
        model.adapter = adapter = Adapter(self.adapter, model).train()
        trainable = adapter.trainable()
        for parameter in trainable:
            parameter.requires_grad_(True)
        module = nn.ModuleList([adapter, *([model.decoder, model.head_module] if self.adapter.kind == "full" else [])])
        optimizer = torch.optim.AdamW(trainable, lr=self.lr, betas=(0.9, 0.98), weight_decay=self.weight_decay)

        def loss(step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
            rng = step_rng(seed, step)
            prompts, codes = self.data.batch(self.batch_size, int(rng.integers(2**62)))
            return self.loss(model, prompts, codes, int(rng.integers(2**62))), {}

        def after(done: int) -> dict[str, float]:
            return self.validate(model, seed) if done % self.validate_every == 0 or done == self.steps else {}

        untuned = self.validate(model, seed, gate=False) if self.adapter.gated else {}
        train(
            module, loss, [optimizer], steps=self.steps, out=out, seed=seed, log=log,
            schedule=warmup_decay(self.steps, self.warmup, self.decay), bf16=self.bf16, after=after,
        )  # fmt: skip
        adapter.save(out / "final", torch.bfloat16)
        return self.validate(model, seed) | {f"{name}_untuned": value for name, value in untuned.items()}

    @torch.no_grad()
    def validate(self, model: Backbone, seed: int, gate: bool = True) -> dict[str, float]:
        """Measure the loss on held-out images for each K in `levels`, in nats per noisy slot; gate=False: untuned."""
        prompts, codes = self.data.batch(self.validation_images, seed, held_out=True)
        return {
            f"val_loss_k{steps}": float(self.loss(model, prompts, codes, seed, steps=steps, gate=gate))
            for steps in self.levels
        }

    def loss(
        self, model: Backbone, prompts: list[str], codes: Tensor, seed: int, *, steps: int | None = None, gate: bool = True
    ) -> Tensor:
        """Return the mean cross-entropy of the clean next token at noisy slots: codes [B, rows * columns] -> scalar."""
        generator = torch.Generator().manual_seed(seed)
        tokens = model.layout.tokens(codes.to(model.device))
        rows, n = tokens.shape
        if steps is None:
            steps = self.levels[int(torch.randint(len(self.levels), (), generator=generator))]
        segments = draw_segments(
            rows, n, steps, shortest=self.shortest, longest=min(self.longest, n), generator=generator
        )
        first = segments.first.to(tokens.device)
        level = segments.level.to(tokens.device) * model.layout.free.to(tokens.device)  # forced tokens carry no noise
        space = EmbeddingSpace(model, normalised=self.adapter.normalised)
        prompt, lengths = self._prompts(model, prompts, generator)
        drafts = self._corrupt(model, tokens, prompt, lengths, segments, generator)
        noisy = self._noisy(model, space, drafts, level, steps, generator)
        clean = model.embed(tokens)
        width = prompt.shape[1]
        place = lengths[:, None] + torch.arange(n, device=tokens.device)
        start = torch.arange(width, device=tokens.device).expand(rows, -1)
        if self.context == "windows":
            x, positions = torch.cat([prompt, clean, noisy], 1), torch.cat([start, place, place], 1)
            visible = window_mask(lengths, width, first)
        else:
            x, positions = torch.cat([prompt, noisy], 1), torch.cat([start, place], 1)
            visible = in_place_mask(lengths, width, n)
        act = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        act[:, -n:] = level > 0
        if self.adapter.code == "appended":
            x, positions, visible, act = self._append(space, x, positions, visible, act, level, lengths, steps)
        hidden = model.forward(x, positions, None, visible, act if gate else torch.zeros_like(act))
        end = x.shape[1] - (steps if self.adapter.code == "appended" else 0)
        wanted = ((level > 0) if self.context == "windows" else torch.ones_like(level, dtype=torch.bool))[:, :-1]
        wanted = wanted & model.layout.free.to(tokens.device)[1:]
        logits = model.logits(hidden[:, end - n : end - 1][wanted])
        return nn.functional.cross_entropy(logits, tokens[:, 1:][wanted])

    def _prompts(self, model: Backbone, prompts: list[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Encode prompts, a share of them replaced by the unconditional one: [B, P, D], [B]."""
        condition = model.encode(prompts)
        drop = (torch.rand(len(prompts), generator=generator) < self.unconditional).to(model.device)
        width = max(condition.embeds.shape[1], condition.uncond_embeds.shape[1])
        pad = [nn.functional.pad(e, (0, 0, 0, width - e.shape[1])) for e in (condition.embeds, condition.uncond_embeds)]
        lengths = torch.where(drop, condition.uncond_lengths, condition.lengths)
        return torch.where(drop[:, None, None], pad[1], pad[0]), lengths

    @torch.no_grad()
    def _corrupt(
        self,
        model: Backbone,
        tokens: Tensor,
        prompt: Tensor,
        lengths: Tensor,
        segments: Segments,
        generator: torch.Generator,
    ) -> Tensor:
        """Replace tokens in windows by draws from the model's own law, more of them further from the window's start."""
        if self.corrupt == 0:
            return tokens
        rows, n = tokens.shape
        x = torch.cat([prompt, model.embed(tokens)], 1)
        place = lengths[:, None] + torch.arange(n, device=tokens.device)
        positions = torch.cat([torch.arange(prompt.shape[1], device=x.device).expand(rows, -1), place], 1)
        hidden = model.forward(x, positions, None, in_place_mask(lengths, prompt.shape[1], n))
        law = model.logits(hidden[:, -n:-1]).softmax(-1)
        gumbel = -torch.log(-torch.log(torch.rand(law.shape, generator=generator).clamp(1e-20, 1 - 1e-7)))
        drawn = (law.log() + gumbel.to(law)).argmax(-1)
        distance = torch.arange(n) - segments.first
        rate = self.corrupt * torch.rand(rows, 1, generator=generator) * (distance / 4).clamp(max=1)
        wrong = (torch.rand(rows, n, generator=generator) < rate).to(tokens.device)
        wrong[:, 0] = False
        return torch.where(
            wrong & model.layout.free.to(tokens.device), torch.cat([tokens[:, :1], drawn], 1), tokens
        )

    def _noisy(
        self, model: Backbone, space: EmbeddingSpace, tokens: Tensor, level: Tensor, steps: int, generator: torch.Generator
    ) -> Tensor:
        """Return the inputs of the windows, noisy where the level says so: [B, N, D]."""
        times = self.schedule.times(steps).to(tokens.device)
        alpha, sigma = alpha_sigma(times, self.adapter.path)
        e = space.normal(tokens)
        eps = torch.randn(e.shape, generator=generator).to(e)
        e = alpha[level][..., None] * e + sigma[level][..., None] * eps
        if model.adapter.code is not None:
            e = e + model.adapter.code(times)[level]
        clean = model.embed(tokens)
        return torch.where((level > 0)[..., None], space.model_input(e).to(clean.dtype), clean)

    def _append(
        self,
        space: EmbeddingSpace,
        x: Tensor,
        positions: Tensor,
        visible: Tensor,
        act: Tensor,
        level: Tensor,
        lengths: Tensor,
        steps: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Append the paper's timestep tokens [T]; the noisy slots see their own level's, the tokens only themselves."""
        rows, size = x.shape[:2]
        codes = space.model_input(sinusoid(self.schedule.times(steps)[1:].to(x.device), x.shape[2])).to(x.dtype)
        x = torch.cat([x, codes.expand(rows, -1, -1)], 1)
        positions = torch.cat([positions, lengths[:, None].expand(-1, steps)], 1)
        own = torch.zeros(rows, size, steps, dtype=torch.bool, device=x.device)
        own[:, -level.shape[1] :] = level[..., None] == torch.arange(1, steps + 1, device=x.device)
        below = torch.cat([own.new_zeros(steps, size), torch.eye(steps, dtype=torch.bool, device=x.device)], 1)
        visible = torch.cat([torch.cat([visible, own], 2), below.expand(rows, -1, -1)], 1)
        return x, positions, visible, torch.cat([act, act.new_ones(rows, steps)], 1)
