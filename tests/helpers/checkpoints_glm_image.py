"""A small random GLM-Image in the public layout: files, names, fields and special tokens of zai-org/GLM-Image.

python -m tests.helpers.checkpoints_glm_image OUT

Only what the autoregressive stage needs: the folders vision_language_encoder (written by transformers 5.0) and processor.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

from tests.helpers.checkpoints_emu3 import WORDS, randomise

# the special tokens of GLM-4's tokenizer in its order; the public ids are 167841 and on
SPECIAL = [
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>",
]  # fmt: skip
# a user's text as it is, its source images before it between the start and the end of an image
TEMPLATE = (
    "{%- for message in messages -%}{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}"
    "<|dit_token_START|><|image|><|dit_token_END|>{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
)
RESERVED = 6  # head rows after codes, start and end; the public head has 126


def write(folder: Path, *, codes: int = 64, seed: int = 0) -> Path:
    """Write the checkpoint: a model of width 32 and 2 layers, `codes` image codes, heads of width 16."""
    vocabulary = write_tokenizer(folder / "processor", codes)
    folder /= "vision_language_encoder"
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": len(vocabulary), "vision_vocab_size": codes + 2 + RESERVED,
        "pad_token_id": vocabulary["<|endoftext|>"], "eos_token_id": codes + 1, "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2],
        },
    }  # fmt: skip
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "depth": 1,
        "num_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    vq = {"embed_dim": 8, "num_embeddings": codes, "latent_channels": 16}
    model = GlmImageForConditionalGeneration(
        GlmImageConfig(
            text_config=text, vision_config=vision, vq_config=vq, image_token_id=vocabulary["<|image|>"],
            image_start_token_id=codes, image_end_token_id=codes + 1,
        )
    )  # fmt: skip
    randomise(model, seed)
    save_torch_state_dict(dict(model.state_dict()), folder, max_shard_size="40KB")
    config = model.config.to_dict() | {"architectures": ["GlmImageForConditionalGeneration"], "dtype": "bfloat16"}
    config["text_config"].pop("attention_bias")  # the public config leaves these to the class
    config["vision_config"].pop("spatial_merge_size")
    generation = {"do_sample": True, "temperature": 0.9, "top_p": 0.75, "top_k": codes + 2 + RESERVED}
    ids = {"eos_token_id": codes + 1, "pad_token_id": vocabulary["<|image|>"]}
    version = {"transformers_version": "5.0.0.dev0"}
    (folder / "config.json").write_text(json.dumps(config | version, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(generation | ids | version, indent=2))
    return folder.parent


def settings(folder: Path) -> dict[str, Any]:
    """Return the settings of conf/model/glm-image.yaml that this checkpoint needs; the public one has these in the yaml."""
    config = json.loads((folder / "vision_language_encoder" / "config.json").read_text())
    codes = config["vq_config"]["num_embeddings"]
    return {
        "weights": str(folder),
        "vocabulary": codes,
        "end": config["image_end_token_id"],
        "size": "160x128",
        "pixels": "none",
    }


def write_tokenizer(folder: Path, codes: int) -> dict[str, int]:
    """Write a byte-level BPE tokenizer, image tokens before its text and special tokens after, and the processor's files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    content = json.loads(tokenizer.to_str())
    image = [f"<|dit_token_{number}|>" for number in range(codes + 2 + RESERVED)]
    vocabulary = {name: place for place, name in enumerate([*image, *content["model"]["vocab"], *SPECIAL])}
    # ids of a vocabulary in the order of its ids
    ordered = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    vocabulary |= {name: len(image) + place for place, name in enumerate(ordered)}
    content["model"]["vocab"] = vocabulary
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [
        {"id": vocabulary[name], "content": name, **flags, "special": True} for name in [*image, *SPECIAL]
    ]
    start, end = image[codes], image[codes + 1]
    named = {"bos_token": start, "eos_token": end, "pad_token": end}
    extra = {"grid_bos_token": "<sop>", "grid_eos_token": "<eop>", "image_token": "<|image|>"}
    half = [0.5, 0.5, 0.5]
    files = {
        "tokenizer.json": content,
        "tokenizer_config.json": named | extra | {
            "clean_up_tokenization_spaces": False, "extra_special_tokens": extra, "model_max_length": 128000,
            "padding_side": "left", "processor_class": "GlmImageProcessor", "tokenizer_class": "TokenizersBackend",
        },
        "preprocessor_config.json": {
            "image_processor_type": "GlmImageImageProcessor", "processor_class": "GlmImageProcessor", "do_resize": True,
            "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "rescale_factor": 1 / 255,
            "image_mean": half, "image_std": half, "patch_size": 16, "temporal_patch_size": 1, "merge_size": 1,
            "resample": 3, "size": {"shortest_edge": 262144, "longest_edge": 4194304},
        },
    }  # fmt: skip
    for name, part in files.items():
        (folder / name).write_text(json.dumps(part, indent=2, ensure_ascii=False))
    template = TEMPLATE.replace("START", str(codes)).replace("END", str(codes + 1))
    (folder / "chat_template.jinja").write_text(template)
    return vocabulary


if __name__ == "__main__":
    out = write(Path(sys.argv[1]))
    words = " ".join(f"model.{key}={value}" for key, value in settings(out).items())
    print(f"python run.py model=glm-image {words} decoder=scd prompts=file prompts.path=FILE evaluation=none limit=2")
