"""Time a call on a CPU or a CUDA device, eager and as a CUDA graph, within a budget of seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from harness.sample import synchronize


@dataclass(frozen=True)
class Timing:
    """Medians over n calls in milliseconds: ms from start to end on the device, host_ms until the call returned."""

    ms: float
    host_ms: float
    n: int


def time_call(
    device: torch.device,
    call: Callable[[], Any],
    *,
    seconds: float = 0.4,
    most: int = 30,
    least: int = 5,
    warm: int = 2,
    between: Callable[[], None] | None = None,
) -> Timing:
    """Call `warm` times and then for about `seconds`, at least `least` and at most `most` times.

    between: called before each call, not timed.
    """
    estimate = 0.0
    for _ in range(warm):
        if between is not None:
            between()
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        estimate = time.perf_counter() - begin
    n = max(least, min(most, int(seconds / max(estimate, 1e-6))))
    clock = _Events() if device.type == "cuda" else _Wall()
    for _ in range(n):
        if between is not None:
            between()
        clock.time(call)
    device_s, host_s = (statistics.median(column) for column in zip(*clock.spans(), strict=True))
    return Timing(1e3 * device_s, 1e3 * host_s, n)


class _Wall:
    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def time(self, call: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        call()
        seconds = time.perf_counter() - begin
        self.found.append((seconds, seconds))

    def spans(self) -> list[tuple[float, float]]:
        return self.found


class _Events:
    """Events on the device's stream: nothing waits until all calls are done."""

    def __init__(self) -> None:
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event, float]] = []

    def time(self, call: Callable[[], Any]) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin = time.perf_counter()
        start.record()
        call()
        end.record()
        self.events.append((start, end, time.perf_counter() - begin))

    def spans(self) -> list[tuple[float, float]]:
        torch.cuda.synchronize()
        return [(start.elapsed_time(end) / 1e3, host) for start, end, host in self.events]


def graphed(device: torch.device, call: Callable[[], Any]) -> Callable[[], None]:
    """Record a call as a CUDA graph and return its replay. Raises `RuntimeError` if that is impossible."""
    if device.type != "cuda":
        raise RuntimeError("CUDA graphs need a CUDA device")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # libraries allocate workspaces on the recorded stream
        call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Budget:
    """Seconds to spend, in total and on the current model."""

    def __init__(self, seconds: float) -> None:
        self.began = time.perf_counter()
        self.end = self.share = self.began + seconds

    def divide(self, models: int) -> None:
        """Give the next of `models` models its share of what is left."""
        now = time.perf_counter()
        self.share = now + max(0.0, self.end - now) / models

    @property
    def left(self) -> float:
        """Seconds left of the current share."""
        return self.share - time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began
