"""Several processes of one command: `torchrun --nproc-per-node 8 run.py ...` shares the batches of a run among its ranks.

Batches are a fixed partition of the ids and go to ranks whole, so no token depends on the number of ranks. Ranks share no
tensors: they exchange small values through torchrun's key-value store, and each writes a records file of its own. Where
one dies, torchrun ends the others with SIGTERM; finished images are kept, and the same command resumes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from sjd2.errors import UserError

Item = TypeVar("Item")
POLL_S = 0.1  # seconds between two looks at the store: a signal must find Python at work, not a blocking call


def world_size() -> int:
    """Return the number of processes of this command; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def takes_part(stage: str) -> bool:
    """Return whether this process has work in a stage: only sampling and training are shared, the rest is rank 0's.

    Raises UserError for a multirun under torchrun, whose ranks would each run all jobs.
    """
    if world_size() == 1:
        return True
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError("torchrun shares one run among GPUs; a multirun takes a launcher: -m hydra/launcher=slurm.")
    return stage in ("sample", "finetune") or os.environ.get("RANK", "0") == "0"


@dataclass
class Ranks:
    """This process among those of its command; alone by default, and then no call waits for anybody.

    rank: 0 holds the run's lock, keeps the launch, scores and writes metrics. local: the rank on this machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    store: Any = None  # torch.distributed.Store
    _calls: int = field(default=0, init=False)  # every rank makes the same calls in the same order

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def number(self) -> int | None:
        """Return the rank, None for a process alone."""
        return self.rank if self.world > 1 else None

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return every world-th of `items`, from the rank's own place on."""
        return list(items[self.rank :: self.world])

    def broadcast(self, value: Callable[[], Any]) -> Any:
        """Return what `value` returns on rank 0, which alone calls it; it has to be JSON."""
        if self.world == 1:
            return value()
        key = self._key()
        if self.main:
            self.store.set(key, json.dumps(value()))
        return self._wait(key)

    def gather(self, value: Any, *, check: Callable[[], None] = lambda: None) -> list[Any]:
        """Return the values of all ranks on rank 0, which waits for them; [] elsewhere. `check` may raise meanwhile."""
        if self.world == 1:
            return [value]
        key = self._key()
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        return [self._wait(f"{key}/{rank}", check) for rank in range(self.world)] if self.main else []

    def device(self, name: str) -> str:
        """Return the device of this rank where `name` is the one that the command means: cuda becomes cuda:LOCAL_RANK.

        Raises UserError where this machine has fewer GPUs than ranks, or one of them is named.
        """
        import torch

        if self.world == 1 or not name.startswith("cuda"):
            return name
        if name != "cuda":
            raise UserError(f"device={name} is one GPU, but torchrun started {self.world} processes; use device=cuda.")
        if self.local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started more processes here than there are GPUs ({torch.cuda.device_count()}); "
                "lower --nproc-per-node or use device=cpu."
            )
        return f"cuda:{self.local}"

    def _key(self) -> str:
        self._calls += 1
        return f"sjd2/{self._calls}"

    def _wait(self, key: str, check: Callable[[], None] = lambda: None) -> Any:
        while not self.store.check([key]):
            check()
            time.sleep(POLL_S)
        return json.loads(self.store.get(key))


ALONE = Ranks()


def join() -> Ranks:
    """Return this process' place among torchrun's, which waits until all are there; ranks but 0 print nothing from here.

    Raises UserError if the environment names ranks but no store.
    """
    if world_size() == 1:
        return ALONE
    from torch.distributed.rendezvous import rendezvous

    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={world_size()} is set but not {missing[0]}; start several processes with torchrun, "
            "or unset WORLD_SIZE."
        )
    store, rank, world = next(rendezvous("env://"))
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  open to the end of the process
    return Ranks(rank, world, int(os.environ["LOCAL_RANK"]), store)
