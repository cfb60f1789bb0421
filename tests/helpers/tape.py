"""A stand-in for CUDA graphs on a CPU: records the operations of a piece of work with their addresses and replays just these.

As with a CUDA graph, nothing of the host's program runs again, and what is recorded has no effect until it is replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Tape(TorchDispatchMode):
    """One recording. `replay` runs it on the present values of the tensors that were there before it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        self.own: set[int] = set()  # storages that came into being in the recording
        self.before: list[tuple[Tensor, Tensor]] = []  # what in-place operations found

    def __torch_dispatch__(self, call: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(call._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and value.untyped_storage().data_ptr() not in self.own:
                self.before.append((value, value.clone()))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = call(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.own.add(tensor.untyped_storage().data_ptr())
        self.operations.append((call, args, kwargs, out))  # keeps all tensors alive, so that addresses stay unique
        return out

    def undo(self) -> None:
        """Put back what the recording has changed."""
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    @torch.inference_mode()
    def replay(self) -> None:
        """Run the operations again, each on what the ones before it have just made."""
        now: dict[int, Tensor] = {}

        def present(x: Any) -> Any:
            return now.get(id(x), x) if isinstance(x, Tensor) else x

        for call, args, kwargs, out in self.operations:
            made = call(*tree_map(present, args), **tree_map(present, kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(made), strict=True):
                if isinstance(old, Tensor):
                    now[id(old)] = new


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Record `work` as `graph.CudaGraphs` does."""
    tape = Tape()
    with tape:
        work()
    tape.undo()
    return tape.replay
