"""SimpleAR: a Qwen2.5 whose vocabulary goes on with 64,000 image codes; squares of Cosmos codes, no forced tokens.

Prompts, guidance and sampling are those of generate.py in wdrink/SimpleAR; the language model is transformers' own Qwen2.

# B samples, S slots of a pass, P prompt tokens, V image vocabulary, D width, N image-phase tokens
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sjd2.errors import UserError
from sjd2.models.base import Condition, ImageModel
from sjd2.models.cosmos import DOWN, FILES, CosmosTokenizer
from sjd2.models.hub import WeightSource, locate
from sjd2.models.layout import TokenGrid
from sjd2.models.loading import load_pretrained, load_tokenizer, read_config
from sjd2.models.shared import image_logits, pad_right
from sjd2.models.spec import ModelSpec

PUBLIC = 1024  # pixels: what the public checkpoints were trained on last
TASK, START = "<|t2i|>", "<|soi|>"  # TASK text START codes
CHUNK = 4  # images decoded at once: one of 1024 px takes 70 MB per layer at the finest level
# generate.py in wdrink/SimpleAR: what stands before every prompt, and the text of the unconditional branch
PREFIX = "A highly realistic image of "
NEGATIVE = (
    "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, bad eyes, "
    "bad limbs, distortion"
)


@dataclass(frozen=True, kw_only=True)
class SimpleARSpec(ModelSpec):
    """A SimpleAR checkpoint.

    size: side of its square images in pixels. vq_weights: the image tokeniser, folder or hub id. levels: of its codes'
    channels. prefix: stands before each prompt; negative: text of the unconditional branch.
    """

    vq_weights: str
    size: int | str = PUBLIC
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    prefix: str = PREFIX
    negative: str = NEGATIVE

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or not DOWN <= self.size <= PUBLIC or self.size % DOWN:
            raise UserError(
                f"model.size must be the side of a square in multiples of {DOWN} pixels, {PUBLIC} at most (what SimpleAR was "
                f"trained on), got {self.size}."
            )
        if math.prod(self.levels) != self.vocabulary:
            raise UserError(
                f"model.levels make {math.prod(self.levels)} codes, but model.vocabulary is {self.vocabulary}; the public "
                "tokeniser has levels [8,8,8,5,5,5], 64000 codes."
            )

    @property
    def layout(self) -> TokenGrid:
        side = int(self.size) // DOWN
        return TokenGrid(side, side, self.vocabulary)

    def sources(self) -> list[WeightSource]:
        """Return the language model and the image tokeniser."""
        return [
            WeightSource(
                self.weights, "model.weights", ("config.json", "tokenizer_config.json"), revision=self.revision
            ),
            WeightSource(self.vq_weights, "model.vq_weights", required=FILES, patterns=FILES),
        ]

    def build(self, device: torch.device, dtype: torch.dtype) -> SimpleAR:
        return SimpleAR(self, device, dtype)


class SimpleAR(ImageModel):
    """A loaded SimpleAR (contract: `ImageModel`)."""

    spec: SimpleARSpec

    def __init__(self, spec: SimpleARSpec, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import Qwen2ForCausalLM

        folder, vq = map(locate, spec.sources())
        config = read_config(folder, "model.weights", "qwen2", "Daniel0724/SimpleAR-0.5B-RL")
        self.spec = spec
        self.tokenizer = load_tokenizer(folder, "model.weights")
        self.first_code = len(self.tokenizer)  # codes follow the last token of the text, as in the public code
        self._check_tokens(folder, config)
        self.vq = CosmosTokenizer.load(vq, tuple(spec.levels)).to(device)
        self.full = load_pretrained(Qwen2ForCausalLM, folder, spec.load_options(device, dtype), optional=None)
        super().__init__(self.full.get_decoder(), spec.layout)
        self.full.lm_head = image_rows(self.full.lm_head, self.first_code, spec.vocabulary)
        self.head_module = self.full.lm_head

    def _check_tokens(self, folder: Path, config: dict[str, Any]) -> None:
        """Raise `UserError` unless the tokenizer has SimpleAR's words and the model a row for each code."""
        ids, spec = self.tokenizer.get_vocab(), self.spec
        lacking = [token for token in (TASK, START) if token not in ids]
        if lacking:
            raise UserError(
                f"the tokenizer of model.weights={folder} lacks {lacking[0]}, so it is not SimpleAR's but e.g. a Qwen's; use "
                "e.g. Daniel0724/SimpleAR-0.5B-RL."
            )
        rows, needed = config["vocab_size"], self.first_code + spec.vocabulary
        if rows < needed:
            raise UserError(
                f"model.weights={folder} has {rows} rows for {self.first_code} words, so {rows - self.first_code} image "
                f"codes, but model.vocabulary is {spec.vocabulary}."
            )

    @property
    def codebook(self) -> Tensor:
        """The code vectors, a point of a regular grid each: [V, C]."""
        return self.vq.codebook

    def encode(self, prompts: list[str]) -> Condition:
        """Tokenise and embed both guidance branches; the unconditional one, the negative text, is the same for all."""
        texts = [*(self.spec.prefix + prompt for prompt in prompts), self.spec.negative]
        ids = self.tokenizer([TASK + text + START for text in texts])["input_ids"]
        padded, lengths = pad_right(ids[:-1], self.device)
        negative, negative_length = pad_right(ids[-1:], self.device)
        table = self.full.get_input_embeddings()
        return Condition(table(padded), lengths, table(negative), negative_length)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up model inputs: codes [B, S] -> [B, S, D]."""
        return self.full.get_input_embeddings()(tokens + self.first_code)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the image rows of the head, in float32 at least: [..., D] -> [..., V]."""
        return image_logits(self.full.lm_head, hidden, 0, self.layout.vocabulary)

    def decode(self, tokens: Tensor) -> Tensor:
        """Decode whole token sequences to images: [B, N] -> uint8 [B, 3, H, W]."""
        codes = self.layout.codes(tokens.to(self.device))
        return torch.cat([self.vq.decode(images) for images in codes.split(CHUNK)])


def image_rows(head: nn.Linear, first: int, count: int) -> nn.Linear:
    """Return a head of rows first..first + count - 1 of another, as a copy of its own.

    The public head is the input table itself: fine-tunings train both, and one tensor cannot be sharded or saved twice.
    Rows that device_map has left in the host's memory or on disk are read from there.
    """
    with _present(head):
        weight = head.weight[first : first + count].detach().clone()
    rows = nn.Linear(weight.shape[1], count, bias=False, device="meta")
    rows.weight = nn.Parameter(weight, requires_grad=False)
    return rows


def _present(head: nn.Linear) -> contextlib.AbstractContextManager[Any]:
    """Let a head that accelerate keeps elsewhere have its numbers for a moment."""
    if head.weight.device.type != "meta":
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(head)
