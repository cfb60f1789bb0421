"""Functions in several processes that train together: what torchrun starts, without importing torch in each one anew."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import torch

PRELOAD = [
    "torch",
    "torch.distributed.checkpoint.state_dict",
    "peft",
    "transformers.models.chameleon.modeling_chameleon",
]
PRELOAD += ["sjd2.finetune.next_clean", "baselines.eagle.train", "harness.finetune", "transformers.models.auto", "run"]


def start(function: Callable[..., None], *args: object, size: int = 2) -> list[BaseProcess]:
    """Start `function(*args)` in `size` processes with the environment that torchrun gives."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = [context.Process(target=_member, args=(rank, size, port, function, args)) for rank in range(size)]
    for process in found:
        process.start()
    return found


def finish(processes: list[BaseProcess], seconds: float = 900.0) -> None:
    """Wait for all of them; one that fails ends the others, as under torchrun."""
    end = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.02)
    late = any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes)
    kill(processes)
    assert not late, "the processes wait for each other"
    assert [process.exitcode for process in processes] == [0] * len(processes)


def kill(processes: list[BaseProcess]) -> None:
    """End processes that are still there, without letting them tidy up."""
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def together(function: Callable[..., None], *args: object, size: int = 2) -> None:
    """Run `function(*args)` in `size` processes; all have to end well."""
    finish(start(function, *args, size=size))


def _member(rank: int, size: int, port: int, function: Callable[..., None], args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*args)
