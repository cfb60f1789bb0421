"""Counts what a pass launches: operations that compute or copy, views and empty memory left out."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

FREE = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::lift_fresh"}


class Launches(TorchDispatchMode):
    """Counts by name; what runs inside of an operation of ours is not looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, call: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not call.is_view and call._schema.name not in FREE:
            self.names[call._schema.name] += 1
        return call(*args, **(kwargs or {}))
