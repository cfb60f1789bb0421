"""Chameleon's language model as the image-generating checkpoints hold it: transformers' class without its image tokeniser.

Lumina-mGPT's files have one query and one key norm per layer for all heads ([1, head width], as in Lumina-mGPT's
modeling_chameleon), the conversions of Chameleon and Anole a row per head; both load here and compute the same.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import ChameleonConfig, ChameleonForConditionalGeneration
from transformers.models.chameleon.modeling_chameleon import ChameleonLayerNorm


class ChameleonLM(ChameleonForConditionalGeneration):
    """`ChameleonForConditionalGeneration` without `vqmodel`: pixels go through `vqgan.VQGAN`, which has the decoder too.

    norm_rows: rows of each query and key norm, 1 (shared by all heads) or None (one per head).
    """

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^model\.vqmodel\."]

    def __init__(self, config: ChameleonConfig) -> None:
        super().__init__(config)
        network: Any = self.model  # the stubs have neither a model without vqmodel nor the layers' attributes
        network.vqmodel = None
        rows = getattr(config, "norm_rows", None)
        if rows is not None:
            for layer in network.layers:
                attention = layer.self_attn
                # the norm multiplies [..., heads, width] by its weight, so a single row serves every head
                attention.q_norm = ChameleonLayerNorm((rows, attention.head_dim))
                attention.k_norm = ChameleonLayerNorm((rows, attention.head_dim))


def lm_config(settings: dict[str, Any], names: dict[str, int], norm_rows: int | None) -> ChameleonConfig:
    """Return the config of a checkpoint's config.json; names: the vocabulary for files without one."""
    keywords: dict[str, Any] = settings | {"vocabulary_map": settings.get("vocabulary_map") or names}
    config = ChameleonConfig(**keywords)
    config.norm_rows = norm_rows
    return config
