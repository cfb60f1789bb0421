"""The published architectures with random weights, built on their device: measuring speed needs no checkpoint.

Embedding, head and pixels are the family's own code (`sjd2/models`); only loading is skipped. Prompts are random vectors of
a typical length.

# B samples, P prompt tokens, V image vocabulary, D width, N image-phase tokens
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sjd2.models.base import Condition, ImageModel
from sjd2.models.chameleon import Chameleon
from sjd2.models.emu3 import Emu3, Emu3Pixels
from sjd2.models.glm_image import GlmImage
from sjd2.models.janus import Janus, JanusPixels
from sjd2.models.layout import TokenGrid
from sjd2.models.llamagen import CAPTION_POSITIONS, GridRotary, LlamaGen
from sjd2.models.lumina2 import END, ROW_END, START, Lumina2
from sjd2.models.lumina2 import FIRST_CODE as LUMINA2_CODE
from sjd2.models.simplear import SimpleAR, image_rows

# the model's id of code 0
FIRST_CODE = {"chameleon": 4, "emu3": 151854, "lumina2": LUMINA2_CODE, "simplear": 151672}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One published model.

    sizes: of its transformer, as in its config; pixels: of its image decoder, if not the defaults of its class.
    prompt, nothing: tokens of a typical prompt and of the unconditional one. window: that of SJD2 on this model.
    """

    name: str
    title: str
    family: str
    layout: TokenGrid
    sizes: dict[str, Any]
    pixels: dict[str, Any]
    prompt: int
    nothing: int
    window: int
    guidance: float
    top_k: int

    def build(self, device: torch.device, dtype: torch.dtype) -> ImageModel:
        """Build the model on its device with random weights; the image decoder in float32, as when loaded."""
        make: dict[str, Callable[..., ImageModel]] = {
            "chameleon": RandomChameleon,
            "emu3": RandomEmu3,
            "glm_image": RandomGlmImage,
            "janus": RandomJanus,
            "llamagen": RandomLlamaGen,
            "lumina2": RandomLumina2,
            "simplear": RandomSimpleAR,
        }
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = make[self.family](self, dtype)
        for part in (model.full, model.vq):
            part.eval().requires_grad_(False)
        return model

    def small(self) -> Architecture:
        """Return the same architecture, narrow and shallow, with the same vocabularies and forced tokens."""
        heads = min(4, self.sizes["num_attention_heads"] // self.sizes["num_key_value_heads"])
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": max(1, 4 // heads)}
        pixels = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
        if self.family in ("emu3", "lumina2"):  # has attention at its fourth level, with the width of that level
            pixels |= {"channel_multiplier": [1, 1, 1, 1], "hidden_size": 32}
        if self.family == "simplear":
            pixels = {"width": 32, "factors": (1, 1, 1), "blocks": 1}
        layout = replace(self.layout, rows=4, columns=4, preview=self.layout.preview and (2, 2))
        sizes, pixels = self.sizes | sizes, self.pixels | pixels
        title = f"{self.title}, narrow"
        return replace(self, title=title, layout=layout, sizes=sizes, pixels=pixels, prompt=12, window=16)

    def condition(self, model: ImageModel, batch: int) -> Condition:
        """Return random prompts [B, P, D] of equal length and the unconditional one."""
        transformer: Any = model.transformer
        width = transformer.get_input_embeddings().weight.shape[1]
        # Janus and LlamaGen have an unconditional prompt for each prompt
        alone = batch if self.family in ("janus", "llamagen") else 1
        settings = {"device": model.device, "dtype": model.dtype}
        embeds = [
            torch.randn(rows, count, width, **settings) for rows, count in ((batch, self.prompt), (alone, self.nothing))
        ]
        lengths = [torch.full((len(x),), x.shape[1], device=model.device) for x in embeds]
        return Condition(embeds[0], lengths[0], embeds[1], lengths[1])


def _text(sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a transformer; the sizes win."""
    return {"tie_word_embeddings": False, "attention_dropout": 0.0} | sizes


# of the encoder that transformers' class builds and ours throws away
TINY_VQ = {
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "embed_dim": 4,
    "latent_channels": 4,
    "num_embeddings": 4,
}


class RandomChameleon(Chameleon):
    """Lumina-mGPT or Anole with random weights."""

    def __init__(self, plan: Architecture, dtype: torch.dtype) -> None:
        from transformers import ChameleonConfig, ChameleonVQVAEConfig

        from sjd2.models.chameleon_lm import ChameleonLM
        from sjd2.models.vqgan import VQGAN

        config = ChameleonConfig(**_text(plan.sizes), vocabulary_map={"<image>": 8711}, vq_config=TINY_VQ)
        self.full = ChameleonLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
        ImageModel.__init__(self, self.full.get_decoder(), plan.layout)
        self.head_module = self.full.lm_head
        self.vq = VQGAN(ChameleonVQVAEConfig(num_embeddings=plan.layout.vocabulary, **plan.pixels))
        self.first_code = FIRST_CODE[plan.family]
        self.ids = _ids(plan.layout, self.first_code)


class RandomEmu3(Emu3):
    """Emu3-Gen with random weights."""

    def __init__(self, plan: Architecture, dtype: torch.dtype) -> None:
        from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3VQVAE

        config: Any = Emu3Config(
            text_config=_text(plan.sizes), vq_config=plan.pixels, vocabulary_map={"<image>": 151851}
        )
        full: Any = Emu3ForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
        full.model.vqmodel = None
        self.full = full
        ImageModel.__init__(self, self.full.get_decoder(), plan.layout)
        self.head_module = self.full.lm_head
        self.vq = Emu3Pixels(Emu3VQVAE(config.vq_config).float())
        self.first_code = FIRST_CODE[plan.family]
        self.ids = _ids(plan.layout, self.first_code)


class RandomJanus(Janus):
    """Janus-Pro with random weights."""

    def __init__(self, plan: Architecture, dtype: torch.dtype) -> None:
        from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig

        width = plan.sizes["hidden_size"]
        joint = {"projection_dim": width, "image_token_embed_dim": width}
        vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": width}
        config = JanusConfig(
            text_config=LlamaConfig(**_text(plan.sizes)),
            vision_config=vision,  # the vision encoder is not used to generate images
            vq_config=joint | plan.pixels,
        )
        full: Any = JanusForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.full = full
        ImageModel.__init__(self, self.full.get_decoder(), plan.layout)
        self.head_module = self.full.model.generation_head
        self.vq = JanusPixels(full.model.vqmodel.float())
        full.model.vqmodel = None
        self.table = self.full.prepare_embeddings_for_image_generation(torch.arange(plan.layout.vocabulary)).detach()


class RandomGlmImage(GlmImage):
    """GLM-Image's autoregressive stage with random weights and a small vision encoder, which draws nothing."""

    def __init__(self, plan: Architecture, dtype: torch.dtype) -> None:
        from transformers import GlmImageConfig, GlmImageForConditionalGeneration

        head = plan.sizes["hidden_size"] // plan.sizes["num_attention_heads"]
        time = head // 16  # of the head // 4 frequencies, in the public proportions 8 : 12 : 12
        rotary = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5}
        sections = [time, (head // 4 - time) // 2, head // 4 - time - (head // 4 - time) // 2]
        text = _text(plan.sizes) | {"rope_parameters": rotary | {"mrope_section": sections}}
        vision = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2}
        vq = {"num_embeddings": plan.layout.vocabulary, "embed_dim": 8, "latent_channels": 32}
        config = GlmImageConfig(text_config=text, vision_config=vision, vq_config=vq)
        self.fill(
            GlmImageForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa"), plan.layout
        )


class RandomLumina2(Lumina2):
    """Lumina-mGPT 2.0 with random weights."""

    def __init__(self, plan: Architecture, dtype: torch.dtype) -> None:
        from transformers import ChameleonConfig, Emu3VQVAEConfig

        from sjd2.models.chameleon_lm import ChameleonLM
        from sjd2.models.movqgan import MoVQGAN

        config: Any = ChameleonConfig(**_text(plan.sizes), vocabulary_map={"<image>": 0}, vq_config=TINY_VQ)
        config.norm_rows = 1
        self.full = ChameleonLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
        ImageModel.__init__(self, self.full.get_decoder(), plan.layout)
        self.head_module = self.full.lm_head
        pixels = {"base_channels": 256, "channel_multiplier": [1, 2, 2, 4], "hidden_size": 1024} | plan.pixels
        self.vq = MoVQGAN(Emu3VQVAEConfig(codebook_size=plan.layout.vocabulary, double_latent=False, **pixels))
        self.first_code = FIRST_CODE[plan.family]
        self.ids = _ids(plan.layout, self.first_code)


class RandomLlamaGen(LlamaGen):
    """LlamaGen with random weights, without its text encoder."""

    def __init__(self, plan: Architecture, dtype: torch.dtype) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.models.janus.configuration_janus import JanusVQVAEConfig

        from sjd2.models.vq16 import VQ16

        config: Any = LlamaConfig(**_text(plan.sizes))
        self.full = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
        decoder = self.full.get_decoder()
        ImageModel.__init__(self, decoder, plan.layout)
        decoder.rotary_emb = GridRotary(plan.layout, config.head_dim)
        self.head_module = self.full.lm_head
        self.vq = VQ16(JanusVQVAEConfig(double_latent=False, **plan.pixels))


class RandomSimpleAR(SimpleAR):
    """SimpleAR with random weights."""

    def __init__(self, plan: Architecture, dtype: torch.dtype) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        from sjd2.models.cosmos import CosmosTokenizer

        config: Any = Qwen2Config(**_text(plan.sizes))
        self.full = Qwen2ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
        ImageModel.__init__(self, self.full.get_decoder(), plan.layout)
        self.first_code = FIRST_CODE[plan.family]
        self.full.lm_head = image_rows(self.full.lm_head, self.first_code, plan.layout.vocabulary)
        self.head_module = self.full.lm_head
        self.vq = CosmosTokenizer((8, 8, 8, 5, 5, 5), **plan.pixels)


def _ids(layout: TokenGrid, first: int) -> torch.Tensor:
    """Return the model's id of each local id: [V + F]."""
    return torch.cat(
        [torch.arange(first, first + layout.vocabulary), torch.tensor(layout.forced_ids, dtype=torch.long)]
    )


def weight_bytes(model: ImageModel) -> dict[str, int]:
    """Return the bytes of weights that one pass reads: transformer layers with the last norm, image rows of the head."""
    transformer: Any = model.transformer
    layers, head = _bytes(transformer.layers) + _bytes(transformer.norm), model.head_module
    if isinstance(head, nn.Linear):
        return {"layers": layers, "head": model.layout.vocabulary * head.in_features * head.weight.element_size()}
    return {"layers": layers, "head": 0 if head is None else _bytes(head)}


def text_config(model: ImageModel) -> Any:
    """Return transformers' config of a model's transformer."""
    transformer: Any = model.transformer
    return transformer.config.get_text_config()


def head_width(model: ImageModel) -> int:
    """Return the width of one attention head."""
    config = text_config(model)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def entry_bytes(model: ImageModel) -> int:
    """Return the bytes of keys and values of one token in one model row."""
    config = text_config(model)
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_width(model)
    return numbers * torch.empty(0, dtype=model.dtype).element_size()


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


SEVEN = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32}
CHAMELEON = SEVEN | {"intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 65536, "rms_norm_eps": 1e-5}
QWEN = {"vocab_size": 151672 + 64000, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
JANUS = {"vocab_size": 102400, "rms_norm_eps": 1e-6, "max_position_embeddings": 16384}
# sizes as in the published configs, prompts of one sentence, sampling parameters as in conf/model
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture(
            name="lumina", title="Lumina-mGPT 7B, 768 px", family="chameleon",
            layout=TokenGrid(48, 48, 8192, (8197, 8828, 8828), 8803, (8196, 8710)),
            sizes=CHAMELEON | {"max_position_embeddings": 10240}, pixels={}, prompt=40, nothing=1, window=96,
            guidance=3.0, top_k=2000,
        ),
        Architecture(
            name="lumina2", title="Lumina-mGPT 2.0 7B, 768 px", family="lumina2",
            layout=TokenGrid(96, 96, 16384, (START, 8824, 8824), ROW_END, (END,)),
            sizes=CHAMELEON | {"vocab_size": 171385, "max_position_embeddings": 10240}, pixels={}, prompt=40, nothing=1,
            window=96, guidance=4.0, top_k=4096,
        ),
        Architecture(
            name="anole", title="Anole 7B, 512 px", family="chameleon", layout=TokenGrid(32, 32, 8192),
            sizes=CHAMELEON, pixels={}, prompt=24, nothing=2, window=96, guidance=3.0, top_k=2000,
        ),
        Architecture(
            name="emu3", title="Emu3-Gen 8B, 720 px", family="emu3",
            layout=TokenGrid(90, 90, 32768, (), 151846, (151847, 151853, 151850)),
            sizes=SEVEN | {"num_key_value_heads": 8, "intermediate_size": 14336, "num_hidden_layers": 32}
            | {"vocab_size": 184622, "rms_norm_eps": 1e-5},
            pixels={}, prompt=40, nothing=60, window=128, guidance=3.0, top_k=2048,
        ),
        Architecture(
            name="janus-1b", title="Janus-Pro 1B, 384 px", family="janus", layout=TokenGrid(24, 24, 16384),
            sizes=JANUS | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24}
            | {"num_attention_heads": 16, "num_key_value_heads": 16},
            pixels={}, prompt=32, nothing=32, window=64, guidance=5.0, top_k=0,
        ),
        Architecture(
            name="janus-7b", title="Janus-Pro 7B, 384 px", family="janus", layout=TokenGrid(24, 24, 16384),
            sizes=JANUS | SEVEN | {"intermediate_size": 11008, "num_hidden_layers": 30},
            pixels={}, prompt=32, nothing=32, window=64, guidance=5.0, top_k=0,
        ),
        Architecture(
            name="llamagen", title="LlamaGen-XL, 512 px", family="llamagen", layout=TokenGrid(32, 32, 16384),
            sizes={"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 36, "vocab_size": 16384}
            | {"num_attention_heads": 20, "num_key_value_heads": 20, "rms_norm_eps": 1e-5},
            pixels={}, prompt=CAPTION_POSITIONS, nothing=CAPTION_POSITIONS, window=64, guidance=7.5, top_k=1000,
        ),
        Architecture(
            name="glm-image", title="GLM-Image 9B, 1024 px", family="glm_image",
            layout=TokenGrid(32, 32, 16384, suffix=(16385,), preview=(16, 16)),
            sizes=SEVEN | {"num_key_value_heads": 2, "intermediate_size": 13696, "num_hidden_layers": 40}
            | {"vocab_size": 168064, "vision_vocab_size": 16512, "rms_norm_eps": 1e-5},
            pixels={}, prompt=40, nothing=13, window=96, guidance=1.0, top_k=0,
        ),
        Architecture(
            name="simplear-0.5b", title="SimpleAR 0.5B, 1024 px", family="simplear", layout=TokenGrid(64, 64, 64000),
            sizes=QWEN | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
            | {"num_attention_heads": 14},
            pixels={}, prompt=24, nothing=34, window=96, guidance=6.0, top_k=0,
        ),
        Architecture(
            name="simplear-1.5b", title="SimpleAR 1.5B, 1024 px", family="simplear", layout=TokenGrid(64, 64, 64000),
            sizes=QWEN | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
            | {"num_attention_heads": 12},
            pixels={}, prompt=24, nothing=34, window=96, guidance=6.0, top_k=0,
        ),
    )
}  # fmt: skip
