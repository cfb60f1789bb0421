"""The roofline of a device: bytes and operations of a pass against memory bandwidth and matrix throughput.

# R model rows (2B with guidance, else B), S slots of a pass
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.architectures import entry_bytes, head_width, text_config, weight_bytes
from benchmarks.timing import time_call
from sjd2.models.base import ImageModel

# data sheets: memory bandwidth in bytes/s, dense bf16 operations/s; the first name contained in the device's is used
SHEETS = {
    "H200": (4.8e12, 989e12),
    "H100 PCIe": (2.0e12, 756e12),
    "H100": (3.35e12, 989e12),
    "GH200": (4.9e12, 989e12),
    "B200": (8.0e12, 2250e12),
    "A100-SXM4-80GB": (2.039e12, 312e12),
    "A100 80GB": (1.935e12, 312e12),
    "A100": (1.555e12, 312e12),
    "L40S": (864e9, 362e12),
    "RTX 5090": (1.792e12, 210e12),
    "RTX 4090": (1.008e12, 165e12),
    "RTX 3090": (936e9, 71e12),
}
LONGEST = 2048  # slots: windows are looked for up to twice as many


@dataclass(frozen=True)
class Peaks:
    """Bytes and operations per second: measured on this device, and of its data sheet if known."""

    bandwidth: float
    flops: float
    sheet_bandwidth: float | None
    sheet_flops: float | None


def peaks(device: torch.device, dtype: torch.dtype, *, size: int, side: int) -> Peaks:
    """Measure a copy of `size` bytes and a product of two `side` x `side` matrices."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_call(device, lambda: target.copy_(source), seconds=0.3)
    a = torch.randn(side, side, dtype=dtype, device=device)
    b = torch.randn(side, side, dtype=dtype, device=device)
    product = time_call(device, lambda: a @ b, seconds=0.3)
    return Peaks(2e3 * size / copy.ms, 2e3 * side**3 / product.ms, *sheet(device))


def sheet(device: torch.device) -> tuple[float | None, float | None]:
    """Return bandwidth and matrix throughput of the device's data sheet; None if it is not in our table."""
    if device.type != "cuda":
        return None, None
    name = torch.cuda.get_device_name(device)
    return next((values for key, values in SHEETS.items() if key in name), (None, None))


@dataclass(frozen=True)
class Work:
    """The minimum work of one pass: bytes read from memory, and multiplications and additions."""

    bytes: float
    flops: float

    def milliseconds(self, peak: Peaks) -> float:
        """Return the least time of the pass on a device with these measured peaks."""
        return 1e3 * max(self.bytes / peak.bandwidth, self.flops / peak.flops)


def free_window(model: ImageModel, peak: Peaks, rows: int, context: int) -> int:
    """Return the most slots of a pass whose arithmetic takes no longer than reading the weights, keys and values; 0: none.

    Up to there a longer window costs nothing but attention's and the host's own time.
    """
    free, step = 0, LONGEST
    while step:
        need = work(model, rows, free + step, context)
        free += step * (need.flops / peak.flops <= need.bytes / peak.bandwidth)
        step //= 2
    return free


def work(model: ImageModel, rows: int, slots: int, context: int) -> Work:
    """Count a pass of `slots` slots in `rows` model rows of `context` cached tokens: weights once, keys and values once."""
    weights = weight_bytes(model)
    config = text_config(model)
    item = torch.empty(0, dtype=model.dtype).element_size()
    attention = 4 * config.num_attention_heads * head_width(model) * config.num_hidden_layers * (context + slots)
    return Work(
        bytes=sum(weights.values()) + rows * (context + slots) * entry_bytes(model),
        flops=rows * slots * (2 * sum(weights.values()) / item + attention),
    )
