"""Names and shapes of the tensors in published checkpoints (tests/fixtures/keys)."""

from __future__ import annotations

import json

from sjd2.files import ROOT

KEYS = ROOT / "tests" / "fixtures" / "keys"


def public(name: str) -> dict[str, tuple[int, ...]]:
    lines = (KEYS / f"{name}.txt").read_text().splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#"))
    return {name: tuple(map(int, shape.split("x"))) for name, shape in pairs}


def index_bytes(names: dict[str, tuple[int, ...]], shards: int, total: int) -> int:
    """Return the size of the index that transformers writes for these names."""
    weight_map = dict.fromkeys(sorted(names), f"model-00001-of-{shards:05d}.safetensors")
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return len(json.dumps(content, indent=2, sort_keys=True) + "\n")
