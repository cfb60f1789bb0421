"""Small random checkpoints in the layout of LlamaGen's published files, so that the public path loads them.

Writes t2i_XL_stage1_256.pt, t2i_XL_stage2_512.pt and vq_ds16_t2i.pt (torch files, {"model": {...}}, float32, public names)
and flan-t5-xl/ (config, sharded safetensors with the decoder that nobody needs, tokenizer.json).
    python -m tests.helpers.checkpoints_llamagen OUT
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

PLACES = 120
CODES, CHANNELS = 48, 8
PIECES = ("▁a", "▁red", "▁blue", "▁cat", "▁dog", "▁on", "▁the", "▁of", "▁green", "▁circle", "s", "ing")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'\"-:!?"


def language_shapes(*, layers: int, width: int, inner: int, codes: int, features: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of a published text-to-image Transformer (autoregressive/models/gpt.py)."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_embedding.uncond_embedding": (PLACES, features),
        "cls_embedding.cap_proj.fc1.weight": (width, features),
        "cls_embedding.cap_proj.fc2.weight": (width, width),
        "tok_embeddings.weight": (codes, width),
    }
    for layer in range(layers):
        shapes |= {
            f"layers.{layer}.attention.wqkv.weight": (3 * width, width),
            f"layers.{layer}.attention.wo.weight": (width, width),
            f"layers.{layer}.feed_forward.w1.weight": (inner, width),
            f"layers.{layer}.feed_forward.w3.weight": (inner, width),
            f"layers.{layer}.feed_forward.w2.weight": (width, inner),
            f"layers.{layer}.attention_norm.weight": (width,),
            f"layers.{layer}.ffn_norm.weight": (width,),
        }
    return shapes | {"norm.weight": (width,), "output.weight": (codes, width)}


def tokeniser_shapes(
    *, base: int, multiples: tuple[int, ...], blocks: int, latent: int, codes: int, channels: int
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of a published VQModel (tokenizer/tokenizer_image/vq_model.py)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def put(name: str, *size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = size, size[:1]

    def residual(name: str, into: int, out: int) -> None:
        put(f"{name}.norm1", into)
        put(f"{name}.conv1", out, into, 3, 3)
        put(f"{name}.norm2", out)
        put(f"{name}.conv2", out, out, 3, 3)
        if into != out:
            put(f"{name}.nin_shortcut", out, into, 1, 1)

    def attention(name: str, width: int) -> None:
        put(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            put(f"{name}.{part}", width, width, 1, 1)

    def middle(name: str, width: int) -> None:
        residual(f"{name}.mid.0", width, width)
        attention(f"{name}.mid.1", width)
        residual(f"{name}.mid.2", width, width)

    def levels(name: str, width: int, order: list[int], count: int, between: str) -> int:
        for place, level in enumerate(order):
            here = f"{name}.conv_blocks.{place}"
            for block in range(count):
                residual(f"{here}.res.{block}", width, base * multiples[level])
                width = base * multiples[level]
                if level == len(multiples) - 1:
                    attention(f"{here}.attn.{block}", width)
            if place < len(order) - 1:
                put(f"{here}.{between}.conv", width, width, 3, 3)
        return width

    ladder = list(range(len(multiples)))
    put("encoder.conv_in", base, 3, 3, 3)
    top = levels("encoder", base, ladder, blocks, "downsample")
    middle("encoder", top)
    put("encoder.norm_out", top)
    put("encoder.conv_out", latent, top, 3, 3)
    put("decoder.conv_in", top, latent, 3, 3)
    middle("decoder", top)
    bottom = levels("decoder", top, ladder[::-1], blocks + 1, "upsample")
    put("decoder.norm_out", bottom)
    put("decoder.conv_out", 3, bottom, 3, 3)
    shapes["quantize.embedding.weight"] = (codes, channels)
    shapes["quantize.codebook_used"] = (65536,)
    put("quant_conv", channels, latent, 1, 1)
    put("post_quant_conv", latent, channels, 1, 1)
    return shapes


SMALL = {"layers": 2, "width": 32, "inner": 48, "codes": CODES, "features": 16}
SMALL_VQ = {"base": 32, "multiples": (1, 1, 1, 1, 2), "blocks": 1, "latent": 16, "codes": CODES, "channels": CHANNELS}
HEADS = 4


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> OrderedDict[str, Tensor]:
    """Draw weights that make a lively model: distributions that differ from place to place and depend on the past."""
    generator = torch.Generator().manual_seed(seed)
    out: OrderedDict[str, Tensor] = OrderedDict()
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            drawn = 1 + 0.1 * drawn
        elif name.endswith("bias"):
            drawn = 0.1 * drawn
        elif name.endswith("codebook_used"):
            drawn = torch.zeros(shape)
        elif name in ("tok_embeddings.weight", "quantize.embedding.weight", "cls_embedding.uncond_embedding"):
            pass
        else:
            fan = torch.Size(shape[1:]).numel()
            drawn = drawn * (1.5 if name.startswith("layers.") else 1.0) / fan**0.5
        out[name] = drawn
    return out


def write_text(folder: Path, *, width: int = SMALL["features"], seed: int = 3) -> None:
    """Write a small flan-T5: T5ForConditionalGeneration in two shards, and its Unigram tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5Config, T5ForConditionalGeneration

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(piece, -2.5) for piece in PIECES] + [(letter, -4.0) for letter in LETTERS]
    words = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    words.decoder = decoders.Metaspace(prepend_scheme="always")
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words.add_special_tokens(["<pad>", "</s>", "<unk>"])
    config = T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, num_decoder_layers=1,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():  # the library's first weights hardly mix tokens
        if parameter.ndim == 2 and "shared" not in name:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="20KB")
    words.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))


def write(folder: Path, seed: int = 0) -> Path:
    """Write all files into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(("t2i_XL_stage1_256.pt", "t2i_XL_stage2_512.pt")):
        torch.save({"model": random_tensors(language_shapes(**SMALL), seed + number)}, folder / name)
    torch.save({"model": random_tensors(tokeniser_shapes(**SMALL_VQ), seed + 2)}, folder / "vq_ds16_t2i.pt")
    write_text(folder / "flan-t5-xl")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = write(parser.parse_args().out)
    files = f"model.weights={out} model.vq_weights={out} model.text_weights={out}/flan-t5-xl"
    print(
        f"python run.py model=llamagen model.size=256 {files} model.vocabulary={CODES} model.heads={HEADS} decoder=scd "
        "prompts=file prompts.path=FILE evaluation=none limit=2"
    )
