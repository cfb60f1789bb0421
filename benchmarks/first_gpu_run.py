"""Run what a machine with a GPU should answer first: python -m benchmarks.first_gpu_run.

Most important first, each with a limit in seconds, ten minutes at most; whatever fails, the rest still runs. Logs and JSON
go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.result_file import result_file
from sjd2.files import split_lines

TESTS = ("pytest", "-m", "gpu", "-n", "0", "-q")
KERNEL = "(sdpa and kernel) or stored or key_too_many or fused_when_loaded"
RUN = ("device=cuda", "decoder=scd", "limit=12", "batch_size=1", "evaluation=none")
# 590 seconds in all: is it right, is it fast, what is slow
STEPS: dict[str, tuple[int, tuple[str, ...]]] = {
    "kernel": (120, ("-m", *TESTS, "tests/engine/test_gpu_attention.py", "-k", KERNEL)),
    "decoders": (90, ("-m", *TESTS, "tests/engine/test_gpu_attention.py", "-k", "recording or joined or family")),
    "lumina": (220, ("-m", "benchmarks.gpu", "--models", "lumina", "--seconds", "200")),
    "kernels": (60, ("-m", "benchmarks.kernels", "--device", "cuda")),
    "fast": (50, ("run.py", *RUN, "runs_dir=runs/gpu-fast")),
    "eager": (50, ("run.py", *RUN, "runs_dir=runs/gpu-eager", "runtime=eager")),
}


def run(name: str, seconds: int, arguments: tuple[str, ...]) -> str:
    """Run one step and return how it ended, with the last lines of its log."""
    log: Path = result_file("gpu", name).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        try:
            done = subprocess.run([sys.executable, *arguments], stdout=out, stderr=out, timeout=seconds, check=False)
            ended = f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds} s"
    last = "\n".join(split_lines(log.read_text(encoding="utf-8", errors="replace"))[-4:])
    return f"{name}: {ended}, {log}\n{last}\n"


def main(arguments: list[str] | None = None) -> None:
    """Run all steps; ends with one sentence where torch sees no GPU."""
    first = str(__doc__).partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_gpu_run", description=first)
    parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU; to try the commands without one: python -m benchmarks.gpu --small")
    for name, (seconds, words) in STEPS.items():
        print(run(name, seconds, words), flush=True)


if __name__ == "__main__":
    main()
