"""What the families share: right-padded prompts, codes among the words, the image rows of a head, pixels as bytes.

# B samples, S slots of a pass, P prompt tokens, N image-phase tokens, D width
# V image vocabulary, F forced ids, C width of a code
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sjd2.errors import UserError
from sjd2.models.base import ImageModel


def pad_right(rows: list[list[int]], device: torch.device, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Return token ids padded to the longest row [B, P] and the lengths without padding [B]."""
    longest = max(map(len, rows))
    padded = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    return padded, torch.tensor([len(row) for row in rows], device=device)


def image_logits(head: nn.Module, hidden: Tensor, first: int, count: int) -> Tensor:
    """Apply rows first..first + count - 1 of an output head, in float32 at least: [..., D] -> [..., count].

    A slice of the weight is a view, 8 times cheaper than Chameleon's whole head of 65536 rows. A head that is quantised, or
    on another device than its module claims (device_map), is called as a whole. The result is on the device of `hidden`.
    """
    if type(head) is not nn.Linear or head.weight.device.type == "meta":
        logits = head(hidden)[..., first : first + count]
    else:
        rows = head.weight[first : first + count]
        logits = nn.functional.linear(hidden.to(rows.device), rows)
    return float32_at_least(logits.to(hidden.device))


def float32_at_least(x: Tensor) -> Tensor:
    """Return float64 as it is, every other dtype as float32."""
    return x if x.dtype == torch.float64 else x.float()


def to_bytes(pixels: Tensor, *, rounded: bool) -> Tensor:
    """Turn pixels in [-1, 1] into uint8, rounded or cut off as the family's public code does.

    Raises `UserError` if one is not finite: NaN would become black.
    """
    if not bool(pixels.isfinite().all()):
        raise UserError(
            "the image tokeniser decodes to pixels that are not finite (NaN or infinity): its weights are damaged, or too "
            "large for their dtype; get model.vq_weights anew."
        )
    grey = (float32_at_least(pixels) + 1) * 127.5
    return (grey.round() if rounded else grey).clamp(0, 255).to(torch.uint8)


class CodesAmongWords(ImageModel):
    """A model whose codes and forced tokens are words of its language model: one table of inputs, one head for all.

    ids: [V + F], the model's id of each local id. first_code: that of code 0; those of the other codes follow.
    """

    ids: Tensor
    first_code: int

    @property
    def codebook(self) -> Tensor:
        """The image tokeniser's code vectors: [V, C]."""
        return self.vq.codebook

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up model inputs: local ids [B, S] -> [B, S, D]."""
        return self.full.get_input_embeddings()(self.ids[tokens])

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the image rows of the head, in float32 at least: [..., D] -> [..., V]."""
        return image_logits(self.full.lm_head, hidden, self.first_code, self.layout.vocabulary)

    def decode(self, tokens: Tensor) -> Tensor:
        """Decode whole token sequences to images: [B, N] -> uint8 [B, 3, H, W]."""
        return self.vq.decode(self.layout.codes(tokens.to(self.device)))
