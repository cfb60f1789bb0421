"""What the turns of one run used and what disturbed them: CPU share, peak memory, a GPU that others used or that was hot."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sjd2.files import split_lines

LOOK_S = 1.0  # seconds between two looks at the GPU
NO_SAMPLES = (0, 6)  # how NVML says that nobody computed: no error, not found
BRAKES = 0x08 | 0x20 | 0x40 | 0x80  # NVML's reasons for lower clocks: slowdown by hardware, heat (two), power brake


class Meter:
    """Add up the turns of one run: `with meter:` around each. Two runs that take turns have a meter each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ran = self.waited = 0
        self.peak: int | None = None
        self._before = (0, 0)

    def __enter__(self) -> Meter:
        _reset_peak(self.device)
        self._before = _scheduled()
        return self

    def __exit__(self, *_: object) -> None:
        ran, waited = (now - then for now, then in zip(_scheduled(), self._before, strict=True))
        if ran > 0 and waited >= 0:  # a thread that ended took its time with it
            self.ran, self.waited = self.ran + ran, self.waited + waited
        peak = _peak(self.device)
        self.peak = peak if self.peak is None or peak is None else max(self.peak, peak)

    @property
    def peak_gb(self) -> float | None:
        return None if self.peak is None else round(self.peak / 1e9, 3)

    def entry(self) -> dict[str, Any]:
        """Return what a launch knows at its end, for provenance.jsonl.

        peak_memory_gb: in 1e9 bytes, of the GPU, or of the process on a CPU (Linux; elsewhere the peak cannot be reset
        between runs, so it is left out). cpu_share: of the time its threads wanted, what this process got on a CPU; below
        1 something else had the cores. Nothing on a GPU, or where Linux does not report it.
        """
        entry: dict[str, Any] = {"ended": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        if self.peak_gb is not None:
            entry["peak_memory_gb"] = self.peak_gb
        if self.device.type == "cpu" and self.ran > 0:
            entry["cpu_share"] = round(self.ran / (self.ran + self.waited), 3)
        return entry


def _scheduled() -> tuple[int, int]:
    """Return the nanoseconds that this process' threads have run, and waited for a core (proc(5): schedstat)."""
    ran = waited = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):  # a thread may end meanwhile
            numbers = file.read_text().split()
            ran, waited = ran + int(numbers[0]), waited + int(numbers[1])
    return ran, waited


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((line for line in split_lines(status) if line.startswith("VmHWM:")), None)
    return None if line is None else int(line.split()[1]) * 1024


@cache
def gpu_handle(device: str) -> tuple[Any, Any] | None:
    """Return NVML and its handle of a CUDA device; None without a GPU, NVML (the extra `nvml`) or permission."""
    if not device.startswith("cuda"):
        return None
    with contextlib.suppress(Exception):  # a library, driver or device that cannot say ends no run
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    return None


class EnergyMeter:
    """The joules that a GPU draws from here on, idle power included; `joules` is None where no counter reports them.

    It asks the driver, whose counter moves about ten times a second: a batch that is shorter counts by chance, and a mean
    over batches is right.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.joules: float | None = None
        self._began = self._millijoules()

    def stop(self) -> None:
        """Take the joules until now."""
        ended = self._millijoules()
        self.joules = None if ended is None or self._began is None else (ended - self._began) / 1000

    def _millijoules(self) -> int | None:
        if (found := gpu_handle(str(self.device))) is not None:
            with contextlib.suppress(Exception):  # GPUs before Volta have none
                return int(found[0].nvmlDeviceGetTotalEnergyConsumption(found[1]))
        return None


class GpuWatch:
    """Look at the GPU from a thread while images are timed; nothing without a GPU or NVML (the extra `nvml`).

    It asks the driver, not the device, so no pass waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.looks = self.shared = self.throttled = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> GpuWatch:
        if (found := gpu_handle(str(self.device))) is not None:
            self._thread = threading.Thread(target=self._watch, args=found, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=5 * LOOK_S)

    def entry(self) -> dict[str, float]:
        """Return gpu_shared and gpu_throttled, the shares of all looks; {} where there was none."""
        if not self.looks:
            return {}
        return {
            "gpu_shared": round(self.shared / self.looks, 3),
            "gpu_throttled": round(self.throttled / self.looks, 3),
        }

    def _watch(self, nvml: Any, handle: Any) -> None:
        since = time.time_ns() // 1000
        while not self._end.wait(LOOK_S):
            now = time.time_ns() // 1000
            with contextlib.suppress(Exception):
                braked = bool(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) & BRAKES)
                others = others_at_work(nvml, handle, since)
                self.looks, self.shared = self.looks + 1, self.shared + others
                self.throttled += braked
            since = now


def others_at_work(nvml: Any, handle: Any, since: int) -> bool:
    """Return whether another process computed on a GPU since a time in microseconds; one that only holds memory does not.

    Where the GPU does not report who computes, every process on it counts. In a container NVML may number processes as
    the host does: if none of them is this one, one is taken to be.
    """
    running = {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    try:
        busy = {sample.pid for sample in nvml.nvmlDeviceGetProcessUtilization(handle, since) if sample.smUtil > 0}
    except nvml.NVMLError as error:
        busy = set() if getattr(error, "value", None) in NO_SAMPLES else running
    own = os.getpid()
    return bool(busy - {own}) if own in running else len(busy) > 1
