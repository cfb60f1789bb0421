"""Small random checkpoints in the layouts of the public Lumina-mGPT and Anole files, to load by exactly the same path.

    python -m tests.helpers.checkpoints_chameleon lumina OUT  # OUT/model as Lumina-mGPT-7B-768, OUT/tokenizer as Meta's
    python -m tests.helpers.checkpoints_chameleon anole OUT   # OUT/model as Anole-7b-v0.1-hf, OUT/tokenizer likewise

File names, tensor names, config fields and token ids are the public ones (all ids that the loader and the prompts use, the
text's own are fewer); widths, depth and the text vocabulary are small. Sources: file lists of Alpha-VLLM/Lumina-mGPT-7B-768,
-512 and -1024, leloy/Anole-7b-v0.1-hf and GAIR/Anole-7b-v0.1; convert_chameleon_weights_to_hf.py of Alpha-VLLM/Lumina-mGPT
and of huggingface/transformers; the configs in jadohu/LANTERN's data/configs.
"""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from torch import Tensor
from transformers import ChameleonVQVAEConfig

from sjd2.models.vqgan import VQGAN, _taming

CODES, FIRST = 8192, 4  # image codes, and the id of code 0
EOI, BOI, TURN, ROW_END, CELL0 = 8196, 8197, 8710, 8803, 8804
WIDTH, LAYERS, HEADS, INNER, VOCABULARY = 32, 2, 2, 48, 9000
IMAGE = "<image>"  # the conversions' name of <reserved08707>
LUMINA = "Alpha-VLLM/Lumina-mGPT-7B-768"
# the public config says so; the language model's files hold no image tokeniser
VQ_CONFIG = {
    "attn_resolutions": [], "ch": 128, "ch_mult": [1, 1, 2, 2, 4], "double_z": False, "model_type": "chameleon_vqgan",
    "n_embed": 8192, "out_ch": 3, "z_channels": 256,
}  # fmt: skip


def names() -> dict[str, int]:
    """Number the vocabulary as Chameleon does: specials, codes (IMGIMG + digits as letters + Z), reserved names, text."""
    digits = str.maketrans(string.digits, "ABCDEFGHIJ")
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {f"IMGIMG{str(code).translate(digits)}Z": FIRST + code for code in range(CODES)}
    vocabulary |= {"<eoss>": EOI, "<racm3:break>": BOI}
    vocabulary |= {f"<reserved{number - 4:05d}>": number for number in range(BOI + 1, CELL0 + 40)}
    vocabulary[IMAGE] = vocabulary.pop("<reserved08707>")
    text = [*string.printable[:95], "\n", "th", "he", "in", "an", " a"]
    return vocabulary | {piece: CELL0 + 40 + place for place, piece in enumerate(text)}


def tokenizer() -> Tokenizer:
    """Make a tokenizer of characters and a few pairs; like the public one it puts <s> before the text when asked to."""
    vocabulary = names()
    merges = [("t", "h"), ("h", "e"), ("i", "n"), ("a", "n"), (" ", "a")]
    words = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    words.decoder = decoders.Fuse()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = [name for name, number in vocabulary.items() if number < CELL0 + 40]
    words.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return words


def language_model(norm_rows: int, seed: int, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """Draw the language model's tensors in bfloat16; norm_rows: 1 as Lumina-mGPT's, HEADS as transformers' conversions."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, spread: float) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * spread).bfloat16()

    def norm(*shape: int) -> Tensor:
        return (1 + 0.2 * torch.randn(shape, generator=generator)).bfloat16()

    tensors = {"model.embed_tokens.weight": matrix(vocabulary, WIDTH, 1.0)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in (
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
        ):  # sharp: small weights make a model that hardly looks back
            tensors[f"{at}self_attn.{name}.weight"] = matrix(WIDTH, WIDTH, 1.5 * WIDTH**-0.5)
        for name in ("q_norm", "k_norm"):
            tensors[f"{at}self_attn.{name}.weight"] = norm(norm_rows, WIDTH // HEADS)
            tensors[f"{at}self_attn.{name}.bias"] = norm(norm_rows, WIDTH // HEADS) - 1
        for name, shape in (("gate_proj", (INNER, WIDTH)), ("up_proj", (INNER, WIDTH)), ("down_proj", (WIDTH, INNER))):
            tensors[f"{at}mlp.{name}.weight"] = matrix(*shape, 1.5 * shape[1] ** -0.5)
        tensors[f"{at}input_layernorm.weight"] = norm(WIDTH)
        tensors[f"{at}post_attention_layernorm.weight"] = norm(WIDTH)
    return tensors | {"model.norm.weight": norm(WIDTH), "lm_head.weight": matrix(vocabulary, WIDTH, 0.5)}


def vqgan(seed: int) -> VQGAN:
    """Build a VQGAN of Chameleon's shape (5 levels, 16x, 8192 codes) with few channels."""
    torch.manual_seed(seed)
    config = ChameleonVQVAEConfig(
        embed_dim=8, latent_channels=8, base_channels=32, channel_multiplier=[1, 1, 2, 2, 4], num_res_blocks=1,
        num_embeddings=CODES,
    )  # fmt: skip
    model = VQGAN(config).eval()
    torch.nn.init.normal_(model.codebook)
    return model


def vqgan_tensors(model: VQGAN) -> dict[str, Tensor]:
    """Return its tensors under taming-transformers' names."""
    levels = len(model.decoder.up)
    return {_taming(key, levels): value.detach().clone() for key, value in model.state_dict().items()}


def write_tokenizer_folder(folder: Path, seed: int = 0) -> None:
    """Write Meta's tokenizer folder: vqgan.ckpt, vqgan.yaml, text_tokenizer.json and their check sums."""
    folder.mkdir(parents=True, exist_ok=True)
    state = vqgan_tensors(vqgan(seed)) | {
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.0.bias": torch.zeros(4),
    }
    torch.save({"state_dict": state}, folder / "vqgan.ckpt")
    (folder / "vqgan.yaml").write_text("model:\n  params:\n    embed_dim: 8\n    n_embed: 8192\n")
    (folder / "checklist.chk").write_text("0  vqgan.ckpt\n")
    words = json.loads(tokenizer().to_str().replace(json.dumps(IMAGE), '"<reserved08707>"'))
    (folder / "text_tokenizer.json").write_text(json.dumps(words, ensure_ascii=False))


def write_sharded(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Write model-0000i-of-0000n.safetensors and their index, tensors of one layer together."""
    listed = list(tensors)
    size = -(-len(listed) // shards)
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = listed[number * size : (number + 1) * size]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def write_config(folder: Path, **more: object) -> None:
    """Write config.json and generation_config.json with the public fields, wrong bos id included."""
    config = {
        "architectures": ["ChameleonForConditionalGeneration"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": WIDTH, "initializer_range": 0.02,
        "intermediate_size": INNER, "max_position_embeddings": 4096, "mlp_bias": False, "model_parallel_size": 1,
        "model_type": "chameleon", "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "swin_norm": False, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.3", "use_cache": True, "vocab_size": VOCABULARY,
        "vocabulary_map": names(), "vq_config": VQ_CONFIG,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | more, indent=2) + "\n")
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.43.3"}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def write_words(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    tokenizer().save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "sep_token": "<reserved08706>",
        "unk_token": "<unk>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    settings = special | {
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_lumina(folder: Path, *, words: bool = True, seed: int = 0) -> None:
    """Write a Lumina-mGPT-7B-768; words=False: as -512 and -1024, which hold no tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, architectures=["ChameleonXLLMXForConditionalGeneration"], dropout=0.05, z_loss_weight=1e-05)
    write_sharded(folder, language_model(1, seed), 2)
    if words:
        write_words(folder)


def write_anole(folder: Path, *, seed: int = 1) -> None:
    """Write an Anole-7b-v0.1-hf: a norm per head, and the image tokeniser with its decoder within the model's files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(
        folder, transformers_version="4.43.0.dev0", boi_token_id=BOI, eoi_token_id=EOI, image_token_id=TURN + 1
    )
    inner = {f"model.vqmodel.{name}": tensor for name, tensor in vqgan_tensors(vqgan(seed)).items()}
    write_sharded(folder, language_model(HEADS, seed) | inner, 3)
    write_words(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ChameleonImageProcessor"}))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": 1024, "image_token": IMAGE}))


def main(kind: str, out: Path) -> None:
    """Write a checkpoint and Meta's tokenizer folder, and say how to run them."""
    {"lumina": write_lumina, "anole": write_anole}[kind](out / "model")
    write_tokenizer_folder(out / "tokenizer")
    size = " model.size=64" if kind == "lumina" else " model.rows=4 model.columns=4"
    print(
        f"python run.py model={kind}{size} model.weights={out}/model model.vq_weights={out}/tokenizer/vqgan.ckpt decoder=scd "
        "prompts=file prompts.path=FILE evaluation=none limit=2"
    )


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("lumina", "anole"):
        sys.exit("usage: python -m tests.helpers.checkpoints_chameleon lumina|anole OUT")
    main(sys.argv[1], Path(sys.argv[2]))
