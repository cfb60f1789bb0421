"""Build the cheap parts of a command and check them against each other, before any weights load."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from evaluation.identity import by_content, identity
from evaluation.prompts import Prompts
from evaluation.run_folder import RunFolder, run_folder, run_folders
from evaluation.score import Metric
from harness.console import say
from harness.provenance import physical_cores
from harness.ranks import ALONE, Ranks
from harness.settings import check_writable
from harness.tracking import Tracker
from sjd2.compiler import why_not
from sjd2.config import instantiate, plain
from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.sampling import SamplingParams
from sjd2.devices import resolve_device, resolve_dtype
from sjd2.errors import UserError

# the command line's sampling parameters count, the digest tells the revision, where layers lie changes no token, and the
# dtype that a run has is a part of its own
NO_IDENTITY = (
    "sampling",
    "revision",
    "device_map",
    "text_device",
    "pixels",
    "dtype",
    "diffusion_device",
    "diffusion_offload",
)
SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p", "min_p", "sampler")


@dataclass(kw_only=True)
class Plan:
    """The cheap parts of one run; nothing in it holds weights."""

    run: RunFolder
    identity: dict[str, Any]
    spec: Any  # the model without its weights: a `ModelSpec`, or what has its methods
    decoder: BaseDecoder
    sampling: SamplingParams
    prompts: Prompts
    device: str
    dtype: str
    fused: bool  # attention in one kernel where the model and the device have it
    compiled: bool  # what a pass does beside the transformer in few kernels, by torch.compile
    pixels: bool  # turn tokens into images; False with model.pixels=none


def set_threads(cfg: DictConfig) -> None:
    """Give torch its CPU threads: runtime.threads, else OMP_NUM_THREADS, else one per physical core."""
    wish = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(cfg.runtime.threads or (int(wish) if wish.isdigit() and int(wish) else physical_cores()))


def make_plan(cfg: DictConfig, ranks: Ranks = ALONE) -> Plan:
    """Build and cross-check everything a run needs but the weights; raises UserError."""
    device = ranks.device(resolve_device(cfg.device))
    if cfg.runtime.graph and not device.startswith("cuda"):
        raise UserError(f"runtime.graph=true needs a GPU, device is {device}; use device=cuda or runtime.graph=false.")
    prompts = instantiate(cfg.prompts)
    sampling = SamplingParams(**{key: cfg[key] for key in SAMPLING})
    decoder = instantiate(cfg.decoder)
    spec = instantiate(cfg.model)
    dtype = resolve_dtype(cfg.dtype or getattr(spec, "dtype", "float32"), device)
    sampling.check(spec.vocabulary)
    spec.check_guidance(sampling.guidance_scale)
    _ = prompts.texts
    # before spec.check(), which may ask the hub: a decoder that lacks its fine-tuning is reported at once
    decoder.check(spec)
    decoder.check_sampling(sampling)
    if any(word.lstrip("+").startswith("decoder.window=") for word in _words()):
        decoder.check_window(spec.layout.length)
    spec.check()
    settings = identity(
        model=model_settings(cfg),
        digest=spec.digest(),
        decoder=by_content(plain(cfg.decoder)),
        law=sampling.settings(),
        prompts={"digest": prompts.digest, "repeats": prompts.repeats},
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        refill=cfg.refill,
        dtype=dtype,
        # earlier releases picked outlier columns over all rows of a pass: other tokens, so another run
        **({"int8": "row-wise"} if cfg.model.get("quantisation") == "8bit" else {}),
        **({} if draws(cfg) else {"pixels": "none"}),  # a folder has an image of every record, or of none
    )
    run = RunFolder(cfg.run_dir) if cfg.run_dir else run_folder(cfg.runs_dir, f"{spec.name}-{decoder.name}", settings)
    check_writable(run.path, "run_dir")
    settings["id"] = run.identity.get("id", settings["id"])  # a run begun by an older release keeps the id it has
    parts = {"spec": spec, "decoder": decoder, "sampling": sampling, "prompts": prompts}
    parts |= {"fused": cfg.runtime.fused, "compiled": compiled(cfg, device, dtype), "pixels": draws(cfg)}
    return Plan(run=run, identity=settings, device=device, dtype=dtype, **parts)


def compiled(cfg: DictConfig, device: str, dtype: str) -> bool:
    """Return whether the pieces of a pass are compiled: by default on CUDA, never in float64.

    Raises `UserError` if it is asked for where no code can be generated.
    """
    wanted = device.startswith("cuda") if cfg.runtime.compile is None else cfg.runtime.compile
    if not wanted or dtype == "float64":
        return False
    if device == "cpu" and (why := why_not()) is not None:
        raise UserError(f"runtime.compile=true needs a C++ compiler on a CPU: {why}; install one, or leave it out.")
    return True


def draws(cfg: DictConfig) -> bool:
    """Return whether a command turns tokens into images; not with model.pixels=none, which times the AR stage alone."""
    return cfg.model.get("pixels") != "none"


def _words() -> Sequence[str]:
    """Return the settings on the command line."""
    return HydraConfig.get().overrides.task if HydraConfig.initialized() else ()


def model_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the model's resolved settings as an identity holds them: no sampling defaults, no paths."""
    settings = plain(cfg.model)
    return by_content({key: value for key, value in settings.items() if key not in NO_IDENTITY}, covered=True)


def build_metrics(cfg: DictConfig, *, images: bool = True) -> dict[str, Metric]:
    """Build the metrics of `evaluation=` and let each check its files and libraries.

    images: False leaves out those that need any.
    """
    built = {str(name): instantiate(node) for name, node in (cfg.evaluation.get("metrics") or {}).items()}
    if not images:
        left_out = [name for name, metric in built.items() if metric.needs_images]
        built = {name: metric for name, metric in built.items() if name not in left_out}
        if left_out:
            say(
                f"tokens without images (model.pixels=none): {', '.join(left_out)} cannot be measured and are left out."
            )
    for metric in built.values():
        metric.check()
    return built


def build_tracker(cfg: DictConfig) -> Tracker:
    """Build the logger and check that its library is there."""
    built = instantiate(cfg.logger)
    built.check()
    return built


def scored_run(cfg: DictConfig) -> RunFolder:
    """Return the run folder that stage=score works on; raises UserError where it is not named or not one."""
    if cfg.run_dir is None:
        there = ", ".join(path.name for path in run_folders(cfg.runs_dir)) or "none"
        raise UserError(f"stage=score needs run_dir=FOLDER; run folders in {cfg.runs_dir}: {there}.")
    run = RunFolder.open(cfg.run_dir)
    check_writable(run.path, "run_dir")
    return run
