"""Training of the front corrector: raise the overlap of the corrected distribution with the true one.

# M pairs, N image-phase tokens, V image vocabulary, D width
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sjd2.decoding.sampling import SamplingParams
from sjd2.finetune.data.generated import Generated, sampling_at
from sjd2.finetune.front_pairs import FrontPairs, join, make_pairs, probs_of
from sjd2.finetune.recipe import FinetuneRecipe, Training, positive
from sjd2.finetune.trainer import Metrics, Piece, step_rng
from sjd2.front.corrector import Corrector, FrontSettings, embedding_width
from sjd2.models.base import ImageModel

CHUNK = 16  # images that are run through the model together


@dataclass(kw_only=True)
class FinetuneFront(FinetuneRecipe):
    """Train a `Corrector` on the model's own images with the total variation between distributions as the loss.

    batch_size: image tokens per step, each with three pairs. muon_lr: of the matrices; adam_lr: of all other weights. ema:
    decay per step of the averaged weights, which are validated and written.
    images: images whose pairs are made together and trained on for `round_steps` steps; then come others.
    """

    corrector: FrontSettings
    data: Generated
    steps: int
    images: int
    round_steps: int
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    warmup: int = 20
    ema: float = 0.99
    validation_images: int = 64

    def usage(self, result: Path) -> str:
        """Return the settings of a command that uses the result."""
        return f"decoder=sjd-fc decoder.drafter.weights={result}"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(images=self.images, round_steps=self.round_steps, validation_images=self.validation_images)

    def build_training(self, model: ImageModel, *, out: Path, device: str, seed: int) -> Training:
        """Build a corrector, exported to out/latest/ at each validation; its metrics are its overlaps."""
        corrector = Corrector(self.corrector, embedding_width(model)).to(model.device).train()
        average = AveragedModel(corrector, multi_avg_fn=get_ema_multi_avg_fn(self.ema)).requires_grad_(False)
        averaged = cast(Corrector, average.module)
        held_out = self.pairs(model, self.validation_images, seed, held_out=True)
        now: dict[int, FrontPairs] = {}

        def loss(step: int) -> Piece:
            number = step // self.round_steps
            if number not in now:
                now.clear()
                now[number] = self.pairs(model, self.images, int(step_rng(seed, number, 2).integers(2**62)))
            places, rng = self._places(model), step_rng(seed, step)
            image = torch.from_numpy(rng.integers(self.images, size=self.batch_size)).to(places.device)
            place = places[torch.from_numpy(rng.integers(len(places), size=self.batch_size)).to(places.device)]
            return self.loss(model, corrector, now[number], image, place), {}

        def after_step(done: int) -> None:
            average.update_parameters(corrector)
            if self.due(done):
                averaged.save(out / "latest")

        def validate() -> Metrics:
            return self.validate(model, averaged, held_out)

        def finish(folder: Path) -> Metrics:
            averaged.save(folder)
            return validate()

        return Training(
            module=nn.ModuleDict({"corrector": corrector, "average": average}),
            optimizers=self._optimizers(corrector),
            loss=loss,
            validate=validate,
            finish=finish,
            after_step=after_step,
        )

    def _optimizers(self, corrector: Corrector) -> list[torch.optim.Optimizer]:
        """Give the matrices to Muon, and biases and the zero-initialised last layer to AdamW."""
        last = set(corrector.out.parameters())
        matrices = [p for p in corrector.parameters() if p.ndim == 2 and p not in last]
        others = [p for p in corrector.parameters() if p.ndim != 2 or p in last]
        return [
            torch.optim.Muon(matrices, lr=self.muon_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=self.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def pairs(self, model: ImageModel, images: int, seed: int, held_out: bool = False) -> FrontPairs:
        """Make the pairs of so many images; a pure function of the seed."""
        prompts, codes, scales = self.data.scaled(images, seed, held_out)
        tokens = model.layout.tokens(codes.to(model.device))
        generator = torch.Generator().manual_seed(seed % 2**62)

        def uniform(shape: torch.Size) -> Tensor:
            return torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(model.device)

        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
            return join(
                [
                    make_pairs(
                        model, prompts[i : i + CHUNK], tokens[i : i + CHUNK], scales[i : i + CHUNK].to(model.device),
                        self._samplings(model), uniform,
                    )
                    for i in range(0, len(prompts), CHUNK)
                ]
            )  # fmt: skip

    def _samplings(self, model: ImageModel) -> dict[float, SamplingParams]:
        return {scale: sampling_at(model, scale) for scale in self.data.scales}

    def _places(self, model: ImageModel) -> Tensor:
        """Return the tokens that can be replaced and whose successor the model chooses."""
        free = model.layout.free
        return (free[:-1] & free[1:]).nonzero()[:, 0].to(model.device)

    def corrected(
        self, model: ImageModel, corrector: Corrector, pairs: FrontPairs, image: Tensor, place: Tensor
    ) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Correct the states after tokens `place` [M] of images [M] -> kind: (corrected, stale, true [2M, D], counts [M]).

        other: after another draw; d1: after a rejected draft; d2: one position on, where two tokens are replaced and the
        source is the corrected state of d1. Rows are branch after branch; counts says which pairs exist.
        """
        n = pairs.tokens.shape[1]

        def states(field: Tensor, at: Tensor) -> Tensor:
            return field[image, :, at].transpose(0, 1).flatten(0, 1).to(model.dtype)

        def embed(tokens: Tensor, at: Tensor) -> Tensor:
            return model.embed(tokens[image, at]).repeat(2, 1)

        def correct(old: Tensor, stale: Tensor, source: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            before = states(stale, at)
            hidden = corrector(before, source, embed(old, at), embed(pairs.tokens, at))
            after = (at + 1).clamp(max=n - 1)
            counts = (at + 1 < n) & model.layout.free.to(at.device)[after]
            return hidden, before, states(pairs.hidden, at + 1), counts

        source = states(pairs.hidden, place)
        found = {"other": correct(pairs.other, pairs.other_stale, source, place)}
        found["d1"] = correct(pairs.old, pairs.old_stale, source, place)
        found["d2"] = correct(pairs.second, pairs.second_stale, found["d1"][0], place + 1)
        return found

    def loss(self, model: ImageModel, corrector: Corrector, pairs: FrontPairs, image: Tensor, place: Tensor) -> Tensor:
        """Return the total variation between corrected and true probs, averaged over pairs, kinds and guidance scales."""
        losses = []
        for hidden, _, true, counts in self.corrected(model, corrector, pairs, image, place).values():
            with torch.autocast(hidden.device.type, enabled=False):  # logits of bfloat16 are coarse
                for sampling in self._samplings(model).values():
                    overlap = _overlap(model, hidden.to(true), true, sampling)
                    losses.append(((1 - overlap) * counts).sum() / counts.sum().clamp(min=1))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def validate(self, model: ImageModel, corrector: Corrector, pairs: FrontPairs) -> dict[str, float]:
        """Measure 1 - TV as decoding meets it, each scale on the images drawn under it; stale_*: without the corrector."""
        places = self._places(model)
        sums: dict[str, list[Tensor]] = {}
        for i in range(0, len(pairs), CHUNK):
            image = torch.arange(i, min(i + CHUNK, len(pairs)), device=places.device).repeat_interleave(len(places))
            place = places.repeat(len(image) // len(places))
            found = self.corrected(model, corrector, pairs, image, place)
            for scale, sampling in self._samplings(model).items():
                weight = pairs.weight[image, place] * (pairs.scales[image] == scale)
                for kind in ("d1", "d2"):
                    hidden, stale, true, counts = found[kind]
                    for name, state in (("overlap", hidden), ("stale", stale)):
                        value = _overlap(model, state.to(true), true, sampling)
                        total = torch.stack([(value * weight * counts).sum(), (weight * counts).sum()])
                        sums.setdefault(f"{name}_g{scale:g}_{kind}", []).append(total)
        totals = {name: torch.stack(parts).sum(0) for name, parts in sums.items()}
        return {name: float(total[0] / total[1].clamp(min=1e-6)) for name, total in totals.items()}


def _overlap(model: ImageModel, hidden: Tensor, true: Tensor, sampling: SamplingParams) -> Tensor:
    """Return 1 - TV between the distributions of two states [2M, D] -> [M]."""
    return torch.minimum(probs_of(model, hidden, sampling), probs_of(model, true, sampling)).sum(-1)
