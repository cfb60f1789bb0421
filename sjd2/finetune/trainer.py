"""One training loop for every recipe: seeded, scheduled, clipped, checkpointed; a killed run resumes to equal weights.

Exact resuming needs no saved random state: data and noise are functions of (seed, step), because the loop seeds torch
from them before each step, and a recipe draws its batch from `step_rng(seed, step)`.
Under torchrun all processes run this loop in step; the first one reports and, unless weights are sharded, checkpoints.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sjd2.errors import UserError
from sjd2.files import read_lines, write_atomically
from sjd2.finetune import distributed
from sjd2.finetune.objective import is_sharded

Metrics = dict[str, float]
Log = Callable[[int, Metrics], None]
Piece = tuple[Tensor, Mapping[str, float | Tensor]]  # a scalar to minimise, metrics to report
Loss = Callable[[int], Piece | Iterator[Piece]]
CHECKPOINT = "checkpoint.pt"
logger = logging.getLogger(__name__)


def step_rng(seed: int, step: int, purpose: int = 0) -> np.random.Generator:
    """Return the generator of one step's data; purposes (training, validation) never share a stream."""
    return np.random.default_rng([seed, purpose, step])


def warmup_decay(steps: int, warmup: int, decay: float, cosine: bool = False) -> Callable[[int], float]:
    """Build a schedule: linear up over `warmup` steps, constant, down to zero over the last `decay` of `steps`.

    decay=0 stays constant. cosine: it falls along half a wave instead of a line.
    """
    tail = max(1, round(steps * decay))

    def factor(step: int) -> float:
        left = (steps - step) / tail
        if cosine:
            left = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left))
        return min(1.0, (step + 1) / max(1, warmup), left)

    return factor


def train(
    module: nn.Module,
    loss: Loss,
    optimizers: Sequence[Optimizer],
    *,
    steps: int,
    out: Path,
    seed: int,
    log: Log | None = None,
    schedule: Callable[[int], float] = lambda step: 1.0,
    clip: float = 1.0,
    bf16: bool = False,
    after: Callable[[int], Metrics] = lambda done: {},
    log_every: int = 20,
    checkpoint_s: float = 60.0,
) -> None:
    """Minimise `loss(step)` for `steps` steps, resuming from the checkpoint in `out` where there is one.

    module: all that training changes, buffers such as moving averages included; its state is checkpointed.
    loss: step -> (scalar, metrics to report), called under bf16 autocast with `bf16` (sharded weights have a precision of
    their own). Or it yields such a pair per micro-batch: scalars and metrics are shares, to be summed over micro-batches
    and processes.
    schedule: step -> factor on each optimizer's learning rate. clip: largest norm of the whole module's gradient.
    after: called with the number of finished steps after each one, for moving averages, validation and exports; returns
    metrics to report or an empty dict.
    Writes `out/curve.jsonl` (one line per report) and the checkpoint, every `checkpoint_s` seconds and at the end.
    Raises FloatingPointError when the loss is not finite and UserError when the checkpoint is of another seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    for group in _groups(optimizers):
        group.setdefault("initial_lr", group["lr"])
    start, seconds = _resume(out, module, optimizers, seed)
    curve = Curve(out / "curve.jsonl", start, steps, seconds, log)
    saved = time.monotonic()
    for step in range(start, steps):
        torch.manual_seed(int(step_rng(seed, step, purpose=1).integers(2**62)))
        for value, metrics in _pieces(loss, step, module, bf16):
            value.backward()
            curve.add({"loss": value.detach()} | dict(metrics))
        _update(module, optimizers, schedule(step), clip)
        done = step + 1
        measured = after(done)
        if measured or done % log_every == 0 or done == steps:
            curve.report(done, measured)
        if done == steps or distributed.agreed(time.monotonic() - saved > checkpoint_s):
            _save(out, module, optimizers, {"step": done, "seed": seed, "seconds": curve.seconds()})
            saved = time.monotonic()


def _groups(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def _pieces(loss: Loss, step: int, module: nn.Module, bf16: bool) -> Iterator[Piece]:
    """Yield the step's micro-batches, each computed under autocast; the caller's backward passes are not."""
    device = next(module.parameters()).device.type
    bf16 = bf16 and not is_sharded(module)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        pieces = loss(step)
    if isinstance(pieces, tuple):
        yield pieces
        return
    while True:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def _update(module: nn.Module, optimizers: Sequence[Optimizer], factor: float, clip: float) -> None:
    """Take an optimizer step with the gradients of all processes; learning rates are `factor` of their peak."""
    groups = _groups(optimizers)
    for group in groups:
        group["lr"] = group["initial_lr"] * factor
    if not is_sharded(module):
        distributed.sum_gradients(p for group in groups for p in group["params"])
    nn.utils.clip_grad_norm_(module.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()
    module.zero_grad(set_to_none=True)  # of parameters without an optimizer too: they count in the norm


class Curve:
    """Averages metrics between two reports and writes them: to `curve.jsonl`, the log and the console."""

    def __init__(self, path: Path, start: int, steps: int, seconds: float, log: Log | None) -> None:
        self.path, self.start, self.steps, self.log = path, start, steps, log
        self.reported = start  # steps at the last report
        self.before = seconds  # that earlier processes took
        self.began = time.monotonic()
        self.sums: dict[str, Tensor | float] = {}

    def seconds(self) -> float:
        """Return how long all steps took so far, those before a kill included."""
        return self.before + time.monotonic() - self.began

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Take a micro-batch's share; summed on the device, so that no step waits for the GPU."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def report(self, done: int, measured: Mapping[str, float]) -> None:
        """Report the means since the last report, with what was measured. Raises FloatingPointError."""
        count, self.reported = done - self.reported, done
        means = {name: total / count for name, total in distributed.total(self.sums).items()} | dict(measured)
        self.sums = {}
        if not np.isfinite(means["loss"]):
            raise FloatingPointError(f"The loss is {means['loss']} after step {done}; lower the learning rate.")
        if distributed.first():
            self._write(done, means)

    def _write(self, done: int, means: Metrics) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": done, "seconds": round(self.seconds(), 1)} | means) + "\n")
        if self.log:
            self.log(done, means)
        text = " ".join(f"{name} {value:.4g}" for name, value in means.items())
        pace = max((time.monotonic() - self.began) / (done - self.start), 1e-9)
        left = (self.steps - done) * pace / 60
        logger.info("step %d/%d  %s  %.2f steps/s  %.1f min left", done, self.steps, text, 1 / pace, left)


def _save(out: Path, module: nn.Module, optimizers: Sequence[Optimizer], facts: dict[str, Any]) -> None:
    if is_sharded(module):
        from sjd2.finetune import sharding

        sharding.save(out, module, optimizers, facts)
    elif distributed.first():
        state = facts | {"module": module.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        write_atomically(out / CHECKPOINT, lambda file: torch.save(state, file))
        for folder in out.glob("shards-*"):  # a training that began under torchrun
            shutil.rmtree(folder)


def _resume(out: Path, module: nn.Module, optimizers: Sequence[Optimizer], seed: int) -> tuple[int, float]:
    """Load the checkpoint into module and optimizers -> (steps done, seconds they took); (0, 0) when there is none."""
    path, state = _checkpoint(out, module)
    if state.get("seed", seed) != seed:
        raise UserError(f"{path} was trained with seed {state['seed']}, not {seed}; choose another output folder.")
    if path.is_dir():
        from sjd2.finetune import sharding

        sharding.load(path, module, optimizers)
    elif "module" in state:
        module.load_state_dict(state["module"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    if state["step"]:
        logger.info("resumed %s after step %d", path, state["step"])
    if distributed.first():
        _cut_curve(out / "curve.jsonl", state["step"])
    return state["step"], state["seconds"]


def _checkpoint(out: Path, module: nn.Module) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint's path and content; without weights where they are sharded."""
    path = out / CHECKPOINT
    if any(out.glob("shards-*/facts.json")):
        from sjd2.finetune import sharding

        folder = sharding.newest(out)
        return folder, sharding.facts(folder)
    if not path.exists():
        return path, {"step": 0, "seconds": 0.0}
    if is_sharded(module):
        raise UserError(f"{path} was written without torchrun; resume without it, or choose another output folder.")
    return path, torch.load(path, map_location=next(module.parameters()).device, weights_only=True)


def _cut_curve(path: Path, step: int) -> None:
    """Drop the lines after the checkpoint's step: those steps run again."""
    kept = [line for line in read_lines(path)[0] if line["step"] <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
