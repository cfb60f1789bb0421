"""torch.compile for pieces of a pass: few kernels instead of hundreds of small ones; a piece that fails runs as it is.

A piece is a function of tensors and of objects that hold tensors, and reads nothing on the host. It is compiled for the shapes
it meets: each owner (an engine of one decoder, number of rows and sampling) gets code of its own, so that a sweep over windows
neither runs into torch's limit of versions nor checks the guards of all other windows in every pass. What Inductor makes is
kept between runs in the user's cache folder, under Inductor's own key: source, shapes, torch and device.
"""

from __future__ import annotations

import logging
import os
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sjd2.errors import UserError, first_line
from sjd2.files import cache_root, split_lines

FIRST = 3  # calls in which a piece may meet new shapes: tensors that were None get theirs
logger = logging.getLogger(__name__)


class Compiler:
    """Compiles pieces and keeps them; `seconds` by the name of a piece, what was left out and why in `left_out`."""

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self.backend = backend
        self.seconds: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self._pieces: list[tuple[Callable[..., Any], tuple[Any, ...], _Piece]] = []
        _own_cache()

    def piece(self, function: Callable[..., Any], owner: tuple[Any, ...]) -> Callable[..., Any]:
        """Return `function` compiled for this owner; the same piece where function and owner are equal to those of before."""
        for known, whose, piece in self._pieces:
            if known is function and whose == owner:
                return piece
        piece = _Piece(function, self)
        self._pieces.append((function, owner, piece))
        return piece

    def entry(self, known: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Return what provenance.jsonl keeps: seconds by piece, without those `known` before, and what runs as it is."""
        spent = {name: value - (known or {}).get(name, 0.0) for name, value in self.seconds.items()}
        seconds = {name: round(value, 2) for name, value in spent.items() if value > 0}
        return {"backend": str(self.backend), "seconds": seconds} | (
            {"left_out": self.left_out} if self.left_out else {}
        )


class _Piece:
    """One function, compiled at its first call."""

    def __init__(self, function: Callable[..., Any], compiler: Compiler) -> None:
        self.function, self.compiler = function, compiler
        self.name = function.__qualname__.rpartition("<locals>.")[2]
        self.calls = 0
        own = types.FunctionType(  # torch keeps versions by code object, and limits their number
            function.__code__.replace(),
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        own.__kwdefaults__ = function.__kwdefaults__
        self.run: Callable[..., Any] = torch.compile(own, dynamic=False, fullgraph=True, backend=compiler.backend)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        begin = time.perf_counter()
        try:
            out = self.run(*arguments)
        except (UserError, torch.OutOfMemoryError):
            raise
        except (
            Exception
        ) as error:  # of dynamo, of the backend, of the C++ compiler or Triton: many classes, nothing has run
            if self.run is self.function:
                raise
            self.run = self.function
            why = _reason(error)
            if self.name not in self.compiler.left_out:
                self.compiler.left_out[self.name] = why
                logger.warning("%s runs as it is, not compiled: %s.", self.name, why.rstrip("."))
            return self.function(*arguments)
        if self.calls <= FIRST and self.run is not self.function:
            spent = time.perf_counter() - begin
            self.compiler.seconds[self.name] = self.compiler.seconds.get(self.name, 0.0) + spent
        return out


def _own_cache() -> None:
    """Let Inductor keep its code where the user's caches are, unless the user has named a folder."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))


def _reason(error: Exception) -> str:
    """Return the first line of an error, and the next one where the first only names the backend that raised it."""
    first, *more = [line for line in split_lines(str(error)) if line.strip()] or [type(error).__name__]
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first


def why_not() -> str | None:
    """Return why nothing can be compiled on this machine's CPU, or None."""
    _own_cache()  # before the import, which sets a folder that the next start of the machine empties
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # a class that differs between versions of torch
        return first_line(error)
    return None
