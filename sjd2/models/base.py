"""What the engine knows of a model: `ImageModel`, which every family derives from, and `ModelSpec`, its settings without weights.

# B samples, R model rows (2B with guidance, else B), S slots of a pass, P prompt tokens, V image vocabulary, D width, N tokens
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sjd2.files import digest
from sjd2.models.kv_cache import RowCache, additive
from sjd2.models.layout import TokenGrid
from sjd2.models.weights import Source, check_loading, check_part, locate, locate_part, reach

if TYPE_CHECKING:
    from sjd2.models.adapter import Adapter


@dataclass
class Condition:
    """Encoded prompts, right-padded: embeds [B, P, D], lengths [B]; the unconditional branch has 1 row (shared) or B.

    An unconditional prompt may have length 0 (its one row of padding is then never seen) where the first image token is
    forced.
    """

    embeds: Tensor
    lengths: Tensor
    uncond_embeds: Tensor
    uncond_lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a configuration says of a model, checked without loading a weight; families add their own settings.

    weights: local folder or hub id. vocabulary: V. adapter: folder or hub id of an SJD2 fine-tuning. attention: kernel of
    transformers. revision: of `weights` on the hub. device_map, quantisation: how transformers loads (null: all on one
    device, in `dtype`). sampling: the model's customary law.
    """

    name: str
    weights: str
    vocabulary: int
    adapter: str | None = None
    attention: str = "sdpa"
    revision: str | None = None
    device_map: str | None = None
    quantisation: str | None = None
    sampling: dict[str, float] = field(default_factory=dict)

    @property
    def layout(self) -> TokenGrid:
        """Return which token stands where."""
        raise NotImplementedError

    def sources(self) -> list[Source]:
        """Return where each part of the weights lies, the language model first."""
        raise NotImplementedError

    def build(self, device: torch.device, dtype: torch.dtype) -> ImageModel:
        """Load everything but the adapter."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise `UserError` if a setting is wrong, or weights are neither here nor on the hub; takes seconds."""
        from sjd2.models.adapter import read_settings

        check_loading(self.quantisation, self.device_map)
        _ = self.layout
        if self.adapter is not None:  # first: it is mostly local, while the next lines may ask the hub
            check_part(self._adapter(), read_settings)
        for source in self.sources():
            reach(source)

    def digest(self) -> str:
        """Return 12 hex digits over all weights and the adapter; fetches what is not on this machine."""
        return digest(*map(locate, self.sources()), locate_part(self._adapter()) if self.adapter else None)

    def load(self, device: str = "cpu", dtype: str = "float32") -> ImageModel:
        """Load all weights: dtype is a torch dtype's name. Raises `UserError` if a file does not fit."""
        from sjd2.models.adapter import Adapter

        self.check()
        model = self.build(torch.device(device), getattr(torch, dtype))
        if self.adapter is not None:
            model.adapter = Adapter.load(locate_part(self._adapter()), model)
        return model

    def _adapter(self) -> Source:
        return Source(str(self.adapter), "model.adapter", files=("sjd2.json",))


class ImageModel:
    """An autoregressive text-to-image model as the engine sees it; families add prompts, embeddings, the head and pixels.

    Token ids are local (layout.py). codebook: [V, C], for neighbour tables. transformer: what transformers' `get_decoder()`
    returns; calling below `ForConditionalGeneration` keeps PEFT, quantisation and sharding, and avoids heads that mask image
    logits.
    """

    codebook: Tensor

    def __init__(self, transformer: nn.Module, layout: TokenGrid) -> None:
        self.transformer = transformer
        self.layout = layout
        self.adapter: Adapter | None = None  # where a fine-tuning is loaded
        self.head_module: nn.Module | None = None  # output weights, for fine-tunings that change all weights

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def encode(self, prompts: list[str]) -> Condition:
        """Encode prompts for both guidance branches, right-padded."""
        raise NotImplementedError

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the model inputs of local token ids: [B, S] -> [B, S, D]."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the image vocabulary in float32, from the image rows of the head only: [..., D] -> [..., V]."""
        raise NotImplementedError

    def decode(self, tokens: Tensor) -> Tensor:
        """Return pixels of whole images: [B, N] -> uint8 [B, 3, H, W]."""
        raise NotImplementedError

    def image_start(self, lengths: Tensor) -> Tensor:
        """Return the position id of the image's first token behind prompts of `lengths` tokens: [R] -> [R].

        The token count itself, but for models whose prompts fill a fixed number of places (LlamaGen).
        """
        return lengths

    def cache(self, rows: int, capacity: int) -> RowCache:
        """Return an empty cache for `rows` model rows of up to `capacity` tokens."""
        return RowCache(self.transformer.config.get_text_config().num_hidden_layers, rows, capacity, self.device)

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
        return self.transformer(
            inputs_embeds=x,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state.to(x.device)
