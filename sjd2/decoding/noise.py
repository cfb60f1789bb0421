"""Counter-based random numbers: every draw is a pure function of (sample seed, position, purpose, row iteration).

Nothing is stored and nothing is drawn in order, so the tokens of a sample depend neither on its batch, nor on the order of
the prompts, nor on the number of machines. The mixing is splitmix64's finaliser in 64-bit integers, equal on every device.
# B samples, S slots of a pass, V image vocabulary, D width
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed 64-bit integer
_MIX1, _MIX2 = -4658895280553007687, -7723592293110705685
_BITS = 23  # 24 bits + 0.5 would round to exactly 1.0 in float32


class Purpose(IntEnum):
    """What a number is drawn for; two purposes never share a stream."""

    SAMPLE = 1  # the token of a position, one number for all passes: AR, bonus tokens, Gumbel coupling
    FRESH = 2  # a new draft in each pass
    ACCEPT = 3
    RESIDUAL = 4  # a recovered token
    COUPLE = 5  # the residual draw of a coupled draft
    INIT = 6  # the first draft of a slot
    NOISE = 7  # the Gaussian start of SJD2's slots
    SIBLING = 8  # further draft tokens for one position
    CORRECT = 9  # whether a draft token stays when its distribution is corrected
    MOVE = 10  # what replaces it if not
    RETEST = 11  # whether a draft token stays that a joint decision has not accepted


# purposes whose numbers are new in each pass; the others' are the same in all
EACH_PASS = frozenset(Purpose) - {Purpose.SAMPLE, Purpose.INIT, Purpose.NOISE}


def sample_seed(seed: int, prompt_index: int, repeat: int) -> int:
    """Return the 63-bit seed of one sample, a hash of the run's seed and the sample's id."""
    digest = hashlib.blake2b(f"{seed}/{prompt_index}/{repeat}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    # the top bits are the best mixed ones; + 0.5 keeps 0 and 1 out, so that log(u) and log(-log(u)) are finite
    return (((x >> (64 - _BITS)) & (2**_BITS - 1)).to(dtype) + 0.5) * 2.0**-_BITS


@dataclass
class _Rolled:
    """What a pass may look up: keys before the last mixing and numbers, both [P, B, W], at positions `begin` [B] and on."""

    begin: Tensor
    iteration: Tensor
    keys: Tensor
    numbers: Tensor

    def at(self, table: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        """Look up positions [B, S] -> [B, S]."""
        return table[purpose - 1].gather(1, positions - self.begin[:, None])


class Noise:
    """Random numbers of the B samples that are being decoded; seeds [B] int64, replaced row by row (refill)."""

    def __init__(self, seeds: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.seeds = seeds
        self.dtype = dtype
        self.streams: Tensor | None = None  # [P, B] one per purpose
        self.rolled: _Rolled | None = None

    def put(self, rows: Tensor, seeds: Tensor) -> None:
        """Give rows [b] new seeds [b]; in place, so that recorded passes (cuda_graph.py) see them."""
        self.seeds[rows] = seeds
        if self.streams is not None:
            self.streams.copy_(self._mixed())

    def _mixed(self) -> Tensor:
        purposes = torch.arange(1, len(Purpose) + 1, device=self.seeds.device)
        return _mix(_mix(self.seeds) ^ purposes[:, None])

    def _streams(self) -> Tensor:
        if self.streams is None:
            self.streams = self._mixed()
        return self.streams

    def roll(self, begin: Tensor, width: int, iteration: Tensor) -> None:
        """Mix the numbers of a pass at once: all purposes at positions begin .. begin + width - 1, begin, iteration [B].

        Until `forget`, draws of this iteration (this very tensor) and those that are the same in every pass are looked up and
        must lie at these positions: a draw by itself takes some 40 small operations.
        """
        positions = begin[:, None] + torch.arange(width, device=begin.device)
        keys = _mix(self._streams()[..., None] + _GOLDEN * (positions + 1))
        fixed = torch.zeros_like(iteration)
        passes = torch.stack([iteration if purpose in EACH_PASS else fixed for purpose in Purpose])
        keys = keys + _GOLDEN * (passes[..., None] + 1)
        self.rolled = _Rolled(begin, iteration, keys, _unit(_mix(keys), self.dtype))

    def forget(self) -> None:
        """End what `roll` began."""
        self.rolled = None

    def _known(self, purpose: Purpose, iteration: Tensor | int) -> _Rolled | None:
        """Return the numbers that `roll` drew, None if they are not those of this purpose and pass."""
        rolled = self.rolled
        if rolled is None:
            return None
        each = purpose in EACH_PASS
        known = iteration is rolled.iteration if each else isinstance(iteration, int) and iteration == 0
        return rolled if known else None

    def _key(
        self, positions: Tensor, purpose: Purpose, iteration: Tensor | int, sibling: Tensor | int | None = None
    ) -> Tensor:
        if (rolled := self._known(purpose, iteration)) is not None:
            key = rolled.at(rolled.keys, positions, purpose)
        else:
            key = _mix(self._streams()[purpose - 1][:, None] + _GOLDEN * (positions + 1))
            if isinstance(iteration, Tensor):
                iteration = iteration[:, None]
            key = key + _GOLDEN * (iteration + 1)
        if sibling is None:
            return _mix(key)
        if isinstance(sibling, int):  # a tensor wraps around by itself
            return _mix(key ^ ((sibling * _MIX2 + 2**63) % 2**64 - 2**63))
        return _mix(key ^ (sibling * _MIX2))

    def uniform(
        self, positions: Tensor, purpose: Purpose, iteration: Tensor | int = 0, sibling: Tensor | int | None = None
    ) -> Tensor:
        """Return numbers in (0, 1), one per position: positions [B, S], iteration [B] or 0 -> [B, S].

        sibling [b, S] or int: the index of the draw among several for one position; 0 is the same as none.
        """
        if sibling is None and (rolled := self._known(purpose, iteration)) is not None:
            return rolled.at(rolled.numbers, positions, purpose)
        return _unit(self._key(positions, purpose, iteration, sibling), self.dtype)

    def codes(self, positions: Tensor, vocabulary: int, sibling: Tensor | None = None) -> Tensor:
        """Return a code drawn uniformly for each position, the first draft token of a slot: [B, S] -> [B, S]."""
        return (self.uniform(positions, Purpose.INIT, sibling=sibling) * vocabulary).long().clamp(max=vocabulary - 1)

    def _field(self, positions: Tensor, purpose: Purpose, width: int) -> Tensor:
        columns = _GOLDEN * torch.arange(1, width + 1, device=positions.device)
        return _unit(_mix(self._key(positions, purpose, 0)[..., None] + columns), self.dtype)

    def gumbel(self, positions: Tensor, vocabulary: int) -> Tensor:
        """Return the Gumbel noise of each position, the same in every pass: [B, S] -> [B, S, V]."""
        return -torch.log(-torch.log(self._field(positions, Purpose.SAMPLE, vocabulary)))

    def normal(self, positions: Tensor, width: int) -> Tensor:
        """Return standard Gaussian noise of each position, the same in every pass: [B, S] -> [B, S, D]."""
        return torch.erfinv(2 * self._field(positions, Purpose.NOISE, width) - 1) * 2**0.5
