"""The parts of one model that `benchmarks.gpu` measures: passes, attention, sampling, pixels, whole decoders.

# B samples, R model rows (2B with guidance, else B), S slots of a pass, V image vocabulary, D width of a head
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.architectures import Architecture, text_config
from benchmarks.roofline import Peaks, work
from benchmarks.timing import Timing, graphed, time_call
from harness.sample import synchronize
from sjd2.decoding.cuda_graph import WARM, Graphs
from sjd2.decoding.decoder import Decoder
from sjd2.decoding.dispatch import start_engine
from sjd2.decoding.engine import Engine
from sjd2.decoding.jacobi import Jacobi
from sjd2.decoding.noise import Noise, Purpose
from sjd2.decoding.pass_cost import stand_at
from sjd2.decoding.refine import Coupled, Resample
from sjd2.decoding.sampling import SamplingParams, draw, draw_gumbel
from sjd2.decoding.verify import Exact, residual
from sjd2.denoising.schedule import Schedule
from sjd2.denoising.sjd2_decoder import sjd2
from sjd2.errors import first_line
from sjd2.models.adapter import Adapter, AdapterSettings
from sjd2.models.base import Condition, ImageModel
from sjd2.models.fusion import fuse
from sjd2.models.kv_cache import RowCache
from sjd2.models.pixels import fuse_pixels
from sjd2.models.window_attention import set_attention, window_attention

SLOTS, FEW_SLOTS = (1, 16, 32, 64, 96, 128), (1, 16)  # full size; --small
STEPS = 25  # denoising steps of the paper's setting of SJD2
KERNELS = {
    "chosen": None,  # by torch, as in a pass
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
Row = dict[str, Any]


class Bench:
    """One model under measurement; every part yields rows, so that the caller can stop it between them."""

    def __init__(self, plan: Architecture, model: ImageModel, peak: Peaks, *, graphs: bool, small: bool) -> None:
        self.plan, self.model, self.peak, self.graphs = plan, model, peak, graphs
        self.device = model.device
        self.slots = FEW_SLOTS if small else SLOTS
        self.effort: dict[str, Any] = {"seconds": 0.0, "least": 2, "warm": 1} if small else {}
        self.branches = 1 if plan.guidance == 1 else 2
        self.params = SamplingParams(guidance_scale=plan.guidance, top_k=plan.top_k)
        self.plain_pixels = True
        self.half = plan.layout.length // 2  # passes are measured in the middle of an image
        self.context = plan.prompt + self.half

    # ---- passes of the transformer and its image head

    def passes(self, batch: int) -> Iterator[Row]:
        """Yield a row per window: milliseconds of forward and image head, all guidance branches, against the roof.

        Where the model's attention is fused, each window is measured once more with SDPA.
        """
        fused = self.model.fused
        for way in (True, False) if fused else (False,):
            set_attention(self.model, fused=way)
            yield from self._windows(batch, "fused" if way else "sdpa")
        set_attention(self.model, fused=fused)

    def _windows(self, batch: int, attention: str) -> Iterator[Row]:
        rows, model = self.branches * batch, self.model
        cache = self._filled(rows, max(self.slots))
        for slots in self.slots:
            tokens = torch.randint(self.plan.layout.vocabulary, (rows, slots), device=self.device)
            x, positions = model.embed(tokens), cache.lengths[:, None] + torch.arange(slots, device=self.device)

            def run(x: Tensor = x, positions: Tensor = positions) -> None:
                model.logits(model.forward(x, positions, cache))

            need = work(model, rows, slots, self.context)
            yield {
                "batch": batch, "slots": slots, "attention": attention, **self._both(run),
                "roof_ms": need.milliseconds(self.peak), "gigabytes": need.bytes / 1e9, "teraflop": need.flops / 1e12,
            }  # fmt: skip

    def _filled(self, rows: int, slots: int) -> RowCache:
        """Return a cache of rows in the middle of an image, with random keys and values."""
        cache = self.model.cache(rows, self.context + slots)
        x = self.model.embed(torch.zeros(rows, 1, dtype=torch.long, device=self.device))
        self.model.forward(x, torch.zeros(rows, 1, dtype=torch.long, device=self.device), cache)
        layers: list[Any] = list(cache.layers)
        for layer in layers:
            layer.keys.normal_()
            layer.values.normal_()
        cache.lengths.fill_(self.context)
        cache.bound = self.context
        return cache

    # ---- whole decoder passes

    def decoders(self, batch: int) -> Iterator[Row]:
        """Yield a row per training-free decoder: milliseconds of `Engine.step`, eager and replayed, and of the prefill."""
        parts: dict[str, Any] = {"drafter": Jacobi(), "verifier": Exact()}
        for decoder in (
            Decoder(name="ar", window=1, lossless=True),
            Decoder(name="sjd", window=min(32, self.plan.window), lossless=True, refiner=Resample(), **parts),
            Decoder(name="scd", window=min(32, self.plan.window), lossless=True, refiner=Coupled(), **parts),
            Decoder(name="scd", window=self.plan.window, lossless=True, refiner=Coupled(), **parts),
        ):
            yield {"batch": batch, "decoder": decoder.name, "slots": decoder.window, **self._steps(decoder, batch)}

    def sjd2(self, batch: int) -> Iterator[Row]:
        """Yield the same for SJD2 by both rules, with random fine-tuned weights of the usual shape."""
        wide = self.plan.window
        if self.model.adapter is None:
            with torch.inference_mode(False):
                self.model.adapter = Adapter(AdapterSettings(), self.model).freeze()
                fuse(self.model)
        settings: dict[str, Any] = {"name": "sjd2", "verifier": Exact(), "schedule": Schedule()}
        for decoder in (
            sjd2(window=min(32, wide), steps=1, rule="exact", lossless=True, **settings),
            sjd2(window=wide, steps=min(STEPS, wide - 2), rule="paper", lossless=False, **settings),
        ):
            name = f"sjd2 {decoder.rule}"
            yield {"batch": batch, "decoder": name, "slots": decoder.window, **self._steps(decoder, batch)}

    def _steps(self, decoder: Decoder, batch: int) -> Row:
        condition = self.plan.condition(self.model, batch)
        wide = max(condition.embeds.shape[1], condition.uncond_embeds.shape[1])
        row = self._passes(start_engine(self.model, decoder, batch, wide, self.params), condition, "")
        if self.graphs:
            try:
                begin, engine = time.perf_counter(), Graphs().start(self.model, decoder, batch, wide, self.params)
                row |= self._passes(engine, condition, "graph_")
                row["graph_seconds"] = time.perf_counter() - begin  # to open it, record, compile and time it
            except RuntimeError as error:
                row["graph_skipped"] = reason(error)
        return row

    def _passes(self, engine: Engine, condition: Condition, name: str) -> Row:
        """Time passes, each from the middle of the image."""
        rows = list(range(len(condition)))
        engine.admit(rows, condition, rows)
        prompt = engine.cache.lengths.clone()

        def hold() -> None:
            stand_at(engine, self.half, prompt)

        found = time_call(self.device, engine.step, **(self.effort | {"warm": WARM + 2}), between=hold)
        prefill = time_call(self.device, lambda: engine.admit(rows, condition, rows), warm=1, most=5, least=2)
        times = {f"{name}ms": found.ms, f"{name}n": found.n, f"{name}prefill_ms": prefill.ms}
        return times if name else times | {"host_ms": found.host_ms}

    # ---- attention alone

    def attention(self, batch: int) -> Iterator[Row]:
        """Yield a row per window, kernel and way of sharing keys: milliseconds of one layer's attention under a mask.

        repeated: keys and values copied for each head of a group, as transformers does under a mask. folded: the heads of a
        group become further slots that attend to the one set of keys they share. fused: the kernel of window_attention.py.
        """
        config, rows = text_config(self.model), self.branches * batch
        heads, own = config.num_attention_heads, config.num_key_value_heads
        width, shared = config.hidden_size // heads, heads // own
        settings = {"device": self.device, "dtype": self.model.dtype}
        for slots in self.slots:
            cache = RowCache(1, rows, self.context + slots, self.device)
            cache.bound = self.context
            cache.lengths.fill_(self.context)
            mask = cache.window(slots, self.model.dtype)["attention_mask"]
            query = torch.randn(rows, heads, slots, width, **settings)
            key, value = (torch.randn(rows, own, cache.span, width, **settings) for _ in range(2))

            def repeated(q: Tensor = query, k: Tensor = key, v: Tensor = value, m: Tensor = mask) -> Tensor:
                k, v = (x[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for x in (k, v))
                return scaled_dot_product_attention(q, k, v, attn_mask=m)

            folded_mask = mask.repeat(1, 1, shared, 1)  # once per pass, for all layers

            def folded(q: Tensor = query, k: Tensor = key, v: Tensor = value, m: Tensor = folded_mask) -> Tensor:
                q = q.unflatten(1, (own, shared)).flatten(2, 3)
                return scaled_dot_product_attention(q, k, v, attn_mask=m)

            cache.fused = True
            window = cache.window(slots, self.model.dtype).get("window")

            def fused(q: Tensor = query, k: Tensor = key, v: Tensor = value, w: Any = window) -> Tensor:
                return window_attention(q, k, v, w.lengths, w.seen, q.shape[-1] ** -0.5)

            if self.model.fused:
                yield {"batch": batch, "slots": slots, "way": "fused", "kernel": "triton", **self._both(fused)}
            for way, call in {"repeated": repeated, "folded": folded}.items():
                if shared == 1 and way == "folded":
                    continue
                for kernel, backend in KERNELS.items():
                    yield {"batch": batch, "slots": slots, "way": way, "kernel": kernel, **self._with(backend, call)}

    def _with(self, backend: SDPBackend | None, call: Callable[[], Any]) -> Row:
        if backend is None:
            return self._both(call)
        try:
            with sdpa_kernel(backend):
                return self._both(call)
        except RuntimeError as error:
            return {"skipped": reason(error)}

    # ---- everything around the transformer

    def sampling(self, batch: int) -> Iterator[Row]:
        """Yield a row per part and window: the target distribution with top-k, draws, verification, redrawing draft tokens."""
        vocabulary, params = self.plan.layout.vocabulary, self.params
        for slots in sorted({1, min(32, self.plan.window), self.plan.window}):
            shape = (batch, slots)
            logits = torch.randn(self.branches * batch, slots, vocabulary, device=self.device)
            p, q = (torch.randn(*shape, vocabulary, device=self.device).softmax(-1) for _ in range(2))
            token, u = q.argmax(-1), torch.rand(shape, device=self.device)
            noise = Noise(torch.arange(batch, device=self.device))
            place = torch.arange(slots, device=self.device).expand(batch, -1)
            parts: dict[str, Callable[[], Any]] = {
                "law": lambda logits=logits: params.probs(logits),
                "uniform": lambda noise=noise, place=place: noise.uniform(place, Purpose.ACCEPT),
                "draw": lambda p=p, u=u: draw(p, u),
                "draw gumbel": lambda p=p, n=noise, place=place: draw_gumbel(p, n.gumbel(place, vocabulary)),
                "chance": lambda p=p, q=q, token=token: Exact().accept_prob(p, q, token),
                "redraw": lambda p=p, q=q, token=token, u=u: draw(residual(p, q, token), u),
            }
            for name, call in parts.items():
                yield {"batch": batch, "part": name, "slots": slots, **self._both(call)}

    def pixels(self, batch: int) -> Iterator[Row]:
        """Yield milliseconds of the image decoder in float32 and as a GPU draws; none where a diffusion stage takes its place.

        first_s: seconds until the first image was drawn fast: compiling it and checking it.
        """
        if self.model.pixel_part != "image":
            return
        layout = self.plan.layout
        codes = torch.randint(layout.vocabulary, (batch, layout.num_codes), device=self.device)
        tokens = layout.tokens(codes)
        words = [""] * batch, [0] * batch
        found = time_call(self.device, lambda: self.model.decode(tokens), warm=1, least=2, most=5)
        # once an image was drawn fast, at the first batch size, the decoder stays so
        yield {"batch": batch, "way": "float32" if self.plain_pixels else "together", "ms": found.ms, "n": found.n}
        if not fuse_pixels(self.model):
            return
        begin = time.perf_counter()
        self.model.draw(tokens, *words)
        synchronize(self.device)
        seconds, self.plain_pixels = time.perf_counter() - begin, False
        found = time_call(self.device, lambda: self.model.draw(tokens, *words), warm=1, least=2, most=5)
        yield {"batch": batch, "way": "fast", "ms": found.ms, "n": found.n, "first_s": seconds}

    def compiled(self, batch: int) -> Iterator[Row]:
        """Yield a row per window: milliseconds of a pass under torch.compile, and seconds to compile it."""
        for slots in (1, 32):
            rows = self.branches * batch
            cache = self._filled(rows, slots)
            x = self.model.embed(torch.zeros(rows, slots, dtype=torch.long, device=self.device))
            positions = cache.lengths[:, None] + torch.arange(slots, device=self.device)
            forward = torch.compile(lambda x, p, c: self.model.logits(self.model.forward(x, p, c)), dynamic=False)
            begin = time.perf_counter()
            forward(x, positions, cache)
            synchronize(self.device)
            seconds = time.perf_counter() - begin
            found = self._both(lambda f=forward, x=x, p=positions, c=cache: f(x, p, c))
            yield {"batch": batch, "slots": slots, "compile_s": seconds, **found}

    def _both(self, call: Callable[[], Any]) -> Row:
        """Time a call eagerly and, on a GPU, as a graph."""
        eager = time_call(self.device, call, **self.effort)
        row: Row = {"ms": eager.ms, "host_ms": eager.host_ms, "n": eager.n}
        if not self.graphs:
            return row
        try:
            replayed: Timing = time_call(self.device, graphed(self.device, call))
        except RuntimeError as error:
            return row | {"graph_skipped": reason(error)}
        return row | {"graph_ms": replayed.ms, "graph_n": replayed.n}


def reason(error: Exception) -> str:
    """Return the first line of an error."""
    return first_line(error)[:200]
