"""What the families share: right-padded prompts, the image rows of an output head.

# B samples, P prompt tokens, D width, V image vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
