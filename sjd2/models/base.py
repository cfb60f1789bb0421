"""What the engine knows of a loaded model: `ImageModel`, which every family derives from, and `Condition`, its prompts.

# B samples, R model rows (2B with guidance, else B), S slots of a pass, P prompt tokens, V image vocabulary, D width, N tokens
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sjd2.compiler import Compiler
from sjd2.models.kv_cache import RowCache, additive, cache_argument
from sjd2.models.layout import TokenGrid

if TYPE_CHECKING:
    from sjd2.models.adapter import Adapter
    from sjd2.models.spec import ModelSpec
    from sjd2.models.timesteps import Timesteps


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


class ImageModel:
    """An autoregressive text-to-image model as the engine sees it; families add prompts, embeddings, the head and pixels.

    Token ids are local (layout.py). codebook: [V, C], for neighbour tables. transformer: what transformers' `get_decoder()`
    returns; calling below `ForConditionalGeneration` keeps PEFT, quantisation and sharding, and avoids heads that mask image
    logits.
    """

    # Any: transformers' own classes; as nn.Module every attribute of theirs would be a Tensor or a Module to a type checker
    transformer: Any
    full: Any  # the class around it, with head and text embeddings
    codebook: Tensor
    pixel_part: ClassVar[str] = "image"  # what the seconds from tokens to pixels are called: image, or diffusion
    spec: ModelSpec | None = None  # what it was loaded from; None for a model that was built in place
    vq: Any = None  # its image tokeniser; None where there is none that encodes
    encoded_size: tuple[int, int] | None = None  # pixels (H, W) that `vq` encodes; None: those that `decode` returns

    def __init__(self, transformer: nn.Module, layout: TokenGrid) -> None:
        self.transformer = transformer
        self._cache_argument = cache_argument(type(transformer))
        self.layout = layout
        self.adapter: Adapter | None = None  # where a fine-tuning is loaded
        self.fused = False  # whether passes over a cache attend in one kernel (window_attention.py)
        # of sjd2.generate: recorded passes, with keys and values, that its next call may replay
        self.graphs: Any = None
        self.compiler: Compiler | None = None  # compiles what a pass does beside the transformer
        self.fast_pixels: Callable[[Tensor], Tensor] | None = None  # tokens to pixels on a GPU (pixels.py)
        self.head_module: nn.Module | None = None  # output weights, for fine-tunings that change all weights

    def __repr__(self) -> str:
        codes = f"{self.layout.length} tokens an image, {self.layout.vocabulary} codes"
        return f"{type(self).__name__}({codes}, {self.device}, {self.dtype})"

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

    def draw(self, tokens: Tensor, prompts: list[str], seeds: list[int]) -> Tensor:
        """Return pixels of the images of these prompts and sample seeds: [B, N] -> uint8 [B, 3, H, W].

        Tokens alone decide them, except where a diffusion stage draws them: it reads the prompt and starts from noise.
        """
        return self.decode(tokens) if self.fast_pixels is None else self.fast_pixels(tokens)

    def warm_up_pixels(self, batch: int) -> None:
        """Run once what `draw` runs for a batch of this size, as first calls are slow; a diffusion stage takes few steps."""
        self.draw(self.layout.forced().clamp(min=0).to(self.device).expand(batch, -1), [""] * batch, [0] * batch)

    def image_start(self, lengths: Tensor) -> Tensor:
        """Return the position id of the image's first token after prompts of `lengths` tokens: [R] -> [R].

        The token count itself, but for models whose prompts fill a fixed number of places (LlamaGen).
        """
        return lengths

    def rotary_ids(self, positions: Tensor) -> Tensor:
        """Return the position ids that the transformer takes for ours: [R, S] -> [R, S], or [axes, R, S].

        Ours count from 0 in the prompt and from `image_start` in the image, one by one.
        """
        return positions

    def cache(self, rows: int, capacity: int) -> RowCache:
        """Return an empty cache for `rows` model rows of up to `capacity` tokens."""
        layers = self.transformer.config.get_text_config().num_hidden_layers
        return RowCache(layers, rows, capacity, self.device, fused=self.fused)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: RowCache | None,
        attn_mask: Tensor | None = None,
        gate: Tensor | None = None,
        timesteps: Timesteps | None = None,
    ) -> Tensor:
        """Run the transformer: x [R, S, D], positions [R, S] -> hidden states after the final norm [R, S, D].

        attn_mask [R, S, S]: which slots of the pass see which (None: causal); without a cache it is the whole attention mask.
        gate [R, S]: where gated adapters act (None: nowhere, the pass costs what the plain model costs). timesteps: tokens
        that are appended to the pass and taken off its output.
        """
        num_slots = x.shape[1]
        if timesteps is not None:
            x, positions, attn_mask, gate = timesteps.append(x, positions, attn_mask, gate)
        if cache is not None:
            attention = cache.window(x.shape[1], x.dtype, attn_mask)
        elif attn_mask is not None:
            attention = {"attention_mask": additive(attn_mask, x.dtype)[:, None]}
        else:
            size = x.shape[1]
            mask = additive(torch.ones(size, size, dtype=torch.bool, device=x.device).tril(), x.dtype)
            attention = {"attention_mask": mask.expand(len(x), 1, size, size)}
        if self.adapter is not None:
            self.adapter.set_gate(gate)
        hidden = self.transformer(
            inputs_embeds=x,
            position_ids=self.rotary_ids(positions),
            use_cache=cache is not None,
            **{self._cache_argument: cache},
            **attention,
        ).last_hidden_state.to(x.device)
        return hidden[:, :num_slots] if timesteps is not None else hidden
