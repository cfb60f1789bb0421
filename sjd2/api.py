"""The Python API: load a model, choose a decoder, generate images.

# B images, N image tokens each
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, open_dict
from PIL import Image
from torch import Tensor

from sjd2.compiler import Compiler
from sjd2.config import choices, compose, expand_home, instantiate
from sjd2.decoding.cuda_graph import Graphs, usual_graphs
from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.generate import CHECK_EVERY, StepInfo, warm_up
from sjd2.decoding.generate import generate as run_decoder
from sjd2.decoding.noise import sample_seed
from sjd2.decoding.sampling import SamplingParams
from sjd2.devices import resolve_device, resolve_dtype
from sjd2.errors import UserError, choose, unknown
from sjd2.models.base import ImageModel
from sjd2.part_choices import PARTS

logger = logging.getLogger(__name__)
# of `generate`, beside settings
ARGUMENTS = ("decoder", "seed", "on_step", "progress", "threads", "graph")


@dataclass(kw_only=True, repr=False)
class Images:
    """What `generate` returns: pixels, tokens, and what each image took.

    images: uint8 [B, 3, H, W], None for a model loaded with pixels="none". tokens: [B, N]. accepted: tokens committed by each
    forward pass, per image. seconds: of the whole batch, {prefill, decode}.
    """

    images: Tensor | None
    tokens: Tensor
    accepted: list[list[int]]
    seconds: dict[str, float]
    prompts: list[str]
    decoder: str
    seed: int

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        size = "no pixels" if self.images is None else "{1}x{0} pixels".format(*self.images.shape[-2:])
        mean = sum(self.forwards) / len(self)
        return (
            f"Images({len(self)} of {size}, {self.tokens.shape[1]} tokens each, {self.decoder}: "
            f"{mean:.1f} forward passes an image, step compression {self.step_compression:.2f})"
        )

    @property
    def forwards(self) -> list[int]:
        """Return the forward passes each image took, the prefill included."""
        return [len(passes) for passes in self.accepted]

    @property
    def step_compression(self) -> float:
        """Return tokens per forward pass, the mean over the images; AR has 1."""
        return float(np.mean([self.tokens.shape[1] / count for count in self.forwards]))

    @property
    def pil(self) -> list[Image.Image]:
        """Return the images as PIL images; raises `UserError` where there are tokens only."""
        if self.images is None:
            raise UserError('there are tokens only: the model was loaded with pixels="none"; load it without.')
        return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in self.images]

    def save(self, folder: str | Path) -> Path:
        """Write 0000.png, 0001.png, ... (if there are pixels), tokens.npy [B, N] and images.json; returns the folder.

        Raises `UserError` where a file is in the way.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"save takes a folder, and a file is in the way of '{folder}'.") from error
        for index, image in enumerate([] if self.images is None else self.pil):
            image.save(folder / f"{index:04}.png")
        np.save(folder / "tokens.npy", self.tokens.cpu().numpy())
        about = {"decoder": self.decoder, "seed": self.seed, "seconds": self.seconds, "prompts": self.prompts}
        about |= {"forwards": self.forwards, "step_compression": self.step_compression, "accepted": self.accepted}
        (folder / "images.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
        return folder


def list_models() -> list[str]:
    """Return the names that `load` takes, those of plug-ins included."""
    return choices("model")


def list_decoders() -> list[str]:
    """Return the names that `decoder` and `generate` take, those of plug-ins included."""
    return choices("decoder")


def load(
    name: str = "tiny", *, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None, **settings: Any
) -> ImageModel:
    """Load a model of conf/model; `settings` are keys of its yaml, e.g. adapter=None, weights="FOLDER".

    device: cpu, cuda, cuda:1, mps, or auto. dtype: a torch dtype, its name, or auto: bfloat16 on cuda, else float32. None: the
    model's own, which is auto for published models and float32 for the embedded one.
    On a GPU the passes of a decoder attend in one kernel where that is possible (a warning says where it is not); what they do
    beside the transformer is compiled, which `model.compiler = None` switches off.
    Raises `UserError` for an unknown name, a wrong setting, a device that is not available, or missing weights.
    """
    from sjd2.models.fusion import fuse  # imports half of transformers

    device = resolve_device(device)
    spec = instantiate(_compose("model", name, settings))
    dtype = resolve_dtype(getattr(spec, "dtype", "float32") if dtype is None else dtype, device)
    model = spec.load(device, dtype)
    for sentence in fuse(model):
        logger.warning("%s.", sentence)
    if model.device.type == "cuda" and model.dtype != torch.float64:
        model.compiler = Compiler()
    return model


def decoder(name: str = "sjd2", *, model: str | None = None, **settings: Any) -> BaseDecoder:
    """Build a decoder of conf/decoder; `settings` are keys of its yaml, e.g. window=16, or a part by name: refiner="coupled".

    model: start from this decoder's defaults on that model (conf/decoder_defaults), e.g. "lumina"; without it from
    conf/decoder alone. Raises `UserError` for an unknown name or a wrong setting.
    """
    if model is not None:
        choose("model", model, list_models())
    return instantiate(_compose("decoder", name, settings, model=model))


def generate(
    model: ImageModel,
    prompts: str | Sequence[str],
    *,
    decoder: str | BaseDecoder = "sjd2",
    seed: int = 0,
    on_step: Callable[[StepInfo], None] | None = None,
    progress: bool = True,
    threads: int | None = 1,
    graph: bool | None = None,
    **settings: Any,
) -> Images:
    """Generate one image per prompt, all in one batch.

    decoder: a name, with its defaults on this model, or what `sjd2.decoder` returned. settings: keys of `SamplingParams`
    (guidance_scale=1.0, top_k=100, sampler="gumbel"; the model's own values by default), and keys of a decoder given by
    name (window=16). on_step: called after every forward pass with a `StepInfo` (pass_index; committed [B] tokens so far;
    accepted [B] in this pass; tokens, the live buffer), tensors on the model's device that nobody has waited for. progress:
    a bar on stderr where that is a terminal. threads: of torch while a CPU generates; one is the fastest for small models,
    None keeps torch's setting. graph: whether passes are recorded and replayed as CUDA graphs (None: on a GPU, where a warning
    says why not). The first call for a decoder and a number of prompts records them, outside the seconds that are returned;
    the model keeps them, with their keys and values, until a call for others.

    Prompt i of a list always gets the same random numbers, so its image does not depend on the other prompts (in float64
    token for token). Raises `UserError` for settings that do not fit.
    """
    _check_model(model)
    prompts = _texts(prompts)
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise UserError(f"seed must be a whole number, got {seed!r}.")
    names = [field.name for field in fields(SamplingParams)]
    chosen = {key: settings.pop(key) for key in names if key in settings}
    spec = getattr(model, "spec", None)
    if isinstance(decoder, str):
        decoder = _decoder_for(spec, decoder, settings, names)
    elif settings:
        raise unknown("setting", next(iter(settings)), [*names, *ARGUMENTS])
    if "window" in settings:
        decoder.check_window(model.layout.length)
    if spec is not None:
        decoder.check(spec)
        chosen = dict(spec.sampling) | chosen
    sampling = SamplingParams(**chosen)
    if spec is not None:
        spec.check_guidance(sampling.guidance_scale)
    decoder.check_sampling(sampling)
    sampling.check(model.layout.vocabulary)
    seeds = [sample_seed(seed, index, 0) for index in range(len(prompts))]
    graphs = _graphs(model, decoder, graph)
    with _threads(model, threads), _bar(model, len(prompts), on_step, shown=progress) as watch:
        condition = model.encode(prompts)
        if graphs is not None and graphs.kept is not None and graphs.kept.num_rows != len(prompts):
            graphs.release()  # it would serve fewer prompts too, each pass at the price of all its rows
        if graphs is not None and not graphs.refused and not graphs.holds(model, decoder, len(prompts), sampling):
            warm_up(model, decoder, condition, sampling=sampling, graphs=graphs)
        result = run_decoder(model, decoder, condition, seeds, sampling=sampling, on_step=watch, graphs=graphs)
        wanted = getattr(spec, "pixels", "decode") != "none"
        pixels = model.draw(result.tokens.to(model.device), prompts, seeds) if wanted else None
    return Images(
        images=pixels,
        tokens=result.tokens,
        accepted=[sample.accepted for sample in result.samples],
        seconds=result.seconds,
        prompts=prompts,
        decoder=decoder.name,
        seed=seed,
    )


def _graphs(model: ImageModel, decoder: BaseDecoder, wanted: bool | None) -> Graphs | None:
    """Return what records and replays passes on the model's device, the same one in every call; None where nothing does."""
    graphs, left_out = usual_graphs(str(model.device), model.spec, decoder, wanted)
    if left_out is not None:
        logger.warning("%s.", left_out)
    # what it holds would be lost memory to eager passes
    model.graphs = None if graphs is None else model.graphs or graphs
    return model.graphs


def _check_model(model: Any) -> None:
    """Raise `UserError` for what is no loaded model."""
    if isinstance(model, str) and model in list_models():
        raise UserError(f"generate takes a loaded model: sjd2.generate(sjd2.load('{model}'), ...).")
    if not hasattr(model, "layout"):
        raise UserError(
            f"generate takes the model first, then prompts: sjd2.generate(sjd2.load('tiny'), prompts); got {model!r:.60}."
        )


def _texts(prompts: Any) -> list[str]:
    """Return prompts as a list; raises `UserError` for none, and for what is no text."""
    listed = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Iterable) else [prompts]
    if strange := [prompt for prompt in listed if not isinstance(prompt, str)]:
        raise UserError(f"prompts are one text or a list of texts, got {strange[0]!r}.")
    if not listed:
        raise UserError("generate needs at least one prompt.")
    return listed


def _decoder_for(spec: Any, name: str, settings: dict[str, Any], sampling: Sequence[str]) -> BaseDecoder:
    """Build a decoder by name with its defaults on the model of `spec`; a wrong setting is answered with all valid ones."""
    model = getattr(spec, "name", None)
    node = _compose("decoder", name, {}, model=model if model in list_models() else None)
    for key in settings:
        if key not in node:
            raise unknown(
                "setting", key, [*sampling, *ARGUMENTS, *(str(key) for key in node if not str(key).startswith("_"))]
            )
    return instantiate(_compose("decoder", name, settings, model=model if model in list_models() else None))


def _compose(group: str, name: str, settings: dict[str, Any], *, model: str | None = None) -> DictConfig:
    choose(group, name, choices(group))
    overrides = [f"{group}={name}", "~decoder_defaults" if model is None else f"model={model}"]
    parts = {key: settings[key] for key in PARTS if group == "decoder" and isinstance(settings.get(key), str)}
    for key, part in parts.items():
        choose(f"decoder/{key}", part, choices(f"decoder/{key}"))
        overrides.append(f"decoder/{key}={part}")
    node = compose(overrides)[group]
    with open_dict(node):  # a wrong name is reported by `instantiate`, with the valid ones
        node.merge_with({key: value for key, value in settings.items() if key not in parts})
    expand_home(node)
    return node


@contextlib.contextmanager
def _threads(model: ImageModel, count: int | None) -> Iterator[None]:
    """Let torch use `count` threads for a while, if the model is on a CPU."""
    before = torch.get_num_threads()
    if count is not None and model.device.type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _bar(
    model: ImageModel, rows: int, on_step: Callable[[StepInfo], None] | None, *, shown: bool
) -> Iterator[Callable[[StepInfo], None] | None]:
    """Show committed tokens on a terminal; yields the callback for every pass."""
    if not (shown and sys.stderr.isatty()):
        yield on_step
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    every = 1 if model.device.type == "cpu" else CHECK_EVERY  # reading the count waits for the device
    total = rows * model.layout.length
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokens", total=total)

        def watch(info: StepInfo) -> None:
            if info.pass_index % every == 0:
                bar.update(task, completed=min(int(info.committed.clamp(max=total // rows).sum()), total))
            if on_step is not None:
                on_step(info)

        yield watch
