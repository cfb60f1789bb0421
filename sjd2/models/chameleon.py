"""Chameleon models that draw: the embedded `tiny`, and by the same path Anole and Lumina-mGPT.

# B samples, R model rows, S slots of a pass, P prompt tokens, V image vocabulary, D width, N image-phase tokens
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sjd2.errors import UserError
from sjd2.layout import TokenGrid
from sjd2.models.base import Backbone, Condition
from sjd2.paths import digest, find

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChameleonSpec:
    """What a configuration says of a model, checked without loading a weight.

    weights: folder of `from_pretrained` (ChameleonForConditionalGeneration and its tokenizer). vq_weights: VQGAN folder or
    taming checkpoint. adapter: folder of an SJD2 fine-tuning, or None. text_end, image_start: tokens behind the text and
    before the image; the unconditional prompt is [bos, image_start]. sampling: the model's customary law.
    """

    name: str
    weights: str
    vq_weights: str
    rows: int
    columns: int
    vocabulary: int
    adapter: str | None = None
    text_end: tuple[str, ...] = ()
    image_start: tuple[str, ...] = ("<racm3:break>",)
    prefix: tuple[int, ...] = ()
    row_end: int | None = None
    suffix: tuple[int, ...] = ()
    attention: str = "sdpa"
    sampling: dict[str, float] = field(default_factory=dict)

    @property
    def layout(self) -> TokenGrid:
        return TokenGrid(self.rows, self.columns, self.vocabulary, tuple(self.prefix), self.row_end, tuple(self.suffix))

    def check(self) -> None:
        """Raise `UserError` if a file that `load` will read is not there."""
        for key in ("weights", "vq_weights", "adapter"):
            value = getattr(self, key)
            if value is not None and not find(value).exists():
                raise UserError(f"model.{key}={value} does not exist; give the path of a local folder.")
        for name in ("config.json", "tokenizer.json"):
            if not (find(self.weights) / name).is_file():
                raise UserError(
                    f"model.weights={self.weights} has no {name}, so it is not a Chameleon checkpoint folder."
                )
        if self.adapter is not None:
            from sjd2.adapters import read_settings

            read_settings(find(self.adapter))

    def digest(self) -> str:
        """Return 12 hex digits over the weights, the VQ weights and the adapter."""
        return digest(find(self.weights), find(self.vq_weights), find(self.adapter) if self.adapter else None)

    def load(self, device: str = "cpu", dtype: str = "float32") -> Chameleon:
        """Load all weights: dtype is a torch dtype's name. Raises `UserError` if a file does not fit."""
        self.check()
        from sjd2.adapters import Adapter

        model = Chameleon(self, torch.device(device), getattr(torch, dtype))
        if self.adapter is not None:
            model.adapter = Adapter.load(find(self.adapter), model)
        return model


class Chameleon(Backbone):
    """A loaded Chameleon text-to-image model (contract: `ImageModel`)."""

    def __init__(self, spec: ChameleonSpec, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer, ChameleonForConditionalGeneration
        from transformers.utils import logging as transformers_logging

        from sjd2.models.vqgan import VQGAN

        folder = find(spec.weights)
        transformers_logging.disable_progress_bar()  # its bar of tensors is noise beside the bar of images
        try:
            self.full = ChameleonForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, attn_implementation=spec.attention, local_files_only=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"model.weights={spec.weights} cannot be loaded: {str(error).splitlines()[0]}") from error
        self.full.to(device).eval().requires_grad_(False)
        super().__init__(self.full.get_decoder(), spec.layout)
        self.head_module = self.full.lm_head
        self.vq = VQGAN.load(find(spec.vq_weights)).to(device)
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
        special = self.tokenizer.convert_tokens_to_ids
        end, start = special(list(self.spec.text_end)), special(list(self.spec.image_start))
        ids = [[*row, *end, *start] for row in self.tokenizer(list(prompts))["input_ids"]]
        unknown = sum(self.tokenizer.unk_token_id in row for row in ids)
        if unknown and not self.told:
            self.told = True
            logger.warning("%d of %d prompts have words that %s does not know.", unknown, len(ids), self.spec.name)
        nothing = torch.tensor([[self.tokenizer.bos_token_id, *start]], device=self.device)
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        longest = int(lengths.max())
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=self.device)
        table = self.full.get_input_embeddings()
        return Condition(table(padded), lengths, table(nothing), torch.tensor([nothing.shape[1]], device=self.device))

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
