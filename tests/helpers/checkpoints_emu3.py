"""A small random Emu3-Gen in the public layout: the files, names, fields and special tokens of BAAI/Emu3-Gen-hf.

python -m tests.helpers.checkpoints_emu3 OUT

The public folder was written by transformers 4.48 (convert_emu3_weights_to_hf.py in huggingface/transformers), whose model
classes nest otherwise than those of today: "text_model.model.layers.0...", "text_model.lm_head.weight", "vqmodel....".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3TextConfig, Emu3VQVAEConfig

from sjd2.models import emu3

WORDS = [
    "a red fox under the old bridge, best quality",
    "lowres, text, error, bad hands",
    "two dogs and a cat. masterpiece",
    "an old-fashioned, half-timbered house’s door",
]
EXTRA = {
    "boi_token": "<|image start|>",
    "eof_token": "<|extra_201|>",
    "eoi_token": "<|image end|>",
    "image_token": "<image>",
    "image_wrapper_token": "<|image token|>",
}
OLD_NAMES = {"model.text_model.": "text_model.model.", "lm_head.": "text_model.lm_head.", "model.vqmodel.": "vqmodel."}
NAMED = {"bos_token": "<|extra_203|>", "eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>"}


def write(folder: Path, *, codes: int = 64, seed: int = 0) -> Path:
    """Write the checkpoint: a model of width 32 and 2 layers, `codes` image codes, 8 pixels a code."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder, codes)
    ids = {key: vocabulary[token] for key, token in NAMED.items()}
    text = Emu3TextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, **{f"{key}_id": number for key, number in ids.items()},
    )  # fmt: skip
    vq = Emu3VQVAEConfig(
        codebook_size=codes, base_channels=32, channel_multiplier=[1, 1, 1, 1], num_res_blocks=1, hidden_size=32
    )
    model = Emu3ForConditionalGeneration(Emu3Config(text_config=text, vq_config=vq, vocabulary_map=vocabulary))
    randomise(model, seed)
    save_torch_state_dict(
        {public_name(name): tensor for name, tensor in model.state_dict().items()}, folder, max_shard_size="200KB"
    )
    config = model.config.to_dict()
    config |= {"architectures": ["Emu3ForConditionalGeneration"], "torch_dtype": "float32"}
    # as transformers 4.48 writes the rotary settings
    config["text_config"] |= {"rope_theta": 1000000.0, "rope_scaling": {"rope_type": "default"}}
    config["text_config"].pop("rope_parameters")
    generation = {"do_sample": True, "top_k": 2048, "max_new_tokens": 50000}
    files = {
        "config.json": config | {"transformers_version": "4.48.0.dev0"},
        "generation_config.json": generation | {k: ids[k.removesuffix("_id")] for k in ("eos_token_id", "pad_token_id")},
        "preprocessor_config.json": {
            "image_processor_type": "Emu3ImageProcessor", "processor_class": "Emu3Processor", "do_resize": True,
            "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "do_pad": True, "rescale_factor": 1 / 255,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "min_pixels": 1024, "max_pixels": 1048576,
            "resample": 3, "spatial_factor": 8,
        },
        "processor_config.json": {"image_token": "<image>", "processor_class": "Emu3Processor"},
        "chat_template.json": {"chat_template": "{{ messages[0]['content'] }}"},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def settings(folder: Path) -> dict[str, Any]:
    """Return the settings of conf/model/emu3.yaml that this checkpoint needs; the public one has these in the yaml."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    suffix = [vocabulary[name] for name in ("<|extra_201|>", "<|image end|>", "<|extra_204|>")]
    codes = sum(name.startswith("<|visual token") for name in vocabulary)
    return {
        "weights": str(folder),
        "vocabulary": codes,
        "size": 32,
        "row_end": vocabulary["<|extra_200|>"],
        "suffix": suffix,
    }


def write_tokenizer(folder: Path, codes: int) -> dict[str, int]:
    """Write a byte-level BPE tokenizer whose special tokens follow the text in the public order; return its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    # merges come from Emu3's own way of cutting text, the file then names GPT-2's, as the conversion does
    pieces = pre_tokenizers.Split(Regex(emu3.PIECES), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, letters])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(WORDS * 2, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    special[special.index("<|extra_0|>")] = "<image>"  # the conversion gives a reserved token this name
    special += [
        "<|image token|>",
        "<|image start|>",
        "<|image end|>",
        *(f"<|visual token {i:06d}|>" for i in range(codes)),
    ]
    vocabulary |= {name: len(vocabulary) + place for place, name in enumerate(special)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [{"id": vocabulary[name], "content": name, **flags, "special": True} for name in special]
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    files = {
        "tokenizer.json": content,
        "vocab.json": vocabulary,
        "special_tokens_map.json": NAMED | EXTRA | {"unk_token": "<|endoftext|>"},
        "tokenizer_config.json": NAMED | EXTRA | {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(entry["id"]): {**flags, "content": entry["content"], "special": True}
                                     for entry in content["added_tokens"]},
            "clean_up_tokenization_spaces": False, "extra_special_tokens": EXTRA, "padding_side": "left",
            "processor_class": "Emu3Processor", "tokenizer_class": "GPT2Tokenizer", "unk_token": "<|endoftext|>",
        },
    }  # fmt: skip
    for name, part in files.items():
        (folder / name).write_text(json.dumps(part, indent=2, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return vocabulary


def public_name(name: str) -> str:
    """Return the name that a tensor of today's class has in the public files."""
    now = next(start for start in OLD_NAMES if name.startswith(start))
    return OLD_NAMES[now] + name.removeprefix(now)


def randomise(model: nn.Module, seed: int) -> None:
    """Draw weights that make the outputs depend on all inputs: usual initial values would give nearly flat distributions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.5 + draw(tensor).abs())
        elif tensor.ndim >= 2:
            fan = 1 if "embed" in name else tensor[0].numel()
            gain = (
                0.05 if "quantize" in name else 1.0 if tensor.ndim > 2 else 1.5
            )  # codes about as far apart as latents
            tensor.copy_(draw(tensor) * gain / fan**0.5)
        elif tensor.is_floating_point():
            tensor.copy_(draw(tensor) * 0.1 + (name.endswith("weight")))


if __name__ == "__main__":
    out = write(Path(sys.argv[1]))
    words = " ".join(f"model.{key}={value}".replace(" ", "") for key, value in settings(out).items())
    print(
        f"python run.py model=emu3 {words} decoder=scd top_k=0 prompts=file prompts.path=FILE evaluation=none limit=2"
    )
