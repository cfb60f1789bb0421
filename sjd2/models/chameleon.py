"""Chameleon models that draw: the embedded `tiny`, and by the same path Anole and Lumina-mGPT.

# B samples, R model rows, S slots of a pass, P prompt tokens, V image vocabulary, D width, N image-phase tokens
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sjd2.errors import UserError
from sjd2.layout import TokenGrid
from sjd2.models.base import Backbone, Condition, ModelSpec
from sjd2.models.weights import Source, locate, pretrained, tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChameleonSpec(ModelSpec):
    """A Chameleon checkpoint in transformers' layout that draws rows x columns codes.

    vq_weights: VQGAN folder or taming checkpoint. tokenizer: folder or hub id, where it does not lie with the weights.
    instruction: text put before the prompt. text_end, image_start: tokens behind the text and before the image.
    uncond: tokens of the unconditional prompt; () is legal where the first image token is forced (null: [bos, image_start]).
    """

    vq_weights: str
    rows: int
    columns: int
    tokenizer: str | None = None
    instruction: str = ""
    text_end: tuple[str, ...] = ()
    image_start: tuple[str, ...] = ("<racm3:break>",)
    uncond: tuple[str, ...] | None = None
    prefix: tuple[int, ...] = ()
    row_end: int | None = None
    suffix: tuple[int, ...] = ()

    @property
    def layout(self) -> TokenGrid:
        return TokenGrid(self.rows, self.columns, self.vocabulary, tuple(self.prefix), self.row_end, tuple(self.suffix))

    def sources(self) -> list[Source]:
        words = () if self.tokenizer else ("tokenizer.json",)
        model = Source(self.weights, "model.weights", files=("config.json", *words), revision=self.revision)
        vq = Source(self.vq_weights, "model.vq_weights", patterns=("*.json", "*.safetensors", "*.ckpt"), single=True)
        text = [Source(self.tokenizer, "model.tokenizer", files=("tokenizer.json",))] if self.tokenizer else []
        return [model, vq, *text]

    def build(self, device: torch.device, dtype: torch.dtype) -> Chameleon:
        return Chameleon(self, device, dtype)


class Chameleon(Backbone):
    """A loaded Chameleon text-to-image model (contract: `ImageModel`)."""

    def __init__(self, spec: ChameleonSpec, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import ChameleonForConditionalGeneration

        from sjd2.models.vqgan import VQGAN

        folder, vq, *words = map(locate, spec.sources())
        self.full = pretrained(ChameleonForConditionalGeneration, folder, spec, device, dtype)
        self.tokenizer = tokenizer(*((words[0], "model.tokenizer") if words else (folder, "model.weights")))
        super().__init__(self.full.get_decoder(), spec.layout)
        self.head_module = self.full.lm_head
        self.vq = VQGAN.load(vq).to(device)
        self.spec = spec
        self.told = False
        self.ids = self._token_ids(folder).to(device)  # [V + F] the model's id of each local id
        codes = self.ids[: spec.vocabulary]
        if not torch.equal(codes, torch.arange(int(codes[0]), int(codes[0]) + len(codes), device=device)):
            raise UserError(f"the image codes of {spec.weights} are not one range of ids, which this loader expects.")
        self.first = int(codes[0])

    def _token_ids(self, folder: Path) -> Tensor:
        """Map codes to the model's ids by the names in its vocabulary (IMGIMG + digits as letters + Z)."""
        names = json.loads((folder / "config.json").read_text())["vocabulary_map"]
        letters = str.maketrans("ABCDEFGHIJ", "0123456789")
        codes = {int(name[6:-1].translate(letters)): i for name, i in names.items() if name.startswith("IMGIMG")}
        if sorted(codes) != list(range(self.layout.vocabulary)):
            raise UserError(
                f"the checkpoint names {len(codes)} image codes, model.vocabulary says {self.layout.vocabulary}."
            )
        return torch.tensor([codes[c] for c in range(len(codes))] + list(self.layout.forced_ids))

    @property
    def codebook(self) -> Tensor:
        """The VQ code vectors [V, C]."""
        return self.vq.codebook

    def encode(self, prompts: list[str]) -> Condition:
        """Tokenise and embed both guidance branches; the unconditional one is the same for all prompts."""
        spec, special = self.spec, self.tokenizer.convert_tokens_to_ids
        end, start = special(list(spec.text_end)), special(list(spec.image_start))
        ids = [[*row, *end, *start] for row in self.tokenizer([spec.instruction + p for p in prompts])["input_ids"]]
        unknown = sum(self.tokenizer.unk_token_id in row for row in ids)
        if unknown and not self.told:
            self.told = True
            logger.warning("%d of %d prompts have words that %s does not know.", unknown, len(ids), spec.name)
        nothing = [self.tokenizer.bos_token_id, *start] if spec.uncond is None else special(list(spec.uncond))
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        longest = int(lengths.max())
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=self.device)
        table = self.full.get_input_embeddings()
        empty = torch.tensor([nothing or [0]], device=self.device)  # one row of padding where there is no prompt
        return Condition(table(padded), lengths, table(empty), torch.tensor([len(nothing)], device=self.device))

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up model inputs: local ids [B, S] -> [B, S, D]."""
        return self.full.get_input_embeddings()(self.ids[tokens])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the image rows of the head, in float32 at least: [..., D] -> [..., V]."""
        # a slice of the weight is a view: 8 times cheaper than the whole head of a 65536-token vocabulary
        out = torch.nn.functional.linear(
            hidden, self.full.lm_head.weight[self.first : self.first + self.layout.vocabulary]
        )
        return out if out.dtype == torch.float64 else out.float()

    def decode(self, tokens: Tensor) -> Tensor:
        """Draw complete token sequences: [B, N] -> uint8 [B, 3, H, W]."""
        return self.vq.decode(self.layout.codes(tokens.to(self.device)))
