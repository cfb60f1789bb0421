"""LANTERN and LANTERN++: a draft token may borrow the mass of codes that look like it, so it is accepted more often; lossy.

# V image vocabulary, C width of a code vector, K neighbours of a code, itself included
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sjd2.decoding.interfaces import Verifier
from sjd2.decoding.sampling import TINY_MASS
from sjd2.errors import UserError
from sjd2.files import cache_root
from sjd2.models.base import ImageModel
from sjd2.models.spec import ModelSpec

BLOCK = 512  # codes whose distances to all others are in memory at once
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Relaxed(Verifier):
    """Lend a draft token the mass of its nearest codes (LANTERN, arXiv 2410.03355; LANTERN++, arXiv 2502.06352).

    neighbours: K, the code itself counted; 1 is exact verification. Exactly one budget: delta bounds the mass S(x) that the
    other codes of A(x) lend (LANTERN), lam bounds it by (lam - 1) p(x) (LANTERN++). A(x): x and the longest prefix of its
    neighbours, nearest first, whose mass keeps the budget. normalise: compare directions, for models that look codes up by
    L2-normalised vectors (LlamaGen, Janus). cache: folder of the neighbour tables (None: the user's cache folder).

    Drafts are tested against p'(.|x), which moves the mass of A(x) onto x: p'(x|x) = p(x) + S(x), 0 on the rest of A(x), p
    elsewhere. Accepted with min(1, p'(x|x) / q(x)), else recovered from norm(max(0, p'(.|x) - q)), which is 0 on all of A(x)
    because x is rejected only where p'(x|x) < q(x). As p' depends on the draft, delta does not bound the output's error; lam
    keeps the accepted mass of x below lam p(x).
    """

    neighbours: int = 10
    delta: float | None = None
    lam: float | None = 2.0
    normalise: bool = False
    cache: str | None = None
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = "decoder.verifier"
        if self.neighbours < 1:
            raise UserError(f"{name}.neighbours must be 1 (the code alone) or more, got {self.neighbours}.")
        if (self.delta is None) == (self.lam is None):
            raise UserError(
                f"give exactly one of {name}.delta (LANTERN) and {name}.lam (LANTERN++) and set the other to null, "
                f"got delta={self.delta} and lam={self.lam}."
            )
        if self.delta is not None and not 0 <= self.delta <= 1:
            raise UserError(f"{name}.delta must lie in [0, 1], got {self.delta}; for LANTERN++ set lam instead.")
        if self.lam is not None and not 1 <= self.lam < float("inf"):
            raise UserError(f"{name}.lam must be a number from 1 (exact) up, got {self.lam}.")

    def check(self, spec: ModelSpec, window: int) -> None:
        """Raise `UserError` if the model has fewer codes than a code is to have neighbours."""
        _check_size(self.neighbours, spec.layout.vocabulary)

    def bind(self, model: ImageModel, window: int) -> RelaxedVerifier:
        return RelaxedVerifier(self, model)


class RelaxedVerifier(Verifier):
    """`Relaxed` on a model, with the neighbours of its codes."""

    exact = False

    def __init__(self, settings: Relaxed, model: ImageModel) -> None:
        self.settings = settings
        codebook = model.codebook.detach().float().cpu().contiguous()
        _check_size(settings.neighbours, len(codebook))
        key = _digest(codebook, settings.neighbours, settings.normalise)
        folder = cache_root() / "neighbours" if settings.cache is None else Path(settings.cache)
        table = neighbour_table(codebook, settings.neighbours, settings.normalise, folder / f"{key}.npy")
        self.table = table.to(model.device)  # [V, K-1] int32: the other codes, nearest first

    def accept_prob(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return min(1, (p(x) + S(x)) / q(x)) of each token x; q None is one-hot: p, q [..., V], token [...] -> [...]."""
        mass = self._lend(p, token)[2]
        if q is None:
            return mass.clamp(max=1)
        q = q.gather(-1, token[..., None])[..., 0]
        # q = 0: no draw from q (rule=paper), as in `sampling.accept_prob`
        return torch.where(q > 0, mass / q, (mass > 0).to(mass)).clamp(max=1)

    def residual(self, p: Tensor, q: Tensor | None, token: Tensor) -> Tensor:
        """Return max(0, p'(.|x) - q), unnormalised: [..., V]."""
        near, kept, mass = self._lend(p, token)
        # a one-hot distribution takes all that x may have
        own = torch.zeros_like(mass) if q is None else mass
        left = p.scatter(-1, near, kept).scatter_(-1, token[..., None], own[..., None])
        if q is not None:
            left = left.sub_(q).clamp_(min=0)
        return torch.where(left.sum(-1, keepdim=True) > TINY_MASS, left, p)

    def _lend(self, p: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the neighbours [..., K-1], the mass each keeps (0 within A) and p'(x|x) = p(x) + S(x) [...]."""
        near = self.table[token].long()
        mass, own = p.gather(-1, near), p.gather(-1, token[..., None])
        delta, lam = self.settings.delta, self.settings.lam
        if lam is not None:
            budget = (lam - 1) * own
        else:
            assert delta is not None  # one of the two is set
            budget = delta
        # lent[j]: mass of the j nearest; the empty prefix is always within the budget
        lent = torch.nn.functional.pad(mass.cumsum(-1), (1, 0))
        inside = lent <= budget
        total = own[..., 0] + lent.masked_fill(~inside, 0.0).amax(-1)
        return near, mass.masked_fill(inside[..., 1:], 0.0), total


def neighbour_table(codebook: Tensor, neighbours: int, normalise: bool, file: Path) -> Tensor:
    """Return the neighbours - 1 nearest other codes of each code, nearest first: [V, C] -> [V, K-1] int32.

    Read from `file` if it holds such a table, else computed and written there; a folder that cannot be written is no error.
    """
    shape = (len(codebook), neighbours - 1)
    if 0 in shape:
        return torch.zeros(shape, dtype=torch.int32)
    stored = _read(file, shape)
    if stored is None:
        stored = _nearest(codebook, neighbours - 1, normalise)
        _write(file, stored)
    return torch.from_numpy(stored.astype(np.int32))


def _check_size(neighbours: int, vocabulary: int) -> None:
    if neighbours > vocabulary:
        raise UserError(
            f"decoder.verifier.neighbours={neighbours} exceeds the model's image vocabulary of {vocabulary}; use at most "
            "that many."
        )


def _digest(codebook: Tensor, neighbours: int, normalise: bool) -> str:
    settings = f"{tuple(codebook.shape)}/{neighbours}/{normalise}"
    return hashlib.blake2b(settings.encode() + codebook.numpy().tobytes(), digest_size=12).hexdigest()


def _nearest(codebook: Tensor, count: int, normalise: bool) -> np.ndarray:
    """Sort by Euclidean distance, block by block."""
    codes = codebook.double()  # in float32 |a|^2 + |b|^2 - 2ab would blur near codes
    codes = torch.nn.functional.normalize(codes, dim=-1) if normalise else codes - codes.mean(0)
    square = codes.square().sum(-1)
    rows = []
    for start in range(0, len(codes), BLOCK):
        block = codes[start : start + BLOCK]
        distance = square - 2 * block @ codes.T  # the block's own |a|^2 does not change the order
        line = torch.arange(len(block))
        distance[line, start + line] = torch.inf  # a code has itself already, even where another code equals it
        rows.append(distance.topk(count, largest=False).indices)
    return torch.cat(rows).numpy().astype(np.uint16 if len(codes) <= 2**16 else np.int32)


def _read(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    if not file.is_file():
        return None
    try:
        with file.open("rb") as handle:
            table = np.lib.format.read_array(handle, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        logger.warning("The neighbour table %s cannot be read and is made anew (%s).", file, error)
        return None
    if table.shape != shape or table.dtype.kind not in "ui" or table.max() >= len(table):
        logger.warning("The neighbour table %s does not fit its codebook and is made anew.", file)
        return None
    return table


def _write(file: Path, table: np.ndarray) -> None:
    """Write beside the file and rename, so that another process never reads half a table."""
    part = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as handle:
            part = Path(handle.name)
            np.save(handle, table, allow_pickle=False)
        part.replace(file)
    except OSError as error:
        logger.warning("The neighbour table is not kept, %s cannot be written (%s).", file.parent, error)
        if part is not None:
            part.unlink(missing_ok=True)
