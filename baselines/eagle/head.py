"""EAGLE's draft head: from a token and the state before it to the state at the token (arXiv 2401.15077, section 3.2).

# B samples, R model rows (2B with guidance, else B), P prompt tokens, S slots of a call, T tree nodes of a pass, D width
Pair t is (embedding of token t + 1, final state f_t); the head turns it into f_{t+1}, which gives the distribution of token
t + 2. Pair t stands at the position of the token whose input gave f_t, and in entry t of the head's own cache.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sjd2.checkpoints import read_part
from sjd2.errors import UserError, choose
from sjd2.models.base import ImageModel
from sjd2.models.fused_layers import put_same
from sjd2.models.kv_cache import RowCache, cache_argument

SETTINGS, WEIGHTS = "eagle.json", "eagle.safetensors"


@dataclass(frozen=True, kw_only=True)
class EagleSettings:
    """How a head is built. norm: put a norm after the layer, as the model's own last layer has."""

    norm: bool = True


def read_settings(folder: Path) -> EagleSettings:
    """Read a head's settings. Raises `UserError` if the folder does not hold one."""
    return read_part(folder, EagleSettings, settings=SETTINGS, weights=WEIGHTS, what="EAGLE head", recipe="eagle")


class PairCache(RowCache):
    """The head's cache; `shift` [R] leads from an image pair's entry to its position, 0 for most models (`starts`)."""

    def __init__(self, rows: int, capacity: int, device: torch.device, *, fused: bool = False) -> None:
        super().__init__(1, rows, capacity, device, fused=fused)
        self.shift = torch.zeros_like(self.lengths)


class EagleHead(nn.Module):
    """One decoder layer of the model's own class; embedding and output head are the model's, frozen and not stored here."""

    def __init__(self, settings: EagleSettings, model: ImageModel) -> None:
        super().__init__()
        transformer = model.transformer
        config = transformer.config.get_text_config()
        width = transformer.get_input_embeddings().weight.shape[1]
        self.settings = settings
        self._model = [model]  # in a list: its weights are not this module's to save
        self.fc = nn.Linear(2 * width, width)
        self.layer = type(transformer.layers[0])(config, 0)
        self._cache_argument = cache_argument(type(self.layer))
        self.norm = copy.deepcopy(transformer.norm) if settings.norm else nn.Identity()
        self.to(device=model.device, dtype=model.dtype).requires_grad_(True)

    @torch.no_grad()
    def start(self, layer: str) -> None:
        """Set first weights: the state passes through fc unchanged; the layer is a copy of the model's last, or random."""
        model = self._model[0]
        if choose("finetune.start", layer, ("last", "random")) == "last":
            source = dict(model.transformer.layers[-1].named_parameters())
            for name, parameter in self.layer.named_parameters():
                if not source[name].is_floating_point():
                    raise UserError("a quantised model's last layer cannot be copied; set finetune.start=random.")
                parameter.copy_(source[name])  # norms that all heads share (Lumina-mGPT) go to every head
        else:
            spread = model.transformer.config.get_text_config().initializer_range
            for module in self.layer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=spread)
        width = self.fc.out_features
        self.fc.weight[:, width:] = torch.eye(width)
        nn.init.zeros_(self.fc.bias)

    def image_start(self, lengths: Tensor) -> Tensor:
        """Return the position id of the image's first token, as the model has it: [R] -> [R]."""
        return self._model[0].image_start(lengths)

    def cache(self, rows: int, capacity: int) -> PairCache:
        """Return an empty cache for `rows` model rows of up to `capacity` pairs, tree nodes of a pass included.

        Its `bound` is the caller's to keep.
        """
        model = self._model[0]
        return PairCache(rows, capacity, model.device, fused=model.fused)

    def forward(
        self,
        embeds: Tensor,
        states: Tensor,
        positions: Tensor,
        cache: Cache | None = None,
        **attention: Any,
    ) -> Tensor:
        """Predict the next states: embeds, states [R, S, D], positions [R, S] -> [R, S, D].

        attention: an `attention_mask`, or what the cache's `window` returned.
        """
        x, model = self.fc(torch.cat([embeds, states], -1)), self._model[0]
        out = self.layer(
            x,
            position_ids=positions,
            use_cache=cache is not None,
            position_embeddings=model.transformer.rotary_emb(x, position_ids=model.rotary_ids(positions)),
            **{self._cache_argument: cache},
            **attention,
        )
        return self.norm(out[0] if isinstance(out, tuple) else out)

    def prefill(
        self, cache: PairCache, rows: Tensor, embeds: Tensor, states: Tensor, lengths: Tensor, token: Tensor
    ) -> Tensor:
        """Put prompts into model rows [b] of the cache and return the predicted state at the first image token: [b, D].

        embeds, states [b, P, D]: the prompt's inputs and final states, right-padded; lengths [b]; token [b]: the first one.
        After a prompt of length 0 no state predicts the first token: its pair has a state of zeros and is not kept.
        """
        count, width = embeds.shape[:2]
        index, last = torch.arange(count, device=embeds.device), (lengths - 1).clamp(min=0)
        following = torch.cat([embeds[:, 1:], embeds[:, :1]], 1)
        following[index, last] = self._model[0].embed(token)
        states = states.masked_fill((lengths == 0)[:, None, None], 0.0)
        scratch = self.cache(count, width)
        attention = scratch.window(width, embeds.dtype)
        positions = torch.arange(width, device=embeds.device).expand(count, -1)
        out = self(following, states, positions, scratch, **attention)
        scratch.lengths = lengths
        cache.take_rows(rows, scratch, index)
        cache.shift[rows] = self.image_start(lengths) - lengths
        return out[index, last]

    def extend(self, cache: PairCache, tokens: Tensor, states: Tensor, count: Tensor) -> Tensor:
        """Add pairs of committed tokens and return the predicted state after the last one of each row: [R, D].

        tokens [B, S] and the true states before them [R, S, D]; the first count [B] of each row are real and stay, what lies
        beyond is overwritten by the next call. Rows of count 0 get a state that means nothing.
        """
        size, branches = tokens.shape[1], len(states) // len(tokens)
        attention = cache.window(size, states.dtype)
        embeds = self._model[0].embed(tokens).repeat(branches, 1, 1)
        out = self(embeds, states, cache.slots + cache.shift[:, None], cache, **attention)
        count = count.repeat(branches)
        cache.lengths = cache.lengths + count
        return out[torch.arange(len(out), device=out.device), (count - 1).clamp(min=0)]

    def step(
        self, cache: PairCache, tokens: Tensor, states: Tensor, depth: Tensor, seen: Tensor, before: int = 0
    ) -> Tensor:
        """Predict the states at S tree nodes from those at their parents: tokens [B, S], states [R, S, D] -> [R, S, D].

        before: nodes of this pass that were stepped already; their entries stand after the committed ones. depth [b, S]:
        1 for the root's children. seen [b, S, before + S]: which nodes each one sees, itself included (b is 1 or B).
        Nothing is committed: the next `extend` overwrites all nodes.
        """
        size, branches = tokens.shape[1], len(states) // len(tokens)
        base = cache.lengths
        seen = seen.expand(len(tokens), -1, -1).repeat(branches, 1, 1)
        cache.lengths = base + before
        attention = cache.window(size, states.dtype, seen, past=True)
        positions = (base + cache.shift)[:, None] + depth.expand(len(tokens), -1).repeat(branches, 1) - 1
        embeds = self._model[0].embed(tokens).repeat(branches, 1, 1)
        out = self(embeds, states, positions, cache, **attention)
        cache.lengths = base
        return out

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write eagle.json and eagle.safetensors with weights of `dtype`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text(json.dumps(asdict(self.settings), indent=1) + "\n")
        state = {name: tensor.detach().to(dtype).contiguous().clone() for name, tensor in self.state_dict().items()}
        save_file(state, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path, model: ImageModel) -> EagleHead:
        """Build the head in `folder` for the model. Raises `UserError` if the two do not fit."""
        head = cls(read_settings(folder), model)
        try:
            stored = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise UserError(f"the EAGLE head {folder / WEIGHTS} cannot be read: {error}") from error
        own = head.state_dict()
        wrong = set(own) ^ set(stored) or {name for name in own if own[name].shape != stored[name].shape}
        if wrong:
            raise UserError(f"the EAGLE head {folder} does not fit this model (e.g. {min(wrong)}).")
        head.load_state_dict({name: tensor.to(model.dtype) for name, tensor in stored.items()})
        put_same(model.transformer, head.layer)
        return head.eval().requires_grad_(False)
