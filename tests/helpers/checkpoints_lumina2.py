"""A small random Lumina-mGPT 2.0 in the public layout, and a small MoVQGAN.

    python -m tests.helpers.checkpoints_lumina2 OUT   # OUT/model as Lumina-mGPT-2.0, OUT/movqgan_270M.ckpt

Ids and names are those of item_processor.py and inference_solver.py in Alpha-VLLM/Lumina-mGPT-2.0 and of Qwen2.5's tokenizer,
which the ids extend; config fields those of its configuration_chameleon.py and of the model.json that Ascend/MindSpeed-MM
converts the weights with. Where the public code only looks a name up (sizes, end of turn), its id here is made up.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import Emu3VQVAEConfig

from sjd2.models.emu3 import PIECES
from sjd2.models.lumina2 import END, FIRST_CODE, MOVQGAN, ROW_END, START
from sjd2.models.movqgan import MoVQGAN, stored_name
from tests.helpers import checkpoints_chameleon
from tests.helpers.checkpoints_emu3 import WORDS, randomise

TURN, SIDES = 151700, range(8800, 8900)
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|file_sep|>")
QWEN_IDS = (151643, 151644, 151645, 151664)


def specials() -> dict[str, int]:
    """Return the special tokens: Qwen's (some of them), the image's, the sizes', the end of turn."""
    names = dict(zip(QWEN, QWEN_IDS, strict=True)) | {"<racm3:break>": START, "<eoss>": END}
    names |= {f"<reserved{8796 + place:05d}>": 151667 + place for place in range(4)}
    assert names["<reserved08799>"] == ROW_END
    sides = {f"<reserved{number:05d}>": TURN + 1 + place for place, number in enumerate(SIDES)}
    return names | {"<reserved08706>": TURN} | sides


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write a byte-level BPE tokenizer that cuts text as Qwen's does and has no beginning of text; return its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, letters])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(WORDS * 2, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    content = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= specials()
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [
        {"id": number, "content": name, **flags, "special": True} for name, number in specials().items()
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    settings = {"bos_token": None, "eos_token": QWEN[0], "pad_token": QWEN[0], "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return vocabulary


def movqgan(codes: int, seed: int = 0) -> MoVQGAN:
    """Build a MoVQGAN of the published shape (4 levels, 8x, attention at the last) with few channels."""
    config = Emu3VQVAEConfig(
        codebook_size=codes, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1, 1, 2],
        num_res_blocks=1, attn_resolutions=[3], hidden_size=64, double_latent=False, temporal_downsample_factor=1,
    )  # fmt: skip
    model = MoVQGAN(config).eval().requires_grad_(False)
    randomise(model, seed)
    return model


def movqgan_tensors(model: MoVQGAN) -> dict[str, Tensor]:
    """Return its tensors as the file has them: attention is made of 1x1 convolutions."""
    tensors = {stored_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    return {
        name: tensor[..., None, None] if ".attn" in name and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }


def write(folder: Path, *, codes: int = 64, seed: int = 0) -> Path:
    """Write model/ and movqgan_270M.ckpt: a model of width 32 and 2 layers, `codes` image codes, 8 pixels a code."""
    at, size = folder / "model", FIRST_CODE + codes + 1
    vocabulary = write_tokenizer(at)
    names = vocabulary | {f"<MOVQGAN{code:05d}>": FIRST_CODE + code for code in range(codes)}
    checkpoints_chameleon.write_config(
        at, architectures=["ChameleonXLLMXForConditionalGeneration"], vocab_size=size, max_position_embeddings=10240,
        mask_image_logits=False, dropout=0.0, z_loss_weight=1e-05, vocabulary_map=names, transformers_version="4.46.2",
    )  # fmt: skip
    checkpoints_chameleon.write_sharded(at, checkpoints_chameleon.language_model(1, seed, size), 2)
    # loaded with strict=False by the public code, and may hold what training needed
    torch.save(movqgan_tensors(movqgan(codes, seed)) | {"loss.logvar": torch.zeros(())}, folder / MOVQGAN)
    return folder


def settings(folder: Path) -> dict[str, Any]:
    """Return the settings of conf/model/lumina2.yaml that this checkpoint needs."""
    codes = len(torch.load(folder / MOVQGAN, weights_only=True)["quantize.embedding.weight"])
    return {"weights": str(folder / "model"), "vq_weights": str(folder), "vocabulary": codes, "size": 32}


if __name__ == "__main__":
    out = write(Path(sys.argv[1]))
    words = " ".join(f"model.{key}={value}" for key, value in settings(out).items())
    print(
        f"python run.py model=lumina2 {words} decoder=scd top_k=0 prompts=file prompts.path=FILE evaluation=none limit=2"
    )
