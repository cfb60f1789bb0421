"""Which token stands where in an image: free codes, forced tokens (row ends, headers), rows and columns.

Local token ids: 0..V-1 are codes of the image vocabulary, V + j is the layout's j-th forced id.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sjd2.errors import UserError


@dataclass(frozen=True)
class TokenGrid:
    """A raster of rows x columns codes with optional forced tokens around and between the rows.

    prefix, suffix: forced ids (the model's own token ids) before and after the grid; row_end: one after each row.
    E.g. Lumina-mGPT 768: rows = columns = 48, prefix (8197, 8828, 8828), row_end 8803, suffix (8196, 8710): N = 2357.
    preview: (rows, columns) of a smaller grid of the same image, drawn right before the grid; pixels are made of the
    grid alone. E.g. GLM-Image at 1024 px: preview (16, 16), rows = columns = 32, suffix (16385,): N = 1281.
    """

    rows: int
    columns: int
    vocabulary: int
    prefix: tuple[int, ...] = ()
    row_end: int | None = None
    suffix: tuple[int, ...] = ()
    preview: tuple[int, int] | None = None
    forced_ids: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if min(self.rows, self.columns, self.vocabulary, *(self.preview or ())) < 1:
            raise UserError(f"a token grid needs at least one row, column and code, got {self}.")
        if self.preview is not None and self.row_end is not None:
            raise UserError("a token grid with a preview cannot have row ends.")
        ids = dict.fromkeys((*self.prefix, *(() if self.row_end is None else (self.row_end,)), *self.suffix))
        object.__setattr__(self, "forced_ids", tuple(ids))

    @property
    def stride(self) -> int:
        """Distance between a position of the grid and the one above it."""
        return self.columns + (self.row_end is not None)

    @property
    def begin(self) -> int:
        """The position of the grid's first code."""
        return len(self.prefix) + self._previewed

    @property
    def num_codes(self) -> int:
        """L, the number of codes of an image, those of the preview included."""
        return self._previewed + self.rows * self.columns

    @property
    def length(self) -> int:
        """N, the number of image-phase tokens, forced ones included."""
        return self.begin + self.rows * self.stride + len(self.suffix)

    @property
    def _previewed(self) -> int:
        return 0 if self.preview is None else self.preview[0] * self.preview[1]

    def strides(self, positions: Tensor) -> Tensor | int:
        """Return the distance from each position to the one above it in its own grid, one number where all have the same."""
        if self.preview is None:
            return self.stride
        return torch.where(positions < self.begin, self.preview[1], self.stride)

    def tops(self, positions: Tensor) -> Tensor | int:
        """Return the first position of each position's own grid, what was there before included for the first grid."""
        return 0 if self.preview is None else torch.where(positions < self.begin, 0, self.begin)

    def forced(self) -> Tensor:
        """Return the forced local id of every position, -1 where the token is free: [N]."""
        local = {token: self.vocabulary + j for j, token in enumerate(self.forced_ids)}
        row = [-1] * self.columns + ([] if self.row_end is None else [local[self.row_end]])
        before = [local[t] for t in self.prefix] + [-1] * self._previewed
        return torch.tensor(before + row * self.rows + [local[t] for t in self.suffix])

    @property
    def free(self) -> Tensor:
        """Return which positions the model really chooses: bool [N]."""
        return self.forced() < 0

    @property
    def shown(self) -> Tensor:
        """Return which positions hold the grid's codes, which pixels are made of: bool [N]."""
        return self.free & (torch.arange(self.length) >= self.begin)

    def codes(self, tokens: Tensor) -> Tensor:
        """Cut the grid's codes out of complete token sequences: [B, N] -> [B, rows, columns]."""
        return tokens[:, self.shown.to(tokens.device)].view(-1, self.rows, self.columns)

    def all_codes(self, tokens: Tensor) -> Tensor:
        """Cut all codes out of complete token sequences, the preview's first: [B, N] -> [B, L]."""
        return tokens[:, self.free.to(tokens.device)]

    def tokens(self, codes: Tensor) -> Tensor:
        """Put forced tokens around all codes: [B, L] -> [B, N]."""
        out = self.forced().to(codes.device).repeat(len(codes), 1)
        out[:, self.free.to(codes.device)] = codes
        return out
