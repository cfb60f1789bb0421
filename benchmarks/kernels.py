"""Count what a pass of each decoder launches, part by part: python -m benchmarks.kernels.

    python -m benchmarks.kernels                              # the embedded model, every decoder of conf/decoder
    python -m benchmarks.kernels --decoders ar,scd --batch 8
    python -m benchmarks.kernels --device cuda                # also the kernels that the profiler sees

An operation counts if it computes or copies: views, and memory that is only set aside, do not. On a GPU it is one kernel or
a few; run one by one, each costs at least a launch. Operations of a CPU pass stand for those of a GPU as far as the decoder
goes; the transformer is transformers' plain one there and the fused one on a GPU. No value of the device is read.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.result_file import write_result
from harness.provenance import start_entry
from sjd2 import api
from sjd2.compiler import Compiler
from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.dispatch import start_engine
from sjd2.decoding.engine import Engine
from sjd2.decoding.sampling import SamplingParams
from sjd2.errors import UserError, choose
from sjd2.models.base import ImageModel

TRANSFORMER, DISTRIBUTION, VERIFY, REFINE, DRAFTER, REST = PARTS = (
    "transformer", "distribution", "verify", "refine", "drafter", "rest",
)  # fmt: skip
# of an engine, by the names of its methods; what none of them covers is `rest`: commit, shift, noise of the pass
METHODS = {
    "forward": TRANSFORMER, "_forward": TRANSFORMER, "probs": DISTRIBUTION, "test": VERIFY, "next_token": VERIFY,
    "_test": VERIFY, "_judge": VERIFY, "_carry": REFINE,
}  # fmt: skip
FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
FREE |= {"aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::detach", "aten::scalar_tensor"}
WARM = 3  # passes before the one that is counted: tables are built, tensors that were None get their shape


class Launches(TorchDispatchMode):
    """Counts operations by the part of the pass that is running, and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.part = REST
        self.parts: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, call: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not call.is_view and call._schema.name not in FREE:
            self.parts[self.part] += 1
            self.names[call._schema.name] += 1
        return call(*args, **(kwargs or {}))

    def within(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call` with its operations put down to `part`; the outermost part counts, but for a pass' own head."""

        def labelled(*arguments: Any, **named: Any) -> Any:
            before = self.part
            if before == REST or (before == TRANSFORMER and part == DISTRIBUTION):
                self.part = part
            try:
                return call(*arguments, **named)
            finally:
                self.part = before

        return labelled


class _Labelled:
    """A part of a decoder whose calls are counted as `part`."""

    def __init__(self, target: Any, part: str, launches: Launches) -> None:
        self._target, self._part, self._launches = target, part, launches

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        return self._launches.within(self._part, found) if callable(found) else found

    def __call__(self, *arguments: Any) -> Any:
        return self._launches.within(self._part, self._target)(*arguments)


@contextmanager
def labelled(engine: Engine, launches: Launches) -> Iterator[None]:
    """Tell `launches` for a while which part of a pass is running."""
    model, sampler = engine.model, engine.state.sampler
    places: list[tuple[Any, str, str]] = [(engine, name, part) for name, part in METHODS.items()]
    places += [(model, "embed", TRANSFORMER), (model, "forward", TRANSFORMER), (model, "logits", DISTRIBUTION)]
    places.append((sampler, "draw", VERIFY))
    places = [(owner, name, part) for owner, name, part in places if hasattr(owner, name)]
    for owner, name, part in places:
        setattr(owner, name, launches.within(part, getattr(owner, name)))
    parts = {name: getattr(engine, name) for name in ("drafter", "refiner") if hasattr(engine, name)}
    for name, part in parts.items():
        setattr(engine, name, _Labelled(part, DRAFTER if name == "drafter" else REFINE, launches))
    try:
        yield
    finally:
        for owner, name, _ in places:
            delattr(owner, name)
        for name, part in parts.items():
            setattr(engine, name, part)


@torch.inference_mode()
def count(model: ImageModel, decoder: BaseDecoder, sampling: SamplingParams, batch: int) -> dict[str, Any]:
    """Return a row: operations of one pass by part and in all; on a GPU the profiler's kernels, plain and compiled."""
    model.compiler = None
    engine = _begin(model, decoder, sampling, batch)
    launches = Launches()
    with labelled(engine, launches), launches:
        engine.step()
    row: dict[str, Any] = {"decoder": decoder.name, "window": decoder.window, "batch": batch}
    row |= {part: launches.parts[part] for part in PARTS}
    row["all"], row["beside"] = sum(launches.parts.values()), sum(launches.parts.values()) - launches.parts[TRANSFORMER]
    row["most"] = dict(launches.names.most_common(8))
    if model.device.type == "cuda":
        row["kernels"] = _kernels(engine)
        model.compiler = Compiler()
        compiled = _begin(model, decoder, sampling, batch)
        row["compiled"], row["compile_s"] = _kernels(compiled), sum(model.compiler.seconds.values())
        model.compiler = None
    return row


def _begin(model: ImageModel, decoder: BaseDecoder, sampling: SamplingParams, batch: int) -> Engine:
    """Open an engine and run its first passes."""
    condition = model.encode(["a small red circle"] * batch)
    width = max(condition.embeds.shape[1], condition.uncond_embeds.shape[1])
    engine = start_engine(model, decoder, batch, width, sampling)
    engine.admit(list(range(batch)), condition, list(range(batch)))
    engine.cache.reads = False  # as on a GPU, where the host keeps a bound instead of asking
    for _ in range(WARM):
        engine.step()
    return engine


def _kernels(engine: Engine) -> int:
    """Return how many kernels a pass runs on the GPU, by torch's profiler."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        engine.step()
        torch.cuda.synchronize()
    names = [event.name for event in found.events() or () if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    columns = [
        "decoder",
        "window",
        *PARTS,
        "all",
        "beside",
        *(name for name in ("kernels", "compiled") if name in rows[0]),
    ]
    head = [f"{name} the transformer" if name == "beside" else name for name in columns]
    lines = [f"| {' | '.join(head)} |", f"|{' :--- |'}{' ---: |' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(str(row[name]) for name in columns)} |" for row in rows)])


def main(arguments: list[str] | None = None) -> Path:
    """Run the command and return the file written."""
    options = _parse(arguments)
    model = api.load(options.model, device=options.device, dtype=options.dtype)
    settings: dict[str, Any] = dict(model.spec.sampling) if model.spec is not None else {}
    sampling = SamplingParams(**settings | {"sampler": options.sampler})
    result: dict[str, Any] = start_entry(model.device, dtype=options.dtype, model=options.model, batch=options.batch)
    result |= {"law": sampling.settings(), "decoders": [], "skipped": {}}
    for name in options.decoders:
        decoder = api.decoder(name, model=options.model)
        try:
            if model.spec is not None:
                decoder.check(model.spec)
            decoder.check_sampling(sampling)
        except UserError as error:
            result["skipped"][name] = str(error)
            continue
        result["decoders"].append(count(model, decoder, sampling, options.batch) | {"decoder": name})
    print(table(result["decoders"]))
    for name, why in result["skipped"].items():
        print(f"{name}: {why}")
    return write_result(result, options.out, options.model, "kernels", options.dtype)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="tiny", choices=api.list_models(), help="its weights must be there")
    parser.add_argument("--decoders", default=",".join(api.list_decoders()), help="names, comma-separated; default all")
    parser.add_argument("--batch", type=int, default=1, help="images in flight")
    parser.add_argument("--sampler", default="cdf", choices=("cdf", "gumbel"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32", "float64"))
    parser.add_argument("--out", type=Path, help="the JSON file; default benchmarks/results/")
    options = parser.parse_args(arguments)
    options.decoders = options.decoders.split(",")
    try:
        for name in options.decoders:
            choose("--decoders", name, api.list_decoders())
        if options.batch < 1:
            raise UserError(f"--batch must be 1 or more, got {options.batch}.")
    except UserError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
