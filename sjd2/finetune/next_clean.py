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
from sjd2.cache import RowCache
from sjd2.denoising.schedule import Schedule, alpha_sigma
from sjd2.denoising.space import EmbeddingSpace, sinusoid
from sjd2.errors import UserError, choose
from sjd2.finetune.loop import step_rng, train, warmup_decay
from sjd2.finetune.windows import causal_mask, draw_segments, window_mask
from sjd2.models.base import Backbone
from sjd2.sampling import draw


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
        if min(self.steps, self.batch_size, self.validate_every, *self.levels) < 1:
            raise UserError("finetune.steps, batch_size, validate_every and levels must be 1 or more.")
        if not 1 < self.shortest <= self.longest:
            raise UserError(f"finetune needs 1 < shortest <= longest, got {self.shortest} and {self.longest}.")
        if (self.context == "windows") != self.adapter.gated:
            raise UserError(
                "finetune.context=windows trains adapters that leave the clean path alone, so it goes with "
                "finetune.adapter.gated=true; for others use finetune.context=in_place."
            )
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
        attention = model.decoder.config._attn_implementation
        if model.device.type == "cpu":  # torch's fused attention is several times slower backwards on a CPU
            model.decoder.set_attn_implementation("eager")
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
        figures = self.validate(model, seed)
        model.decoder.set_attn_implementation(attention)
        return figures | {f"{name}_untuned": value for name, value in untuned.items()}

    @torch.no_grad()
    def validate(self, model: Backbone, seed: int, gate: bool = True) -> dict[str, float]:
        """Measure the loss on held-out images for each K in `levels`, in nats per noisy slot; gate=False: untuned."""
        prompts, codes = self.data.batch(self.validation_images, seed, held_out=True)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
            return {
                f"val_loss_k{steps}": float(self.loss(model, prompts, codes, seed, steps=steps, gate=gate))
                for steps in self.levels
            }

    def loss(
        self,
        model: Backbone,
        prompts: list[str],
        codes: Tensor,
        seed: int,
        *,
        steps: int | None = None,
        gate: bool = True,
    ) -> Tensor:
        """Return the mean cross-entropy of the clean next token behind noisy inputs: codes [B, rows * columns] -> scalar.

        steps: K (None: drawn from `levels`). gate=False leaves the adapter out.
        """
        generator = torch.Generator().manual_seed(seed)
        tokens = model.layout.tokens(codes.to(model.device))
        rows, n = tokens.shape
        free = model.layout.free.to(tokens.device)
        if steps is None:
            steps = self.levels[int(torch.randint(len(self.levels), (), generator=generator))]
        longest = min(self.longest, n)
        segments = draw_segments(rows, n, steps, shortest=self.shortest, longest=longest, generator=generator)
        first = segments.first.to(tokens.device)
        level = segments.level.to(tokens.device) * free  # forced tokens carry no noise
        prompt, lengths = self._prompts(model, prompts, generator)
        width = prompt.shape[1]
        cache, law = self._clean_pass(model, tokens, prompt, lengths, steps)
        drafts = torch.where(free, self._corrupt(tokens, law, first, generator), tokens)
        x = self._noisy(model, drafts, level, steps, generator)
        place = lengths[:, None] + torch.arange(n, device=tokens.device)
        act = level > 0
        if self.context == "windows":
            positions, visible = place, window_mask(lengths, width, first)
        else:
            cache = None
            start = torch.arange(width, device=tokens.device).expand(rows, -1)
            x, positions = torch.cat([prompt, x], 1), torch.cat([start, place], 1)
            visible = causal_mask(lengths, width, n)
            act = torch.cat([torch.zeros_like(start, dtype=torch.bool), act], 1)
        if self.adapter.code == "appended":
            x, positions, visible, act = self._append(model, x, positions, visible, act, level, lengths, steps)
        hidden = model.forward(x, positions, cache, visible, act if gate else None)
        hidden = hidden[:, : hidden.shape[1] - (steps if self.adapter.code == "appended" else 0)][:, -n:-1]
        wanted = free[1:].expand(rows, -1)
        if self.context == "windows":
            wanted = wanted & (level > 0)[:, :-1]
        return nn.functional.cross_entropy(model.logits(hidden[wanted]), tokens[:, 1:][wanted])

    @torch.no_grad()
    def _clean_pass(
        self, model: Backbone, tokens: Tensor, prompt: Tensor, lengths: Tensor, steps: int
    ) -> tuple[RowCache, Tensor]:
        """Run the clean image once without a gradient -> (its keys and values, the law of tokens 1.. [B, N - 1, V])."""
        rows, n = tokens.shape
        width = prompt.shape[1]
        cache = model.cache(rows, width + 2 * n + steps)
        start = torch.arange(width, device=tokens.device).expand(rows, -1)
        positions = torch.cat([start, lengths[:, None] + torch.arange(n, device=tokens.device)], 1)
        x = torch.cat([prompt, model.embed(tokens)], 1)
        hidden = model.forward(x, positions, cache, causal_mask(lengths, width, n))
        cache.lengths = cache.lengths + width + n
        return cache, model.logits(hidden[:, width:-1]).softmax(-1)

    def _prompts(self, model: Backbone, prompts: list[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Encode prompts, a share of them replaced by the unconditional one: [B, P, D], [B]."""
        condition = model.encode(prompts)
        drop = (torch.rand(len(prompts), generator=generator) < self.unconditional).to(model.device)
        width = max(condition.embeds.shape[1], condition.uncond_embeds.shape[1])
        pad = [nn.functional.pad(e, (0, 0, 0, width - e.shape[1])) for e in (condition.embeds, condition.uncond_embeds)]
        lengths = torch.where(drop, condition.uncond_lengths, condition.lengths)
        return torch.where(drop[:, None, None], pad[1], pad[0]), lengths

    def _corrupt(self, tokens: Tensor, law: Tensor, first: Tensor, generator: torch.Generator) -> Tensor:
        """Replace tokens in windows by draws from the model's own law [B, N - 1, V], more of them further from the start."""
        rows, n = tokens.shape
        drawn = draw(law, torch.rand(rows, n - 1, generator=generator).clamp(1e-6, 1 - 1e-6).to(law))
        distance = (torch.arange(n) - first.cpu()).float()
        rate = self.corrupt * torch.rand(rows, 1, generator=generator) * (distance / 4).clamp(max=1)
        wrong = (torch.rand(rows, n, generator=generator) < rate).to(tokens.device)
        wrong[:, 0] = False  # no law was computed for the first token
        return torch.where(wrong, torch.cat([tokens[:, :1], drawn], 1), tokens)

    def _noisy(self, model: Backbone, tokens: Tensor, level: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        """Return the inputs of the windows, noisy where the level says so: [B, N, D]."""
        space = EmbeddingSpace(model, normalised=self.adapter.normalised)
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
        model: Backbone,
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
        space = EmbeddingSpace(model, normalised=self.adapter.normalised)
        codes = space.model_input(sinusoid(self.schedule.times(steps)[1:].to(x.device), x.shape[2])).to(x.dtype)
        x = torch.cat([x, codes.expand(rows, -1, -1)], 1)
        positions = torch.cat([positions, lengths[:, None].expand(-1, steps)], 1)
        own = torch.zeros(rows, size, steps, dtype=torch.bool, device=x.device)
        own[:, -level.shape[1] :] = level[..., None] == torch.arange(1, steps + 1, device=x.device)
        seen = visible.shape[2]
        below = torch.cat([own.new_zeros(steps, seen), torch.eye(steps, dtype=torch.bool, device=x.device)], 1)
        visible = torch.cat([torch.cat([visible, own], 2), below.expand(rows, -1, -1)], 1)
        return x, positions, visible, torch.cat([act, act.new_ones(rows, steps)], 1)
