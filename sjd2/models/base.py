"""What the decoders know of a model (`ImageModel`), and its parts that all transformers backbones share (`Backbone`).

# B samples, R model rows (2B with guidance, else B), S slots of a pass, P prompt tokens, V image vocabulary, D width, N tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from sjd2.cache import RowCache, additive
from sjd2.layout import TokenGrid

if TYPE_CHECKING:
    from sjd2.adapters import Adapter


@dataclass
class Condition:
    """Encoded prompts, right-padded: embeds [B, P, D], lengths [B]; the unconditional branch has 1 row (shared) or B."""

    embeds: Tensor
    lengths: Tensor
    uncond_embeds: Tensor
    uncond_lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)


class ImageModel(Protocol):
    """An autoregressive text-to-image model as the engine sees it. Token ids are local (layout.py)."""

    layout: TokenGrid
    codebook: Tensor  # [V, C], for neighbour tables
    device: torch.device
    dtype: torch.dtype

    def encode(self, prompts: list[str]) -> Condition: ...
    def embed(self, tokens: Tensor) -> Tensor: ...
    def cache(self, rows: int, capacity: int) -> RowCache: ...
    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: RowCache | None,
        visible: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
    def decode(self, tokens: Tensor) -> Tensor: ...


class Backbone:
    """The part of an `ImageModel` that every transformers decoder shares; families add prompts, tables and pixels.

    `decoder` is what `get_decoder()` returns: calling below `ForConditionalGeneration` keeps PEFT, quantisation and sharding,
    and avoids heads that mask image logits.
    """

    def __init__(self, decoder: nn.Module, layout: TokenGrid) -> None:
        self.decoder = decoder
        self.layout = layout
        self.adapter: Adapter | None = None  # where a fine-tuning is loaded
        self.head_module: nn.Module | None = None  # output weights, for fine-tunings that change all weights

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def cache(self, rows: int, capacity: int) -> RowCache:
        """Return an empty cache for `rows` model rows of up to `capacity` tokens."""
        return RowCache(self.decoder.config.get_text_config().num_hidden_layers, rows, capacity, self.device)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: RowCache | None,
        visible: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Run the backbone: x [R, S, D], positions [R, S] -> hidden states after the final norm [R, S, D].

        visible [R, S, S]: which slots of the pass see which (None: causal). gate [R, S]: where gated adapters act (None:
        nowhere, the pass costs what the plain model costs). Without a cache `visible` is the whole attention mask.
        """
        if cache is not None:
            mask = cache.window(x.shape[1], x.dtype, visible)
        elif visible is not None:
            mask = additive(visible, x.dtype)[:, None]
        else:
            size = x.shape[1]
            mask = additive(torch.ones(size, size, dtype=torch.bool, device=x.device).tril(), x.dtype)
            mask = mask.expand(len(x), 1, size, size)
        if self.adapter is not None:
            self.adapter.set_gate(gate)
        return self.decoder(
            inputs_embeds=x,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
