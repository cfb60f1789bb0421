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
_INVERSE = -1018231460777725123  # _GOLDEN * _INVERSE = 1 modulo 2^64
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


# these are not new in each pass, and a number of theirs is a whole draw (`normal` draws a field of them)
TABLED = (Purpose.SAMPLE, Purpose.INIT)


def _streams(seeds: Tensor) -> Tensor:
    """Return the stream of each purpose: [B] -> [P, B]."""
    purposes = torch.arange(1, len(Purpose) + 1, device=seeds.device)
    return _mix(_mix(seeds) ^ purposes[:, None])


def sibling_marks(count: int, device: torch.device) -> Tensor:
    """Return what draws 0 .. count - 1 for one position are told apart by: [count]."""
    return _MIX2 * torch.arange(count, device=device)  # wraps around


@dataclass
class _Rolled:
    """What a pass may look up: keys before the last mixing and numbers, both [P, B, W], at positions `begin` [B, 1] and on.

    siblings [K, B, W]: the numbers of draws 0 .. K - 1 for one position, for the purpose `of`.
    """

    begin: Tensor
    iteration: Tensor
    keys: Tensor
    numbers: Tensor
    of: Purpose | None = None
    siblings: Tensor | None = None
    places: tuple[Tensor, Tensor] | None = None  # the last positions, and where they are in the tables

    def at(self, table: Tensor, positions: Tensor) -> Tensor:
        """Look up positions [B, S] in a table [B, W] -> [B, S]."""
        if self.places is None or self.places[0] is not positions:  # one pass asks for the same slots again and again
            self.places = positions, positions - self.begin
        return table.gather(1, self.places[1])


class Noise:
    """Random numbers of the B samples that are being decoded; seeds [B] int64, replaced row by row (refill).

    length: positions 0 .. length - 1 are mixed once, when a row gets its seed, and looked up after that; 0: never.
    """

    def __init__(self, seeds: Tensor, dtype: torch.dtype = torch.float32, length: int = 0) -> None:
        self.seeds = seeds
        self.dtype = dtype
        self.length = length
        self.streams: Tensor | None = None  # [P, B] one per purpose
        self.rolled: _Rolled | None = None
        if length:
            self.keys, self.table = self._tabled(seeds)

    def put(self, rows: Tensor, seeds: Tensor) -> None:
        """Give rows [b] new seeds [b]; in place, so that recorded passes (cuda_graph.py) see them."""
        self.seeds[rows] = seeds
        if self.streams is not None:
            self.streams[:, rows] = _streams(seeds)
        if self.length:
            keys, table = self._tabled(seeds)
            self.keys[:, rows], self.table[:, rows] = keys, table

    def _tabled(self, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys before an iteration is mixed in [P, b, length], and the numbers of `TABLED` [2, b, length]."""
        positions = torch.arange(1, self.length + 1, device=seeds.device)
        keys = _mix(_streams(seeds)[..., None] + _GOLDEN * positions)
        fixed = torch.stack([keys[purpose - 1] for purpose in TABLED])
        return keys, _unit(_mix(fixed + _GOLDEN), self.dtype)

    def roll(self, positions: Tensor, iteration: Tensor, siblings: tuple[Purpose, Tensor] | None = None) -> None:
        """Mix the numbers of a pass at once: all purposes at positions [B, W], one after the other; iteration [B].

        siblings: a purpose, and the marks of the draws of it for one position that are to be ready too (`sibling_marks`).
        Until `forget`, draws of this iteration (this very tensor) and those that are the same in every pass are looked up and
        must lie at these positions: a draw by itself takes some 40 small operations.
        """
        if self.length:
            keys = self.keys.gather(2, positions.expand(len(self.keys), -1, -1))
        else:
            keys = _mix(self._streams()[..., None] + _GOLDEN * (positions + 1))
        keys = keys + (_GOLDEN * (iteration + 1))[:, None]
        self.rolled = _Rolled(positions[:, :1], iteration, keys, _unit(_mix(keys), self.dtype))
        if siblings is not None:
            self.rolled.of, marks = siblings
            self.rolled.siblings = _unit(_mix(keys[self.rolled.of - 1] ^ marks[:, None, None]), self.dtype)

    def forget(self) -> None:
        """End what `roll` began."""
        self.rolled = None

    def _streams(self) -> Tensor:
        if self.streams is None:
            self.streams = _streams(self.seeds)
        return self.streams

    def _known(self, purpose: Purpose, iteration: Tensor | int) -> _Rolled | None:
        """Return the numbers that `roll` drew, None if they are not those of this purpose and pass."""
        rolled = self.rolled
        return rolled if rolled is not None and purpose in EACH_PASS and iteration is rolled.iteration else None

    def _key(
        self, positions: Tensor, purpose: Purpose, iteration: Tensor | int, sibling: Tensor | int | None = None
    ) -> Tensor:
        if (rolled := self._known(purpose, iteration)) is not None:
            key = rolled.at(rolled.keys[purpose - 1], positions)
        else:
            if self.length:
                key = self.keys[purpose - 1].gather(1, positions)
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
        alone = sibling is None or (isinstance(sibling, int) and sibling == 0)
        if alone and self.length and purpose in TABLED and isinstance(iteration, int) and iteration == 0:
            return self.table[TABLED.index(purpose)].gather(1, positions)
        if (rolled := self._known(purpose, iteration)) is not None:
            if alone:
                return rolled.at(rolled.numbers[purpose - 1], positions)
            if purpose is rolled.of and isinstance(sibling, int) and rolled.siblings is not None:
                return rolled.at(rolled.siblings[sibling], positions)
        return _unit(self._key(positions, purpose, iteration, sibling), self.dtype)

    def codes(self, positions: Tensor, vocabulary: int, sibling: Tensor | None = None) -> Tensor:
        """Return a code drawn uniformly for each position, the first draft token of a slot: [B, S] -> [B, S]."""
        return (self.uniform(positions, Purpose.INIT, sibling=sibling) * vocabulary).long().clamp(max=vocabulary - 1)

    def _field(self, positions: Tensor, purpose: Purpose, width: int) -> Tensor:
        columns = torch.arange(1, width + 1, device=positions.device)
        # key + _GOLDEN * column; Inductor takes the product of an arange for an index, and it overflows as one (torch 2.15)
        mixed = (self._key(positions, purpose, 0)[..., None] * _INVERSE + columns) * _GOLDEN
        return _unit(_mix(mixed), self.dtype)

    def gumbel(self, positions: Tensor, vocabulary: int) -> Tensor:
        """Return the Gumbel noise of each position, the same in every pass: [B, S] -> [B, S, V]."""
        return -torch.log(-torch.log(self._field(positions, Purpose.SAMPLE, vocabulary)))

    def normal(self, positions: Tensor, width: int) -> Tensor:
        """Return standard Gaussian noise of each position, the same in every pass: [B, S] -> [B, S, D]."""
        return torch.erfinv(2 * self._field(positions, Purpose.NOISE, width) - 1) * 2**0.5
