"""SJD2's fine-tuning: predict the next clean token from inputs that carry noise (arXiv 2510.08994, section 4.1).

# B samples, P prompt tokens, N image-phase tokens, L codes, K levels, T timestep tokens, V image vocabulary, D width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sjd2.decoding.sampling import draw
from sjd2.denoising.embedding_space import EmbeddingSpace
from sjd2.denoising.schedule import Schedule, alpha_sigma
from sjd2.errors import UserError, choose
from sjd2.finetune import distributed
from sjd2.finetune.data.sources import Collection, TokenData
from sjd2.finetune.distributed import shares
from sjd2.finetune.draws import Draws
from sjd2.finetune.objective import AT_ONCE, Objective, is_sharded, recompute, widen
from sjd2.finetune.recipe import ParallelRecipe, Training, positive
from sjd2.finetune.trainer import Metrics, Piece, step_rng
from sjd2.finetune.windows import Past, Segments, causal_mask, draw_segments, one_branch, window_mask
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.base import ImageModel
from sjd2.models.spec import ModelSpec
from sjd2.models.timesteps import Timesteps, sinusoid


@dataclass(kw_only=True)
class FinetuneSJD2(ParallelRecipe):
    """Next-clean-token prediction on any `ImageModel`: plain cross-entropy, noise on normalised embeddings.

    steps=None trains for `epochs` of the data, steps=0 writes the untrained adapter. levels: K is drawn from these per step.
    context: `windows` trains noisy windows after a clean copy of the image, which is what decoding feeds; `in_place` noises
    the one sequence (the paper). corrupt: largest share of wrong tokens in a window, drawn from the model's own
    distribution, since drafts are wrong before they are accepted. unconditional: share of empty prompts. shortest, longest:
    window lengths.
    """

    adapter: AdapterSettings
    data: TokenData
    steps: int | None = None
    epochs: float | None = None
    levels: tuple[int, ...] = (1, 2, 4)
    schedule: Schedule = field(default_factory=Schedule)
    context: str = "windows"
    corrupt: float = 0.5
    unconditional: float = 0.1
    shortest: int = 8
    longest: int = 40
    validation_images: int = 64

    fewest_steps: ClassVar[int] = 0

    def usage(self, result: Path) -> str:
        """Return the settings of a command that uses the result."""
        decoder = "sjd2" if self.adapter.kind == "lora" else "sjd2-paper"
        return f"decoder={decoder} model.adapter={result}"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("finetune.context", self.context, ("windows", "in_place"))
        positive(levels=min(self.levels))
        if self.steps is None and (self.epochs is None or self.epochs <= 0):
            raise UserError("finetune needs steps, or steps=null and epochs of more than 0.")
        if not 1 < self.shortest <= self.longest:
            raise UserError(f"finetune needs 1 < shortest <= longest, got {self.shortest} and {self.longest}.")
        if (self.context == "windows") != self.adapter.gated:
            raise UserError(
                "finetune.context=windows trains adapters that leave the clean path alone, so it goes with "
                "finetune.adapter.gated=true; for others use finetune.context=in_place."
            )
        if not 0 <= self.corrupt <= 1:
            raise UserError(f"finetune.corrupt is a share, 0 to 1, got {self.corrupt}.")

    def check(self, spec: ModelSpec) -> None:
        """Raise `UserError` if this training cannot work with the model, or its data is missing; loads nothing."""
        if self.adapter.kind == "full" and spec.quantisation is not None:
            raise UserError("quantised weights cannot be tuned in full; use model.quantisation=null or a LoRA.")
        super().check(spec)

    def num_steps(self) -> int:
        """Return the number of optimizer steps, from `epochs` where `steps` is None."""
        if self.steps is not None:
            return self.steps
        if not isinstance(self.data, Collection):
            raise UserError("finetune.epochs needs a set of images; give finetune.steps for data without an end.")
        return max(1, round((self.epochs or 0) * self.data.count() / self.batch_size))

    def build_training(self, model: ImageModel, *, out: Path, device: str, seed: int) -> Training:
        """Put an adapter into the model; the result's metrics are validation losses in nats, tuned and untuned."""
        self.num_steps()  # raises before anything is built
        model.adapter = adapter = Adapter(self.adapter, model).train()
        objective = self._objective(model, adapter)
        trained = [p for p in objective.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, betas=(0.9, 0.98), weight_decay=self.weight_decay)
        untuned = self.validate(model, seed, gate=False) if self.adapter.gated else {}

        def validate() -> Metrics:
            return self.validate(model, seed, through=objective)

        def finish(folder: Path) -> Metrics:
            adapter.save(folder, torch.bfloat16, write=distributed.first())
            return validate() | {f"{name}_untuned": value for name, value in untuned.items()}

        def loss(step: int) -> Iterator[Piece]:
            return self._pieces(model, objective, step, seed)

        return Training(module=objective, optimizers=[optimizer], loss=loss, validate=validate, finish=finish)

    def _objective(self, model: ImageModel, adapter: Adapter) -> Objective:
        """Join what is trained, make it trainable, and put it on the machine as asked for."""
        full = self.adapter.kind == "full"
        for parameter in adapter.trainable():
            parameter.requires_grad_(True)
        layers: Any = model.transformer.layers
        if self.machine.checkpointing:
            recompute(layers)
        heads = [model.head_module] if full and model.head_module is not None else []
        objective = Objective(adapter, *([model.transformer] if full else []), *heads)
        if full and distributed.joined():
            from sjd2.finetune.sharding import shard

            shard(objective, layers, model.device, self.bf16)
        else:
            widen(objective.parameters())
        return objective

    def _pieces(self, model: ImageModel, objective: Objective, step: int, seed: int) -> Iterator[Piece]:
        """Yield this process's micro-batches of a step: shares of the mean over all wanted tokens of the whole batch."""
        rng = step_rng(seed, step)
        data_seed = int(rng.integers(2**62))
        if isinstance(self.data, Collection):
            prompts, codes = self.data.shuffled(self.batch_size, step, seed)
        else:
            prompts, codes = self.data.batch(self.batch_size, data_seed)
        steps, count = None, None
        if self.machine.cuts:
            seeds = rng.integers(2**62, size=self.batch_size).tolist()
            steps = int(rng.choice(self.levels))
            count = self._count(model, seeds, steps)
        else:
            seeds = [int(rng.integers(2**62))]
        times = distributed.size() if is_sharded(objective) else 1  # FSDP averages gradients over processes
        for rows, weight in shares(self.batch_size, self.machine.micro_batch):
            given = (prompts[rows], codes[rows], seeds[rows])
            value = objective(lambda given=given: self.loss(model, *given, steps=steps, count=count))
            yield value * (weight * times), {"loss": value.detach() * weight}

    @torch.no_grad()
    def validate(
        self,
        model: ImageModel,
        seed: int,
        gate: bool = True,
        through: Callable[[Callable[[], Tensor]], Tensor] | None = None,
    ) -> dict[str, float]:
        """Measure the loss on held-out images for each K in `levels`, in nats per noisy slot; gate=False: untuned.

        through: the objective that makes sharded weights whole.
        """
        through = through or (lambda compute: compute())
        prompts, codes = self.data.batch(self.validation_images, seed, held_out=True)
        metrics = dict.fromkeys((f"val_loss_k{steps}" for steps in self.levels), 0.0)
        for steps in dict.fromkeys(self.levels):
            seeds, count = [seed], None
            if self.machine.cuts:
                seeds = step_rng(seed, steps, purpose=2).integers(2**62, size=len(prompts)).tolist()
                count = self._count(model, seeds, steps)
            for rows, weight in shares(len(prompts), self.machine.micro_batch):
                given = {"steps": steps, "gate": gate, "count": count}
                with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
                    value = through(
                        lambda rows=rows, seeds=seeds, given=given: self.loss(
                            model, prompts[rows], codes[rows], seeds[rows], **given
                        )
                    )
                metrics[f"val_loss_k{steps}"] += float(value) * weight
        return distributed.total(metrics)

    def loss(
        self,
        model: ImageModel,
        prompts: list[str],
        codes: Tensor,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        gate: bool = True,
        count: int | None = None,
    ) -> Tensor:
        """Return the mean cross-entropy of the clean next token given noisy inputs: codes [B, L] -> scalar.

        seeds: one, or one per sample. steps: K (None: drawn from `levels`). gate=False leaves the adapter out. count: divide
        the sum by this number of tokens instead of this batch's own.
        """
        draws = Draws(seeds, len(codes))
        tokens = model.layout.tokens(codes.to(model.device))
        n = tokens.shape[1]
        free = model.layout.free.to(tokens.device)
        if steps is None:
            steps = self.levels[draws.index(len(self.levels))]
        segments = self._segments(draws, n, steps)
        first = segments.first.to(tokens.device)
        level = segments.level.to(tokens.device) * free  # forced tokens carry no noise
        prompt, lengths = one_branch(model, prompts, draws.rand() < self.unconditional)
        past: Any = None
        drafts = tokens
        if self.context == "windows" or self.corrupt:
            clean, hidden = self._clean_pass(model, tokens, prompt, lengths)
            past = clean if self.context == "windows" else None
            drafts = torch.where(free, self._corrupt(model, tokens, hidden, first, draws), tokens)
        space = self._space(model)
        x = self._noisy(model, space, drafts, level, steps, draws)
        place = model.image_start(lengths)[:, None] + torch.arange(n, device=tokens.device)
        x, positions, attn_mask, noisy = self._sequence(x, place, level > 0, first, prompt, lengths)
        timesteps = self._timesteps(model, space, level, lengths, steps, x)
        hidden = model.forward(x, positions, past, attn_mask, noisy if gate else None, timesteps)[:, -n:-1]
        wanted = self._wanted(level, free)
        return _cross_entropy(model, hidden[wanted], tokens[:, 1:][wanted], count)

    def _sequence(
        self, x: Tensor, place: Tensor, noisy: Tensor, first: Tensor, prompt: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lay out a pass: windows that follow the clean image, or the prompt and the noisy image as one sequence.

        x [B, N, D], place, noisy, first [B, N], prompt [B, P, D] -> inputs, positions, attention mask, noisy slots.
        """
        rows, width = prompt.shape[:2]
        if self.context == "windows":
            return x, place, window_mask(lengths, width, first), noisy
        start = torch.arange(width, device=x.device).expand(rows, -1)
        return (
            torch.cat([prompt, x], 1),
            torch.cat([start, place], 1),
            causal_mask(lengths, width, x.shape[1]),
            torch.cat([torch.zeros_like(start, dtype=torch.bool), noisy], 1),
        )

    def _segments(self, draws: Draws, n: int, steps: int) -> Segments:
        """Cut the images of all samples into windows."""
        longest = min(self.longest, n)
        parts = [
            draw_segments(draws.rows, n, steps, shortest=self.shortest, longest=longest, generator=stream)
            for stream in draws.streams
        ]
        return Segments(torch.cat([part.first for part in parts]), torch.cat([part.level for part in parts]))

    def _wanted(self, level: Tensor, free: Tensor) -> Tensor:
        """Return which tokens 1.. are predicted: bool [B, N - 1]; with a clean copy of the image only those after noise."""
        wanted = free[1:].expand(len(level), -1)
        return wanted & (level > 0)[:, :-1] if self.context == "windows" else wanted

    def _count(self, model: ImageModel, seeds: Sequence[int], steps: int) -> int:
        """Return how many tokens a whole batch predicts, one seed per sample, without running it."""
        free = model.layout.free
        level = self._segments(Draws(seeds, len(seeds)), len(free), steps).level * free
        return int(self._wanted(level, free).sum())

    def _space(self, model: ImageModel) -> EmbeddingSpace:
        """Return the space of the noise; its mean and deviation are constants to the gradient."""
        with torch.no_grad():
            return EmbeddingSpace(model, normalised=self.adapter.normalised)

    @torch.no_grad()
    def _clean_pass(self, model: ImageModel, tokens: Tensor, prompt: Tensor, lengths: Tensor) -> tuple[Past, Tensor]:
        """Run the clean image once without a gradient -> (its keys and values, the states before tokens 1.. [B, N - 1, D])."""
        rows, n = tokens.shape
        width = prompt.shape[1]
        cache = model.cache(rows, width + n)
        start = torch.arange(width, device=tokens.device).expand(rows, -1)
        positions = torch.cat([start, model.image_start(lengths)[:, None] + torch.arange(n, device=tokens.device)], 1)
        x = torch.cat([prompt, model.embed(tokens)], 1)
        hidden = model.forward(x, positions, cache, causal_mask(lengths, width, n))
        return Past.of(cache, width + n), hidden[:, width:-1]

    @torch.no_grad()
    def _corrupt(self, model: ImageModel, tokens: Tensor, hidden: Tensor, first: Tensor, draws: Draws) -> Tensor:
        """Replace tokens in windows by draws from the model's own distribution, more of them further from the start.

        hidden [B, N - 1, D]: the clean states before tokens 1..
        """
        rows, n = tokens.shape
        if not self.corrupt:
            return tokens
        u = draws.rand(n - 1).clamp(1e-6, 1 - 1e-6).to(tokens.device)
        size = max(1, AT_ONCE // (rows * model.layout.vocabulary))
        probs = (model.logits(part).softmax(-1) for part in hidden.split(size, 1))
        drawn = torch.cat([draw(p, part.to(p)) for p, part in zip(probs, u.split(size, 1), strict=True)], 1)
        distance = (torch.arange(n) - first.cpu()).float()
        rate = self.corrupt * draws.rand(1) * (distance / 4).clamp(max=1)
        wrong = (draws.rand(n) < rate).to(tokens.device)
        wrong[:, 0] = False  # no distribution was computed for the first token
        return torch.where(wrong, torch.cat([tokens[:, :1], drawn], 1), tokens)

    def _noisy(
        self, model: ImageModel, space: EmbeddingSpace, tokens: Tensor, level: Tensor, steps: int, draws: Draws
    ) -> Tensor:
        """Return the inputs of the windows, noisy where the level is above 0: [B, N, D]."""
        times = self.schedule.times(steps).to(tokens.device)
        alpha, sigma = alpha_sigma(times, self.adapter.path)
        clean = model.embed(tokens)
        # tuned in full, embeddings learn from noisy slots too; else the table is a constant
        full = self.adapter.kind == "full"
        e = (clean.to(space.mean) - space.mean) / space.std if full else space.normal(tokens)
        eps = draws.randn(*e.shape[1:], device=tokens.device).to(e)
        e = alpha[level][..., None] * e + sigma[level][..., None] * eps
        if model.adapter is not None and model.adapter.code is not None:
            e = e + model.adapter.code(times)[level]
        return torch.where((level > 0)[..., None], space.model_input(e).to(clean.dtype), clean)

    def _timesteps(
        self, model: ImageModel, space: EmbeddingSpace, level: Tensor, lengths: Tensor, steps: int, x: Tensor
    ) -> Timesteps | None:
        """Return the tokens that code=appended puts after inputs x, of which the last slots have the levels: [B, N]."""
        if self.adapter.code != "appended":
            return None
        times = self.schedule.times(steps)[1:].to(x.device)
        tokens = space.model_input(sinusoid(times, x.shape[2])).to(x.dtype)
        level = nn.functional.pad(level, (x.shape[1] - level.shape[1], 0))
        return Timesteps(tokens, level, model.image_start(lengths))


def _cross_entropy(model: ImageModel, hidden: Tensor, target: Tensor, count: int | None) -> Tensor:
    """Return the cross-entropy of states [M, D] and tokens [M], summed / `count` (None: M); large logits are recomputed."""
    size = max(1, AT_ONCE // model.layout.vocabulary)
    if len(target) <= size and count is None:
        return nn.functional.cross_entropy(model.logits(hidden), target)

    def part(states: Tensor, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model.logits(states), tokens, reduction="sum")

    pairs = list(zip(hidden.split(size), target.split(size), strict=True))
    sums = [part(*pair) if len(pairs) == 1 else checkpoint(part, *pair, use_reentrant=False) for pair in pairs]
    return torch.stack(sums).sum() / (count or len(target))
