"""EAGLE's training: the head learns the model's states one token ahead, from its own predictions too if it is unrolled.

# B samples, R rows, P prompt tokens, N image-phase tokens, L codes of an image, V image vocabulary, D width
Pair j of an image joins token x_j with the state that predicted it, H_j, to predict H_{j+1}: the distribution of x_{j+1}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from baselines.eagle.head import EagleHead, EagleSettings
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError, choose
from sjd2.finetune import distributed
from sjd2.finetune.data.sources import ScaledData
from sjd2.finetune.distributed import shares
from sjd2.finetune.draws import Draws
from sjd2.finetune.objective import AT_ONCE, recompute, widen
from sjd2.finetune.recipe import ParallelRecipe, Training, positive
from sjd2.finetune.trainer import Metrics, Piece, step_rng
from sjd2.finetune.windows import Past, both_branches, causal_mask, one_branch
from sjd2.models.base import ImageModel
from sjd2.models.kv_cache import additive


@dataclass
class HeadPairs:
    """Teacher-forced pairs: prompt_embeds [R, P - 1, D] of tokens 1.., prompt_states [R, P - 1, D] before them; lengths [R].

    embeds [R, N - 1, D] of image tokens 0..N-2; states [R, N, D]: H, the state that predicts each image token. After a prompt
    of length 0 nothing predicts the first: H_0 is zeros there, and no later pair sees pair 0, as in decoding.
    """

    prompt_embeds: Tensor
    prompt_states: Tensor
    lengths: Tensor
    embeds: Tensor
    states: Tensor


@torch.no_grad()
def make_pairs(model: ImageModel, prompt: Tensor, lengths: Tensor, tokens: Tensor) -> HeadPairs:
    """Run the model over right-padded prompts [R, P, D] and images [R, N], and shift: token t + 1 joins state t."""
    rows, n = tokens.shape
    width = prompt.shape[1]
    start = torch.arange(width, device=tokens.device).expand(rows, -1)
    positions = torch.cat([start, model.image_start(lengths)[:, None] + torch.arange(n - 1, device=tokens.device)], 1)
    embeds = model.embed(tokens[:, :-1])
    hidden = model.forward(torch.cat([prompt, embeds], 1), positions, None, causal_mask(lengths, width, n - 1))
    last = hidden[torch.arange(rows, device=tokens.device), (lengths - 1).clamp(min=0)]
    last = last.masked_fill((lengths == 0)[:, None], 0.0)
    states = torch.cat([last[:, None], hidden[:, width:]], 1)
    return HeadPairs(prompt[:, 1:], hidden[:, : width - 1], lengths, embeds, states)


def predict(head: EagleHead, pairs: HeadPairs, depth: int, noise: Tensor | None = None) -> list[Tensor]:
    """Predict H_1..H_{N-1} from true states, then from the head's own: depth tensors [R, N - 1, D].

    In number k, entry j has seen true states up to H_{j-k+1} and predicted ones after, as a draft of depth k has; entries
    j < k - 1 have no meaning. noise [R, N - 1, D] is added to the true states of the image.
    """
    width, n = pairs.prompt_states.shape[1], pairs.embeds.shape[1]
    place = torch.arange(n, device=pairs.embeds.device)
    prompt = torch.arange(width, device=place.device).expand(len(pairs.lengths), -1)
    positions = head.image_start(pairs.lengths)[:, None] - 1 + place
    states = pairs.states[:, :-1] if noise is None else pairs.states[:, :-1] + noise
    cache = Past.empty(1)
    dtype = pairs.embeds.dtype
    # [R, N - 1, N - 1] the first pair of an image after an empty prompt
    unseen = (pairs.lengths == 0)[:, None, None] & (place == 0) & (place[:, None] > 0)
    attn_mask = causal_mask(pairs.lengths - 1, width, n)
    attn_mask[:, width:, width:] &= ~unseen
    out = head(
        torch.cat([pairs.prompt_embeds, pairs.embeds], 1),
        torch.cat([pairs.prompt_states, states], 1),
        torch.cat([prompt, positions], 1),
        cache,
        attention_mask=additive(attn_mask, dtype)[:, None],
    )[:, width:]
    outs = [out]
    before = (prompt < pairs.lengths[:, None] - 1)[:, None].expand(-1, n, -1)
    age = place[:, None] - place  # [N - 1, N - 1] how far a key lies before its query
    for k in range(1, depth):
        drafts = torch.cat([age == k - i for i in range(1, k + 1)], 1).expand(len(before), -1, -1)
        seen = torch.cat([before, (age >= k) & ~unseen, drafts], 2)
        fed = torch.cat([states[:, :1], out[:, :-1]], 1)
        cache = cache.following()
        out = head(pairs.embeds, fed, positions, cache, attention_mask=additive(seen, dtype)[:, None])
        outs.append(out)
    return outs


@dataclass(kw_only=True)
class FinetuneEagle(ParallelRecipe):
    """Train an `EagleHead`, usually on images that the model drew itself.

    batch_size: images per step. muon_lr: of the layer's matrices (None: AdamW). start: the layer's first weights, those of
    the model's `last` layer or `random` ones.
    regression: weight of SmoothL1 between states. cross_entropy: weight of the cross-entropy between the distributions
    of each row. guided: weight of the same between the guided distributions, at the scale under which the image was drawn;
    rejection: weight of their total variation, the probability that a draft is rejected. noise: width of the uniform noise
    on the states fed. unconditional: share of images with an empty prompt (the paper's 0.1); None: every image with both
    prompts, which the guided losses need. unroll: draft steps trained on, each weighing `fade` times the one before (EAGLE-3).
    """

    head: EagleSettings
    data: ScaledData
    steps: int
    start: str = "last"
    muon_lr: float | None = None
    regression: float = 1.0
    cross_entropy: float = 0.1
    guided: float = 0.0
    rejection: float = 0.0
    noise: float = 0.2
    unconditional: float | None = 0.1
    unroll: int = 1
    fade: float = 0.8
    validation_depth: int = 4

    clip: ClassVar[float] = 0.5

    def usage(self, result: Path) -> str:
        """Return the settings of a command that uses the result."""
        return f"decoder=eagle decoder.drafter.weights={result}"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("finetune.start", self.start, ("last", "random"))
        positive(unroll=self.unroll, validation_depth=self.validation_depth)
        weights = (self.regression, self.cross_entropy, self.guided, self.rejection)
        if min(weights) < 0 or not max(weights):
            raise UserError(
                "finetune.regression, cross_entropy, guided and rejection are weights: none negative, one of them positive."
            )
        if self.unconditional is not None and max(self.guided, self.rejection):
            raise UserError(
                "finetune.guided and finetune.rejection join both rows of an image: set finetune.unconditional=null."
            )

    def build_training(self, model: ImageModel, *, out: Path, device: str, seed: int) -> Training:
        """Start a head; its metrics are the overlaps of its distributions with the model's, by scale and depth."""
        # eval: some families' layers have dropout, which would not survive recomputing
        head = EagleHead(self.head, model).eval()
        head.start(self.start)
        if self.bf16:
            widen(head.parameters())
        if self.machine.checkpointing:
            recompute([cast(nn.Module, head.layer)])

        def finish(folder: Path) -> Metrics:
            if distributed.first():
                head.save(folder, torch.bfloat16)
            return self.validate(model, head)

        return Training(
            module=head,
            optimizers=self._optimizers(head),
            loss=lambda step: self._pieces(model, head, step, seed),
            validate=lambda: self.validate(model, head),
            finish=finish,
        )

    def _pieces(self, model: ImageModel, head: EagleHead, step: int, seed: int) -> Iterator[Piece]:
        """Yield this process's micro-batches of a step: shares of the mean over the whole batch."""
        rng = step_rng(seed, step)
        prompts, codes, scales = self.data.scaled(self.batch_size, int(rng.integers(2**62)))
        seeds = rng.integers(2**62, size=self.batch_size if self.machine.cuts else 1).tolist()
        for rows, share in shares(self.batch_size, self.machine.micro_batch):
            value, metrics = self.loss(model, head, prompts[rows], codes[rows], scales[rows], seeds[rows])
            weight = share * len(codes[rows]) / self.batch_size
            yield value * weight, {name: part * weight for name, part in metrics.items()}

    def loss(
        self,
        model: ImageModel,
        head: EagleHead,
        prompts: list[str],
        codes: Tensor,
        scales: Tensor,
        seeds: Sequence[int],
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the loss and its parts at depth 1: codes [B, L], scales [B]; seeds: one, or one per sample."""
        draws = Draws(seeds, len(codes))
        tokens = model.layout.tokens(codes.to(model.device))
        pairs = make_pairs(model, *self._rows(model, prompts, tokens, draws))
        wanted = pairs.states[:, 1:]
        noise = None
        if self.noise:
            uniform = draws.rand(*wanted.shape[1:], blocks=len(wanted) // len(codes))
            noise = ((uniform - 0.5) * self.noise).to(wanted)
        scales = scales.to(device=wanted.device)[:, None, None]
        total, metrics = torch.zeros((), device=wanted.device), {}
        for k, out in enumerate(predict(head, pairs, self.unroll, noise)):
            parts = self._parts(model, out, wanted, scales, _valid(model, k))
            value = sum(getattr(self, name) * part for name, part in parts.items())
            total = total + self.fade**k * value
            metrics = metrics or {name: part.detach() for name, part in parts.items()}
        return total, metrics

    def _parts(
        self, model: ImageModel, out: Tensor, wanted: Tensor, scales: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        """Compare predicted with true states [R, N - 1, D] where `valid` [N - 1] -> the means that the loss weighs.

        Distributions of many tokens are computed piece by piece, and again in the backward pass, instead of being kept.
        """
        size = max(1, AT_ONCE // (len(out) * model.layout.vocabulary))
        pieces = list(zip(out.split(size, 1), wanted.split(size, 1), valid.split(size), strict=True))
        given = [(model, *piece, scales) for piece in pieces if piece[2].any()]
        if len(pieces) == 1:
            return self._compare(*given[0])
        sums: dict[str, Tensor] = {}
        for piece in given:
            share = piece[3].sum() / valid.sum()
            for name, part in checkpoint(self._compare, *piece, use_reentrant=False).items():
                sums[name] = sums.get(name, 0.0) + part * share
        return sums

    def _compare(
        self, model: ImageModel, out: Tensor, wanted: Tensor, valid: Tensor, scales: Tensor
    ) -> dict[str, Tensor]:
        """Return the means over `valid` tokens of what the loss weighs: states [R, S, D], scales [B, 1, 1]."""
        with torch.no_grad():
            target = model.logits(wanted)[:, valid]
        both = target, model.logits(out)[:, valid]
        error = nn.functional.smooth_l1_loss(out, wanted.to(out.dtype), reduction="none").mean(-1)
        parts = {"regression": error[:, valid].mean(), "cross_entropy": _divergence(*both)}
        if self.guided or self.rejection:
            p, q = (_guided(rows, scales) for rows in both)
            parts["guided"] = _divergence(p, q)
            parts["rejection"] = (p.softmax(-1) - q.softmax(-1)).clamp(min=0).sum(-1).mean()
        return parts

    @torch.no_grad()
    def validate(self, model: ImageModel, head: EagleHead) -> dict[str, float]:
        """Measure 1 - TV between head and model on held-out images, each scale on the images drawn under it.

        Depth d: true tokens, the head's own states for the last d - 1 of them. All depths on the same positions.
        """
        prompts, codes, scales = self.data.scaled(self.data.validation_images, 0, held_out=True)
        metrics = {}
        for scale in sorted(set(scales.tolist())):
            mine = (scales == scale).nonzero()[:, 0].tolist()
            sums = torch.zeros(self.validation_depth)
            for rows, weight in shares(len(mine), self.machine.micro_batch or self.batch_size):
                part = mine[rows]
                tokens = model.layout.tokens(codes[part].to(model.device))
                with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
                    shown = [prompts[i] for i in part]
                    overlaps = self._overlaps(model, head, shown, tokens, SamplingParams(guidance_scale=scale))
                sums += weight * len(part) * overlaps
            for depth, value in enumerate(sums / len(mine), 1):
                metrics[f"overlap_g{scale:g}_d{depth}"] = float(value)
        return distributed.total(metrics)

    def _overlaps(
        self, model: ImageModel, head: EagleHead, prompts: list[str], tokens: Tensor, sampling: SamplingParams
    ) -> Tensor:
        """Return the mean 1 - TV at each depth: tokens [B, N] -> [depths]."""
        prompt, lengths = both_branches(model, prompts)
        if sampling.guided:
            tokens = tokens.repeat(2, 1)
        pairs = make_pairs(model, prompt[: len(tokens)], lengths[: len(tokens)], tokens)
        valid = _valid(model, self.validation_depth - 1)
        size = max(1, AT_ONCE // (len(prompt) * model.layout.vocabulary))
        sums = torch.zeros(self.validation_depth)
        outs = predict(head, pairs, self.validation_depth)
        for begin in range(0, len(valid), size):
            here = valid[begin : begin + size]
            if not here.any():
                continue
            target, *drafts = (
                sampling.probs(model.logits(states[:, begin : begin + size][:, here]))
                for states in (pairs.states[:, 1:], *outs)
            )
            overlaps = torch.stack([torch.minimum(target, draft).sum(-1).mean() for draft in drafts]).cpu()
            sums += overlaps * (here.sum() / valid.sum()).cpu()
        return sums

    def _optimizers(self, head: EagleHead) -> Sequence[torch.optim.Optimizer]:
        """Give the layer's matrices to Muon where `muon_lr` is set, everything else to AdamW."""
        layer = cast(nn.Module, head.layer).named_parameters() if self.muon_lr is not None else ()
        matrices = [p for name, p in layer if p.ndim == 2 and "norm" not in name]
        others = [p for p in head.parameters() if all(p is not m for m in matrices)]
        adam = torch.optim.AdamW(others, lr=self.lr, betas=(0.9, 0.95), weight_decay=self.weight_decay)
        if self.muon_lr is None:
            return [adam]
        return [adam, torch.optim.Muon(matrices, lr=self.muon_lr, weight_decay=0.01)]

    def _rows(
        self, model: ImageModel, prompts: list[str], tokens: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the rows to train on -> prompts [R, P, D], their lengths [R], images [R, N]."""
        if self.unconditional is None:
            return *both_branches(model, prompts), tokens.repeat(2, 1)
        return *one_branch(model, prompts, draws.rand() < self.unconditional), tokens


def _valid(model: ImageModel, step: int) -> Tensor:
    """Return which entries of a prediction count: the token after is free, and `step` predicted states fit before it."""
    free = model.layout.free[1:]
    return (free & (torch.arange(len(free)) >= step)).to(model.device)


def _guided(logits: Tensor, scales: Tensor) -> Tensor:
    """Join the logits of both branches [2B, S, V] by guidance at scales [B, 1, 1]."""
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, scales.to(logits))


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Return the mean KL divergence of softmax(logits) from softmax(target) [..., V]: cross-entropy minus a constant."""
    return nn.functional.kl_div(
        logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1).mean()  # fmt: skip
