"""A small random SimpleAR in the public layout: files, names, fields and special tokens of Daniel0724/SimpleAR-0.5B-RL.

Beside it cosmos/, its image tokeniser in the layout of nvidia/Cosmos-1.0-Tokenizer-DV8x16x16: two TorchScript files.
python -m tests.helpers.checkpoints_simplear OUT
"""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from sjd2.files import ROOT
from sjd2.models.emu3 import PIECES
from tests.helpers.checkpoints_emu3 import WORDS, randomise

LEVELS = (4, 4, 4)
# Qwen2.5's first, then those that simpar/train/train.py adds
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<|t2i|>", "<|i2t|>", "<|soi|>", "<|vtokens|>", "<|t2v|>", "<|v2t|>", "<|sov|>"]
KEYS = ROOT / "tests" / "fixtures" / "keys" / "cosmos-dv8x16x16.txt"
GAIN = {"decoder.conv_out.1.conv3d.weight": 0.1, "quant_conv.conv3d.weight": 6.0}  # pixels in [-1, 1], different codes
DEEPER = re.compile(r"encoder\.down\.\d\.block\.1\.|decoder\.up\.\d\.block\.2\.")  # the second block of every level
WIDTHS = {128: 8, 256: 16, 512: 24, 16: 4}  # channels of the full size -> here


def write(folder: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """Write the checkpoint: a model of width 32 and 2 layers; tied: one table for inputs and outputs, as published."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=vocabulary + prod(LEVELS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, max_window_layers=2,
        use_sliding_window=False, tie_word_embeddings=tied, rms_norm_eps=1e-6,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    randomise(model, seed)
    tensors = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    content = config.to_dict()
    # as transformers 4.49 writes the rotary settings
    content |= {"rope_theta": 1000000.0, "rope_scaling": None, "architectures": ["SimpARForCausalLM"]}
    content |= {"torch_dtype": "bfloat16", "transformers_version": "4.49.0.dev0", "use_cache": True}
    for late in ("rope_parameters", "layer_types", "dtype"):
        content.pop(late, None)
    # Qwen2.5-Instruct's, with which the training began
    generation = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8}
    for name, part in {"config.json": content, "generation_config.json": generation}.items():
        (folder / name).write_text(json.dumps(part, indent=2))
    write_cosmos(folder / "cosmos")
    return folder


def settings(folder: Path) -> dict[str, Any]:
    """Return the settings of conf/model/simplear.yaml that this checkpoint needs; the public ones have these in the yaml."""
    sizes = {"vocabulary": prod(LEVELS), "levels": list(LEVELS), "size": 64}
    return {"weights": str(folder), "vq_weights": str(folder / "cosmos"), **sizes}


def write_tokenizer(folder: Path) -> int:
    """Write a byte-level BPE tokenizer that splits text as Qwen2.5's; return how many words it has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    content = json.loads(tokenizer.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    first = len(content["model"]["vocab"])
    content["added_tokens"] = [
        {"id": first + place, "content": name, **flags, "special": True}
        for place, name in enumerate([*SPECIAL, *ADDED])
    ]
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ADDED}
    files = {
        "tokenizer.json": content,
        "special_tokens_map.json": tokens,
        "added_tokens.json": {entry["content"]: entry["id"] for entry in content["added_tokens"]},
        "tokenizer_config.json": tokens | {
            "add_bos_token": False, "add_prefix_space": False, "bos_token": None, "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {str(entry["id"]): {**flags, "content": entry["content"], "special": True}
                                     for entry in content["added_tokens"]},
            "errors": "replace", "model_max_length": 4608, "padding_side": "right", "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
        },
    }  # fmt: skip
    for name, part in files.items():
        (folder / name).write_text(json.dumps(part, indent=2, ensure_ascii=False))
    return first + len(content["added_tokens"])


def cosmos_tensors() -> dict[str, Tensor]:
    """Return the tokeniser's tensors under their published names, narrow, with numbers that need no random generator."""
    tensors = {}
    for line in KEYS.read_text().splitlines():
        if not line.startswith("#") and not DEEPER.match(line):
            name, shape = line.split()
            sizes = [int(size) for size in shape.split("x")]
            narrow = [len(LEVELS) if size == 6 else WIDTHS.get(size, size) for size in sizes[:2]] + sizes[2:]
            waves = (torch.arange(prod(narrow), dtype=torch.float64) * 0.7 + len(tensors)).sin().view(narrow)
            if len(narrow) > 1:  # the sum over the inputs is about as large as one of them
                waves *= GAIN.get(name, 1.0) * (2 / prod(narrow[1:])) ** 0.5
            else:  # of a norm about 1, of a bias about 0
                waves = float(".norm" in name and name.endswith("weight")) + 0.1 * waves
            tensors[name] = waves.float()
    return tensors


def write_cosmos(folder: Path, without: str = "") -> Path:
    """Write encoder.jit and decoder.jit, in bfloat16 as published; without: a tensor that is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("encoder", "decoder"):
        (folder / f"{part}.jit").write_bytes(program(part, without if without.startswith(part) else ""))
    (folder / "config.json").write_text(json.dumps({"architectures": ["CosmosTokenizer"]}))
    return folder


@cache
def program(part: str, without: str) -> bytes:
    """Return a TorchScript file of one half; torch takes seconds to write it."""
    own = ("encoder.", "quant_conv.") if part == "encoder" else ("decoder.", "post_quant_conv.")
    root = nn.Module()
    for name, tensor in cosmos_tensors().items():
        if name.startswith(own) and name != without:
            place(root, name, nn.Parameter(tensor.bfloat16(), requires_grad=False))
    constants = "quantizer" if part == "encoder" else "inv_quant.quantizer"
    place(root, f"{constants}._levels", nn.Buffer(torch.tensor(LEVELS, dtype=torch.int32)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, but published like this
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(root), file)
    return file.getvalue()


def place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a tensor under a dotted name, with the modules in between."""
    first, _, rest = name.partition(".")
    if not rest:
        setattr(module, first, tensor)
        return
    if not hasattr(module, first):
        module.add_module(first, nn.Module())
    place(module.get_submodule(first), rest, tensor)


if __name__ == "__main__":
    out = write(Path(sys.argv[1]))
    words = " ".join(f"model.{key}={value}".replace(" ", "") for key, value in settings(out).items())
    print(f"python run.py model=simplear {words} decoder=scd prompts=file prompts.path=FILE evaluation=none limit=2")
