"""The shape of a pass with a small tree at its front: a main chain, and branches where rejections happen.

# S slots of a pass, C slots of the main chain, F families (children of one parent) at a depth
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sjd2.decoding.shapes import CHAIN, Shape, Tree
from sjd2.errors import UserError


@dataclass(frozen=True)
class Level:
    """One depth of the front: all families there, that of the main chain first.

    parents [F]; first [F]: the first child of each; home [F]: the family one depth up that each parent belongs to.
    siblings: per rank 1, 2, ... the slots of the further children; families 0..len-1 have them.
    """

    parents: Tensor
    first: Tensor
    home: Tensor
    siblings: tuple[Tensor, ...]


@dataclass(frozen=True)
class FrontShape:
    """shape: of all slots, of which 0..chain-1 are the main chain and `side` are branches; levels: its front, from depth 1."""

    chain: int
    side: int
    shape: Shape
    levels: tuple[Level, ...]


def branches(siblings: Sequence[int], copies: Sequence[int], full: bool) -> tuple[list[int], list[int]]:
    """Return parent and depth of each branch slot, numbered from -1 downwards; a main slot is its depth.

    siblings: further draft tokens at depths 1, 2, ... of the main chain, or of every node where `full`. copies: the depth to
    which the branch of the first, second, ... sibling copies the main chain's tokens; the last one holds for all further.
    """
    parents: list[int] = []
    depths: list[int] = []
    front = [(0, 0)]  # nodes of the depth above, the main chain's first, and how deep their branch goes
    for depth in range(1, max(*copies, len(siblings)) + 1):
        below = [(depth, 0)]
        for node, end in front:
            more = siblings[depth - 1] if depth <= len(siblings) and (full or node >= 0) else 0
            ends = [copies[min(rank, len(copies) - 1)] for rank in range(more)]
            if node < 0 and depth <= end:
                ends.insert(0, end)
            for deepest in ends:
                parents.append(node)
                depths.append(depth)
                below.append((-len(parents), deepest))
        front = below
    return parents, depths


def chain_slots(window: int, siblings: Sequence[int], copies: Sequence[int], full: bool) -> int:
    """Return C, what the branches leave of the window. Raises `UserError` where that is too little."""
    side = len(branches(siblings, copies, full)[0])
    front = max(*copies, len(siblings)) + 1
    if window - side < front:
        raise UserError(
            f"decoder.window={window} is too small: its branches take {side} slots and the main chain needs {front}; take "
            f"{side + front} or more, or fewer decoder.drafter.siblings."
        )
    return window - side


def front_shape(
    chain: int, *, siblings: Sequence[int], copies: Sequence[int], full: bool, corrected: int, device: torch.device
) -> FrontShape:
    """Build the shape around a main chain of `chain` slots; levels reach over the branches and over `corrected` depths."""
    side, depths = branches(siblings, copies, full)

    def slot(node: int) -> int:
        return node if node >= 0 else chain - 1 - node

    parents = [0, *range(chain - 1), *map(slot, side)]
    tree = Tree.static(parents, chain=chain, device=device) if side else CHAIN
    families: dict[int, list[int]] = {}
    for child in range(1, len(parents)):
        families.setdefault(parents[child], []).append(child)
    depth_of = [*range(chain), *depths]
    levels, home = [], {0: 0}
    for depth in range(1, max([corrected, *depths], default=0) + 1):
        here = sorted((p, c) for p, c in families.items() if depth_of[p] == depth - 1)
        ranks = max(len(children) for _, children in here)
        # families with siblings come first, so that a slice of the families' distributions serves them
        here.sort(key=lambda family: (family[0] >= chain, -len(family[1]), family[0]))
        further = [[c[r] for _, c in here if len(c) > r] for r in range(1, ranks)]
        as_tensor = [torch.tensor(x, device=device) for x in further]
        levels.append(
            Level(
                torch.tensor([p for p, _ in here], device=device),
                torch.tensor([c[0] for _, c in here], device=device),
                torch.tensor([home[p] for p, _ in here], device=device),
                tuple(as_tensor),
            )
        )
        home = {child: number for number, (_, children) in enumerate(here) for child in children}
    return FrontShape(chain, len(side), tree, tuple(levels))
