"""A small random Janus-Pro in the public layout: files, names, fields and special tokens of deepseek-community/Janus-Pro-1B.

python -m tests.helpers.checkpoints_janus OUT [--sharded]

The 7B model's weights lie in shards, the 1B model's in one file. The folders were written by transformers 4.52
(convert_janus_weights_to_hf.py in huggingface/transformers).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from tests.helpers.checkpoints_emu3 import WORDS, randomise

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
EXTRA = {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_placeholder>"}
# id - 100000 in the public tokenizer
PLACES = {BOS: 0, EOS: 1, PAD: 2, "<begin_of_image>": 16, "<image_placeholder>": 581, "<end_of_image>": 593}
LATER = [
    "<patch_placeholder>",
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<|grounding|>",
    "<|User|>",
    "<|Assistant|>",
]


def write(folder: Path, *, codes: int = 64, side: int = 64, sharded: bool = False, seed: int = 0) -> Path:
    """Write the checkpoint: a model of width 32 and 2 layers, `codes` image codes, 16 pixels a code, images of `side`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    text = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=vocabulary[BOS], eos_token_id=vocabulary[EOS],
        pad_token_id=vocabulary[PAD],
    )  # fmt: skip
    vision = JanusVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=side, projection_dim=32,
        num_image_tokens=(side // 16) ** 2,
    )  # fmt: skip
    vq = JanusVQVAEConfig(
        num_embeddings=codes, base_channels=32, channel_multiplier=[1, 1, 1, 1, 1], num_res_blocks=1,
        latent_channels=32, projection_dim=32, image_token_embed_dim=32, num_patches=side // 16,
    )  # fmt: skip
    place = vocabulary["<image_placeholder>"]
    model = JanusForConditionalGeneration(
        JanusConfig(
            text_config=text, vision_config=vision, vq_config=vq, image_token_id=place, tie_word_embeddings=False
        )
    )
    randomise(model, seed)
    save_torch_state_dict(dict(model.state_dict()), folder, max_shard_size="200KB" if sharded else "5GB")
    config = model.config.to_dict()
    config.pop("tie_word_embeddings")
    config |= {"architectures": ["JanusForConditionalGeneration"], "torch_dtype": "float32"}
    # as transformers 4 writes the rotary settings
    config["text_config"] |= {"rope_theta": 10000.0, "rope_scaling": None}
    config["text_config"].pop("rope_parameters")
    ids = {"bos_token_id": vocabulary[BOS], "eos_token_id": vocabulary[EOS], "pad_token_id": vocabulary[PAD]}
    files = {
        "config.json": config | {"transformers_version": "4.52.0.dev0"},
        "generation_config.json": ids | {
            "generation_kwargs": {"boi_token_id": vocabulary["<begin_of_image>"]}, "guidance_scale": 5, "temperature": 1,
            "transformers_version": "4.52.0.dev0",
        },
        "preprocessor_config.json": {
            "image_processor_type": "JanusImageProcessor", "processor_class": "JanusProcessor", "do_resize": True,
            "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5], "min_size": 14, "resample": 3, "size": {"height": side, "width": side},
        },
        "processor_config.json": {
            "num_image_tokens": (side // 16) ** 2, "processor_class": "JanusProcessor", "use_default_system_prompt": True,
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return folder


def settings(folder: Path) -> dict[str, Any]:
    """Return the settings of conf/model/janus.yaml that this checkpoint needs; the public ones have these in the yaml."""
    config = json.loads((folder / "config.json").read_text())
    return {
        "weights": str(folder),
        "vocabulary": config["vq_config"]["num_embeddings"],
        "size": config["vision_config"]["image_size"],
    }


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write a byte-level BPE tokenizer, special tokens at the ids of the public one; return its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    size = max(PLACES.values()) + 1
    special = [f"<reserved {place}>" for place in range(size)] + LATER
    for name, place in PLACES.items():
        special[place] = name
    vocabulary |= {name: len(vocabulary) + place for place, name in enumerate(special)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    named = [*PLACES, *LATER]
    content["added_tokens"] = [{"id": vocabulary[name], "content": name, **flags, "special": True} for name in named]
    whole = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    content["post_processor"] = json.loads(whole.__getstate__())
    tokens = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    files = {
        "tokenizer.json": content,
        "special_tokens_map.json": tokens | EXTRA | {"additional_special_tokens": ["<image_placeholder>", *LATER]},
        "tokenizer_config.json": tokens | EXTRA | {
            "add_bos_token": True, "add_eos_token": False,
            "added_tokens_decoder": {str(entry["id"]): {**flags, "content": entry["content"], "special": True}
                                     for entry in content["added_tokens"]},
            "clean_up_tokenization_spaces": False, "extra_special_tokens": EXTRA, "legacy": True,
            "model_max_length": 16384, "processor_class": "JanusProcessor", "tokenizer_class": "LlamaTokenizerFast",
            "unk_token": None, "use_default_system_prompt": True,
        },
    }  # fmt: skip
    for name, part in files.items():
        (folder / name).write_text(json.dumps(part, indent=2, ensure_ascii=False))
    return vocabulary


if __name__ == "__main__":
    out = write(Path(sys.argv[1]), sharded="--sharded" in sys.argv)
    words = " ".join(f"model.{key}={value}".replace(" ", "") for key, value in settings(out).items())
    print(f"python run.py model=janus {words} decoder=scd prompts=file prompts.path=FILE evaluation=none limit=2")
