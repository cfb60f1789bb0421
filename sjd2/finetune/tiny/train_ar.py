"""Train the embedded text-to-image model: a Chameleon of 3M parameters on captioned scenes, from scratch.

B images, T input positions, N image tokens, V codes, D width. Rows are packed as [prompt, image, padding], so that one
causal mask serves all rows and padding is never seen.
"""

import shutil
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AttentionInterface, ChameleonConfig, ChameleonForConditionalGeneration
from transformers import PreTrainedTokenizerFast as Tokenizer

from sjd2.files import find
from sjd2.finetune.recipe import Training, TrainRecipe
from sjd2.finetune.tiny.train_vq import to_float
from sjd2.finetune.trainer import Metrics, step_rng
from sjd2.models.tiny import scenes
from sjd2.models.tiny.tokenizer import FIRST_CODE, build_tokenizer, prompt_ids, vocabulary
from sjd2.models.vqgan import VQGAN


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend by explicit matrix products, [B, H, T, d] -> [B, T, H, d]; the mask is additive [1, 1, T, T].

    On CPUs the backward pass of torch's fused attention in bfloat16 makes a training step 2.5 times as long.
    """
    rows, heads, length, width = query.shape
    flat = (rows * heads, length, width)
    mask = attention_mask[0].to(query.dtype)
    scores = torch.baddbmm(mask, query.reshape(flat), key.reshape(flat).transpose(1, 2), alpha=scaling)
    mixed = torch.bmm(scores.softmax(-1).to(value.dtype), value.reshape(flat))
    return mixed.view(rows, heads, length, width).transpose(1, 2).contiguous(), None


AttentionInterface.register("sjd2_plain", plain_attention)


def token_batch(vqgan: VQGAN, n: int, seed: int) -> tuple[list[str], Tensor]:
    """Render and tokenise n training scenes -> (captions, codes [n, N]); a pure function of weights, n and seed.

    Made on the fly (4 % of a training step), so no image is ever seen twice and nothing has to be cached.
    """
    drawn = scenes.training(n, seed)
    return [scenes.caption(scene) for scene in drawn], encode(vqgan, drawn, seed)


def encode(vqgan: VQGAN, drawn: Sequence[scenes.Scene], seed: int) -> Tensor:
    """Render and tokenise scenes -> codes [n, N]."""
    return vqgan.encode(to_float(scenes.render(drawn, seed)).to(vqgan.codebook.device)).flatten(1)


def pack(prompts: Sequence[Sequence[int]], codes: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Write [prompt, codes but the last, padding] into rows -> (ids [B, T], places [B, N] that predict the codes)."""
    device, n = codes.device, codes.shape[1]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.full((len(prompts), int(lengths.max()) + n - 1), pad, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    places = lengths[:, None] - 1 + torch.arange(n, device=device)
    ids.scatter_(1, places[:, 1:], codes[:, :-1] + FIRST_CODE)
    return ids, places


def pad_id(tokenizer: Tokenizer) -> int:
    """Return the id of padding."""
    return cast(int, tokenizer.pad_token_id)


def image_logits(model: ChameleonForConditionalGeneration, ids: Tensor, places: Tensor, codes: int) -> Tensor:
    """Run the backbone on packed rows [B, T] and score the codes at `places` [B, N] -> [B, N, V].

    Below ForConditionalGeneration, whose forward writes the lowest float on every image logit.
    """
    rows, length = ids.shape
    embeds = model.get_input_embeddings()(ids)
    lowest = torch.finfo(torch.bfloat16).min  # also finite in float32
    mask = torch.full((1, 1, length, length), lowest, device=ids.device, dtype=embeds.dtype).triu(1)
    hidden = model.get_decoder()(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=torch.arange(length, device=ids.device).expand(rows, length),
        use_cache=False,
    ).last_hidden_state
    hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
    return F.linear(hidden, model.lm_head.weight[FIRST_CODE : FIRST_CODE + codes])


@dataclass(kw_only=True)
class TrainAR(TrainRecipe):
    """Train the model on the codes of `vq_weights`; the result is a save_pretrained folder with the tokenizer's files."""

    vq_weights: str
    muon_lr: float
    adam_lr: float
    ema: float
    unconditional: float
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    rope_theta: float
    validation_images: int
    export_s: float

    def usage(self, result: Path) -> str:
        """Return the settings of a command that uses the result."""
        return f"decoder=scd model.weights={result} model.vq_weights={self.vq_weights} model.adapter=null"

    def build(self, codes: int) -> ChameleonForConditionalGeneration:
        """Make an untrained model with `codes` image codes."""
        # ChameleonModel always holds an image encoder; ours is VQGAN, so this one is as small as the class allows.
        unused = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 0, "latent_channels": 32}
        config = ChameleonConfig(
            vocab_size=len(vocabulary(codes)),
            vocabulary_map=vocabulary(codes),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
            vq_config=unused | {"num_embeddings": codes, "embed_dim": 8, "resolution": scenes.SIDE},
        )
        return ChameleonForConditionalGeneration._from_config(config, attn_implementation="sjd2_plain")

    def build_training(self, model: None, *, out: Path, device: str, seed: int) -> Training:
        """Build an untrained model, exported to out/latest/ now and then; its metrics are validation losses (nats)."""
        vqgan = VQGAN.load(find(self.vq_weights)).to(device)
        codes = len(vqgan.codebook)
        tokenizer = build_tokenizer(codes)
        network: Any = self.build(codes)
        network.to(device).train()
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(self.ema)).requires_grad_(False)
        averaged: Any = average.module
        shown = scenes.held_out(self.validation_images, seed)
        captions, target = [scenes.caption(scene) for scene in shown], encode(vqgan, shown, seed)
        exported = time.monotonic()

        def after_step(done: int) -> None:
            nonlocal exported
            average.update_parameters(network)
            if time.monotonic() - exported > self.export_s:
                export(averaged, tokenizer, out / "latest")
                exported = time.monotonic()

        def measure() -> Metrics:
            return validate(averaged, tokenizer, captions, target, codes, self.bf16)

        def finish(folder: Path) -> Metrics:
            export(averaged, tokenizer, folder)
            return measure()

        return Training(
            module=nn.ModuleDict({"model": network, "average": average}),
            optimizers=optimizers(network, self.muon_lr, self.adam_lr),
            loss=lambda step: (self.loss(network, tokenizer, vqgan, step_rng(seed, step)), {}),
            validate=measure,
            finish=finish,
            after_step=after_step,
        )

    def loss(
        self, model: ChameleonForConditionalGeneration, tokenizer: Tokenizer, vqgan: VQGAN, rng: np.random.Generator
    ) -> Tensor:
        """Return the cross-entropy of one batch of new scenes, a share of them without their caption."""
        texts, codes = token_batch(vqgan, self.batch_size, int(rng.integers(2**62)))
        dropped = rng.random(len(texts)) < self.unconditional
        prompts = prompt_ids(tokenizer, [None if drop else text for drop, text in zip(dropped, texts, strict=True)])
        ids, places = pack(prompts, codes, pad_id(tokenizer))
        logits = image_logits(model, ids, places, len(vqgan.codebook)).float()
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def optimizers(model: ChameleonForConditionalGeneration, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Give the blocks' matrices to Muon and embeddings, head and norms to AdamW."""
    transformer: Any = model.get_decoder()
    blocks = dict(transformer.layers.named_parameters())
    matrices = [p for name, p in blocks.items() if p.ndim == 2 and "norm" not in name]
    others = [p for name, p in blocks.items() if p.ndim != 2 or "norm" in name]
    others += [model.get_input_embeddings().weight, model.lm_head.weight, *transformer.norm.parameters()]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@torch.no_grad()
def validate(
    model: ChameleonForConditionalGeneration,
    tokenizer: Tokenizer,
    captions: Sequence[str],
    target: Tensor,
    codes: int,
    bf16: bool,
) -> dict[str, float]:
    """Measure on held-out scenes [n, N], in nats per token: loss with and without caption, entropy of the distribution."""
    sums: dict[str, float] = dict.fromkeys(("val_loss", "val_loss_unconditional", "val_entropy"), 0.0)
    for i in range(0, len(captions), 32):
        some, there = captions[i : i + 32], target[i : i + 32]
        for name, texts in (("val_loss", some), ("val_loss_unconditional", [None] * len(some))):
            ids, places = pack(prompt_ids(tokenizer, texts), there, pad_id(tokenizer))
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
                log_probs = image_logits(model, ids, places, codes).float().log_softmax(-1)
            sums[name] -= log_probs.gather(-1, there[..., None]).sum().item()
            if name == "val_loss":
                sums["val_entropy"] -= (log_probs.exp() * log_probs).sum().item()
    return {name: total / target.numel() for name, total in sums.items()}


def export(model: ChameleonForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that `from_pretrained` reads, weights in bfloat16, and put it in place of an older one."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    half: Any = deepcopy(model)
    half.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
