"""One training loop for every recipe: seeded, scheduled, clipped, checkpointed; a killed run resumes to equal weights.

Exact resuming needs no saved random state: data and noise are functions of (seed, step), because the loop seeds torch
from them before each step, and a recipe draws its batch from `step_rng(seed, step)`.
Under torchrun all processes run this loop in step; the first one reports and, unless weights are sharded, checkpoints.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sjd2.errors import UserError
from sjd2.finetune import distributed
from sjd2.finetune.objective import is_sharded

Log = Callable[[int, dict[str, float]], None]
Piece = tuple[Tensor, dict[str, float | Tensor]]  # a scalar to minimise, figures to report
logger = logging.getLogger(__name__)


def step_rng(seed: int, step: int, purpose: int = 0) -> np.random.Generator:
    """Give the generator of one step's data; purposes (training, validation) never share a stream."""
    return np.random.default_rng([seed, purpose, step])


def warmup_decay(steps: int, warmup: int, decay: float, cosine: bool = False) -> Callable[[int], float]:
    """Build a schedule: linear up over `warmup` steps, constant, down to zero over the last `decay` of `steps`.

    decay=0 stays constant. cosine: the way down is half a wave instead of a line.
    """
    tail = max(1, round(steps * decay))

    def factor(step: int) -> float:
        left = (steps - step) / tail
        if cosine:
            left = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left))
        return min(1.0, (step + 1) / max(1, warmup), left)

    return factor


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place at once: a kill leaves the old file."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)


def train(
    module: nn.Module,
    loss: Callable[[int], Piece | Iterator[Piece]],
    optimizers: Sequence[Optimizer],
    *,
    steps: int,
    out: Path,
    seed: int,
    log: Log | None = None,
    schedule: Callable[[int], float] | None = None,
    clip: float | None = 1.0,
    bf16: bool = False,
    after: Callable[[int], dict[str, float]] | None = None,
    log_every: int = 20,
    checkpoint_s: float = 60.0,
) -> None:
    """Minimise `loss(step)` for `steps` steps, going on from the checkpoint in `out` where there is one.

    module: all that training changes, buffers such as moving averages included; its state is checkpointed.
    loss: step -> (scalar, figures to report); called under bf16 autocast with `bf16`, in the module's dtype without. Or it
    yields such a pair per micro-batch: scalars and figures are shares, whose sum over micro-batches and processes is meant.
    schedule: step -> factor on each optimizer's learning rate. clip: largest norm of the whole module's gradient.
    after: called with the number of finished steps after each one, for moving averages, validation and exports; returns
    figures to report or an empty dict.
    Writes `out/curve.jsonl` (one line per report) and the checkpoint, every `checkpoint_s` seconds and at the end.
    Raises FloatingPointError when the loss is not finite and UserError when the checkpoint is of another seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = next(module.parameters()).device
    curve = out / "curve.jsonl"
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group.setdefault("initial_lr", group["lr"])
    start, seconds = _resume(out, curve, module, optimizers, seed)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # resuming makes new ones
    began = saved = time.monotonic()
    sums: dict[str, Tensor | float] = {}
    count = 0
    for step in range(start, steps):
        torch.manual_seed(int(step_rng(seed, step, purpose=1).integers(2**62)))
        factor = schedule(step) if schedule else 1.0
        for group in groups:
            group["lr"] = group["initial_lr"] * factor
        for value, figures in _pieces(loss, step, device, bf16):
            value.backward()
            for name, figure in ({"loss": value.detach()} | figures).items():
                sums[name] = sums.get(name, 0.0) + figure  # summed on the device: no wait for the GPU at each step
        if not is_sharded(module):
            distributed.sum_gradients(p for group in groups for p in group["params"])
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
        module.zero_grad(set_to_none=True)  # of parameters without an optimizer too: they count in the norm
        count += 1
        done = step + 1
        report = dict(after(done)) if after else {}
        if report or done % log_every == 0 or done == steps:
            report = {name: total / count for name, total in distributed.total(sums).items()} | report
            sums, count = {}, 0
            now = time.monotonic()
            if not np.isfinite(report["loss"]):
                raise FloatingPointError(f"The loss is {report['loss']} after step {done}; lower the learning rate.")
            if distributed.first():
                _report(curve, done, steps, report, seconds + now - began, (now - began) / (done - start), log)
        if done == steps or distributed.agreed(time.monotonic() - saved > checkpoint_s):
            _save(out, module, optimizers, {"step": done, "seed": seed, "seconds": seconds + time.monotonic() - began})
            saved = time.monotonic()


def _pieces(
    loss: Callable[[int], Piece | Iterator[Piece]], step: int, device: torch.device, bf16: bool
) -> Iterator[Piece]:
    """Yield the step's micro-batches, each computed under autocast; the caller's backward passes are not."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        pieces = loss(step)
    if isinstance(pieces, tuple):
        yield pieces
        return
    while True:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def _save(out: Path, module: nn.Module, optimizers: Sequence[Optimizer], facts: dict[str, Any]) -> None:
    if is_sharded(module):
        from sjd2.finetune import sharding

        sharding.save(out, module, optimizers, facts)
    elif distributed.first():
        state = facts | {"module": module.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        write_atomically(out / "checkpoint.pt", lambda part: torch.save(state, part))
        for folder in out.glob("shards-*"):  # a training that began under torchrun
            shutil.rmtree(folder)


def _resume(out: Path, curve: Path, module: nn.Module, optimizers: Sequence[Optimizer], seed: int) -> tuple[int, float]:
    """Load the checkpoint into module and optimizers -> (steps done, seconds they took); (0, 0) when there is none."""
    state: dict[str, Any] = {"step": 0, "seconds": 0.0}
    path, device = out / "checkpoint.pt", next(module.parameters()).device
    if any(out.glob("shards-*/facts.json")):
        from sjd2.finetune import sharding

        path = sharding.newest(out)
        state = sharding.facts(path)
    elif path.exists():
        if is_sharded(module):
            raise UserError(f"{path} was written without torchrun; go on without it, or choose another output folder.")
        state = torch.load(path, map_location=device, weights_only=True)
    if state.get("seed", seed) != seed:
        raise UserError(f"{path} was trained with seed {state['seed']}, not {seed}; choose another output folder.")
    if path.is_dir():
        sharding.load(path, module, optimizers)
    elif "module" in state:
        module.load_state_dict(state["module"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    if state["step"]:
        logger.info("resumed %s after step %d", path, state["step"])
    if distributed.first():
        # Steps after the checkpoint run again, so their lines go.
        lines = curve.read_text().splitlines(keepends=True) if curve.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
        write_atomically(curve, lambda part: part.write_text("".join(kept)) and None)
    return state["step"], state["seconds"]


def _report(
    curve: Path, done: int, steps: int, report: dict[str, float], seconds: float, pace: float, log: Log | None
) -> None:
    with curve.open("a") as file:
        file.write(json.dumps({"step": done, "seconds": round(seconds, 1)} | report) + "\n")
    if log:
        log(done, report)
    figures = " ".join(f"{name} {value:.4g}" for name, value in report.items())
    left = (steps - done) * pace / 60
    logger.info("step %d/%d  %s  %.2f steps/s  %.1f min left", done, steps, figures, 1 / max(pace, 1e-9), left)
