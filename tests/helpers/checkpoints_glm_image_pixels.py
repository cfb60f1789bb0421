"""A small random diffusion stage of GLM-Image in the public layout, beside the AR stage's folders.

python -m tests.helpers.checkpoints_glm_image_pixels OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

# model_index.json of zai-org/GLM-Image: component -> library and class
COMPONENTS = {
    "processor": ("transformers", "GlmImageProcessor"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "ByT5Tokenizer"),
    "transformer": ("diffusers", "GlmImageTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "vision_language_encoder": ("transformers", "GlmImageForConditionalGeneration"),
}


def write_diffusion(folder: Path, *, codes: int = 64, seed: int = 0) -> Path:
    """Write transformer (2 layers of width 32), VAE (width 4), text encoder (width 16), their tokenizer and scheduler."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImageTransformer2DModel

    torch.manual_seed(seed)
    text = T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    T5EncoderModel(text).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        text_embed_dim=16, time_embed_dim=32, condition_dim=8, prior_vq_quantizer_codebook_size=codes,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=2, layers_per_block=1,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
        latents_mean=[0.1] * 4, latents_std=[0.5] * 4, shift_factor=None, scaling_factor=1.0,
    ).save_pretrained(folder / "vae")  # fmt: skip
    FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    ).save_pretrained(folder / "scheduler")
    index = {"_class_name": "GlmImagePipeline", "_diffusers_version": "0.37.0"}
    (folder / "model_index.json").write_text(json.dumps(index | COMPONENTS, indent=2))
    return folder


if __name__ == "__main__":
    write_diffusion(Path(sys.argv[1]))
