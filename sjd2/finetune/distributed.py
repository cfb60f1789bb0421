"""Several processes that train one model (started by torchrun): which is first, what they agree on, sums over all of them.

Without torchrun there is one process and every function here is its trivial case. Small things (metrics, decisions, texts)
travel over gloo on the host, gradients over NCCL where the model is on GPUs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sjd2.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # how long a process waits for the others: one may still tokenise a large shard


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How a training uses the machine; but for rounding, nothing here changes what it learns.

    micro_batch: images per forward pass of a process; a step's gradients are summed over as many as `batch_size` takes. None:
    the batch at once, or in equal parts where there are several processes. checkpointing: keep only the layers' inputs and
    recompute everything else in the backward pass. checkpoint_s: seconds between two checkpoints, the most that a kill loses.
    """

    micro_batch: int | None = None
    checkpointing: bool = False
    checkpoint_s: float = 60.0

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UserError(f"finetune.machine.micro_batch must be 1 or more, or null, got {self.micro_batch}.")
        if self.checkpoint_s < 0:
            raise UserError(f"finetune.machine.checkpoint_s must be 0 seconds or more, got {self.checkpoint_s}.")

    @property
    def cuts(self) -> bool:
        """Return whether batches are cut, so that random numbers must belong to samples instead of batches."""
        return self.micro_batch is not None or size() > 1


# ---- processes


@contextlib.contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the other processes of a torchrun command and yield this one's device; without torchrun yield `device`.

    Raises `UserError` if `device` is one GPU for several processes, or there are fewer GPUs than processes.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield device
        return
    backend = "gloo"
    if device.startswith("cuda"):
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if ":" in device and here > 1:
            raise UserError(f"device={device} is one GPU for {here} processes; under torchrun use device=auto.")
        if here > gpus:
            raise UserError(
                f"torchrun started {here} processes and there are {gpus} GPUs; use --nproc_per_node {gpus}."
            )
        device = device if ":" in device else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def joined() -> bool:
    """Return whether torchrun started this process, even as the only one."""
    return dist.is_available() and dist.is_initialized()


def size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if joined() else 1


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if joined() else 0


def first() -> bool:
    """Return whether this is the process that writes and reports."""
    return rank() == 0


# ---- shared values


def barrier() -> None:
    """Wait until all processes are here."""
    total({"here": 1.0})


def total(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Sum metrics over all processes; each must pass the same names."""
    values = {name: float(value) for name, value in metrics.items()}
    if size() == 1:
        return values
    names = sorted(values)
    summed = torch.tensor([values[name] for name in names], dtype=torch.float64)
    dist.all_reduce(summed)
    return {name: summed[names.index(name)].item() for name in values}


def agreed(wish: bool) -> bool:
    """Return the first process's wish: clocks differ, decisions must not."""
    return from_first(lambda: wish)


def from_first(make: Callable[[], T]) -> T:
    """Return to every process what the first one makes."""
    if size() == 1:
        return make()
    box: list[Any] = [make() if first() else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value: T) -> list[T]:
    """Return the values of all processes, in the order of their ranks."""
    if size() == 1:
        return [value]
    box: list[Any] = [None] * size()
    dist.all_gather_object(box, value)
    return box


# ---- work and gradients


def shares(rows: int, micro_batch: int | None) -> list[tuple[slice, float]]:
    """Cut a batch into micro-batches and return this process's: (rows, weight).

    All processes get equally many, so that they stay in step; missing ones are repeats of weight 0.
    """
    width = micro_batch or -(-rows // size())
    parts = [slice(begin, min(begin + width, rows)) for begin in range(0, rows, width)]
    own = range(rank(), -(-len(parts) // size()) * size(), size())
    return [(parts[i % len(parts)], float(i < len(parts))) for i in own]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over all processes."""
    if size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
