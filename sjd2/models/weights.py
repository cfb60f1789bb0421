"""Where weights come from: a local folder or file, or a hub id; what goes wrong is said in seconds, with the mend.

Only safetensors and torch files without code are read (`weights_only`), and remote code is never run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sjd2.errors import UserError, choose
from sjd2.files import find

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sjd2.models.base import ModelSpec

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILE = re.compile(rf"({HUB_ID.pattern})/(\S+\.(?:safetensors|ckpt|pth|pt|bin|json))")
TIMEOUT = 10.0  # seconds to wait for the hub's answer
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
QUANTISATIONS = ("8bit", "4bit")
DEVICE_MAPS = ("auto", "balanced", "sequential")


@dataclass(frozen=True)
class Source:
    """Where one part of a model lies, and what has to be there.

    where: a local path, a hub id (owner/name), or one file of a hub repository (owner/name/path/file.ckpt). key: the setting
    that says so, e.g. "model.vq_weights". files: what a folder must hold. patterns: what is fetched from the hub. single:
    `where` may be one file. inside: the one file that is meant of a hub repository or folder that holds several.
    """

    where: str
    key: str
    files: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ("*.json", "*.safetensors", "*.model", "*.txt")
    revision: str | None = None
    single: bool = False
    inside: str | None = None

    @property
    def repository(self) -> str | None:
        """Return the hub id in `where`, None if it cannot be one."""
        match = HUB_ID.fullmatch(self.where) or HUB_FILE.fullmatch(self.where)
        return match and (match[1] if match.re is HUB_FILE else match[0])

    @property
    def file(self) -> str | None:
        """Return the one file of a hub repository that is meant, None for all that `patterns` name."""
        match = HUB_FILE.fullmatch(self.where)
        return match[2] if match else self.inside

    @property
    def wanted(self) -> tuple[str, ...]:
        """Return the patterns of the files to fetch."""
        return (self.file,) if self.file else self.patterns


def locate(source: Source) -> Path:
    """Return the local folder (or file) of a source; fetches from the hub what is not there yet.

    Raises `UserError` in one sentence where the path is wrong, the hub cannot be reached or does not let us in, or a file
    is missing.
    """
    local = _local(source)
    if local is None:
        from huggingface_hub import snapshot_download

        reach(source)
        with _hub_errors(source):
            folder = snapshot_download(source.repository, revision=source.revision, allow_patterns=list(source.wanted))
        local = _fetched(Path(folder), source)
    return local


def reach(source: Source) -> None:
    """Raise `UserError` if a source is neither here nor can be fetched; asks the hub, fetches nothing."""
    if _local(source) is None:
        _ask_hub(source)


def check_part(source: Source, read: Callable[[Path], object]) -> None:
    """Raise `UserError` if a trained part (adapter, head, corrector) is not there; read: what checks its folder's settings."""
    if _remote(source):
        reach(source)
    else:
        read(find(source.where))


def locate_part(source: Source) -> Path:
    """Return the folder of a trained part; fetches it if `where` is a hub id."""
    return locate(source) if _remote(source) else find(source.where)


def _remote(source: Source) -> bool:
    return source.repository is not None and not find(source.where).exists()


def _local(source: Source) -> Path | None:
    """Return where the source lies on this machine, None if it has to be fetched first."""
    path = find(source.where)
    if path.exists():
        return _inside(path, source)
    if source.repository is None:
        raise UserError(f"{source.key}={source.where} does not exist; give a local folder or a hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            source.repository, revision=source.revision, allow_patterns=list(source.wanted), local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UserError(
            f"{source.key}={source.where} is neither here nor a name that the hub allows; give a local folder or a hub id."
        ) from error
    return _fetched(Path(folder), source) if _complete(Path(folder), source) else None


def _fetched(folder: Path, source: Source) -> Path:
    """Return the file or folder meant in a snapshot of the hub repository."""
    return folder / source.file if source.file else _inside(folder, source)


def _complete(folder: Path, source: Source) -> bool:
    """Say whether a cached snapshot holds every file that is asked for, all shards of an index included."""
    if source.file:
        return (folder / source.file).is_file()
    index = _index(folder)
    named = _shards(index) if index else []
    there = all((folder / name).is_file() for name in (*source.files, *named))
    return there and (
        bool(named) or any(f.suffix in (".safetensors", ".bin", ".pt", ".ckpt") for f in folder.iterdir())
    )


def _inside(path: Path, source: Source) -> Path:
    """Return the file or folder meant by a path that exists; raises `UserError` if it lacks a file."""
    if source.inside and path.is_dir():
        if not (path / source.inside).is_file():
            raise UserError(f"{source.key}={source.where} has no {source.inside}.")
        return path / source.inside
    if path.is_file():
        if not source.single and not source.inside:
            raise UserError(f"{source.key}={source.where} is a file; give the folder that holds {source.files[0]}.")
        return path
    for name in source.files:
        if not (path / name).is_file():
            raise UserError(f"{source.key}={source.where} has no {name}, so it is no folder of these weights.")
    _check_shards(path, source)
    return path


def _check_shards(folder: Path, source: Source) -> None:
    """Raise `UserError` if a shard that an index names is missing, or a safetensors file was cut short."""
    mend = "copy or download it again"
    index = _index(folder)
    for name in _shards(index) if index else []:
        if not (folder / name).is_file():
            raise UserError(f"{source.key}={source.where} lacks {name}, which its index names; {mend}.")
    for file in folder.glob("*.safetensors"):
        ends = [entry["data_offsets"][1] for name, entry in header(file, source.key).items() if name != "__metadata__"]
        want, have = 8 + _header_size(file) + max(ends, default=0), file.stat().st_size
        if want != have:
            raise UserError(
                f"{source.key}={source.where}: {file.name} has {have} bytes and should have {want}; {mend}."
            )


@cache
def _ask_hub(source: Source) -> None:
    """Raise `UserError` if the hub cannot be reached, does not let us in, lacks the files, or the disk is too small."""
    from huggingface_hub import HfApi, constants

    with _hub_errors(source):
        info = HfApi().model_info(source.repository, revision=source.revision, files_metadata=True, timeout=TIMEOUT)
    files = {f.rfilename: f.size or 0 for f in info.siblings or []}
    lacking = [name for name in ((source.file,) if source.file else source.files) if name not in files]
    if lacking:
        raise UserError(
            f"{source.key}={source.where} has no {lacking[0]} on the hub, so it is no source of these weights."
        )
    size = sum(size for name, size in files.items() if any(fnmatch(name, pattern) for pattern in source.wanted))
    cache_folder = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache_folder, *cache_folder.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise UserError(
            f"{source.key}={source.where} takes {size / 1e9:.1f} GB of disk and {there} has {free / 1e9:.1f} GB free; "
            "make room, or set HF_HOME to a larger disk."
        )


@contextlib.contextmanager
def _hub_errors(source: Source) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence with the command that mends it."""
    from huggingface_hub import errors

    what = f"{source.key}={source.where}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{what} is gated: accept its licence on the hub's page of {source.repository}, then run `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{what} is not on the hub, or private; check the name, or run `hf auth login`, or give a local folder."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{what} has no revision '{source.revision}'; leave model.revision=null for the newest."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(
            f"{what} is not on this machine and HF_HUB_OFFLINE is set; unset it, or run `{_download(source)}` where there "
            f"is a network and give {source.key}={'FILE' if source.file else 'FOLDER'}."
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise UserError(_unreachable(source)) from error
    except Exception as error:
        # the client's own connection errors belong to whichever http library it uses, which is not ours to import
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
            raise UserError(_unreachable(source)) from error
        raise


def _unreachable(source: Source) -> str:
    return (
        f"{source.key}={source.where} is not on this machine and the hub cannot be reached; run `{_download(source)}` where "
        f"there is a network and give {source.key}={'FILE' if source.file else 'FOLDER'}."
    )


def _download(source: Source) -> str:
    return " ".join(["hf download", str(source.repository), *((source.file,) if source.file else ())])


# ---- reading


def check_loading(quantisation: str | None, device_map: str | None) -> None:
    """Raise `UserError` for loading settings that do not exist or whose library is not installed."""
    if device_map is not None:
        choose("model.device_map", device_map, DEVICE_MAPS)
    if quantisation is not None:
        choose("model.quantisation", quantisation, QUANTISATIONS)
        import importlib.util

        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"model.quantisation={quantisation} needs bitsandbytes: pip install -e '.[quantisation]'.")


def check_memory(folder: Path, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `UserError` if the weights in `folder` do not fit into the memory of the device (all of them with device_map)."""
    _check_bytes(stored_bytes(folder, dtype), spec, device, dtype)


def _check_bytes(need: float, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
    need *= {None: 1.0, "8bit": 0.55, "4bit": 0.32}[spec.quantisation]  # some layers stay
    free = free_bytes(device, everywhere=spec.device_map is not None)
    if need > free:
        where = "the devices together have" if spec.device_map else f"{device} has"
        raise UserError(
            f"model.weights={spec.weights} needs {need / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')} and {where} "
            f"{free / 1e9:.1f} GB free; use a smaller dtype, model.quantisation=8bit or 4bit, or model.device_map=auto."
        )


def stored_bytes(folder: Path, dtype: torch.dtype, parts: tuple[str, ...] = ("",)) -> float:
    """Return the bytes that a folder's safetensors take once loaded in `dtype`; parts: beginnings of the names that count."""
    total = 0.0
    width = torch.empty(0, dtype=dtype).element_size()
    for file in folder.glob("*.safetensors"):
        for name, entry in header(file, str(folder)).items():
            if name != "__metadata__" and name.startswith(parts):
                count = torch.Size(entry["shape"]).numel()
                total += count * (width if entry["dtype"] in ("F64", "F32", "F16", "BF16") else 1)
    return total


def stored_shape(folder: Path, name: str) -> tuple[int, ...] | None:
    """Return the shape of a tensor in the safetensors files of a folder, None if it is not there; reads no weights."""
    found = (header(file, str(folder)).get(name) for file in sorted(folder.glob("*.safetensors")))
    return next((tuple(entry["shape"]) for entry in found if entry is not None), None)


def header(file: Path, key: str) -> dict[str, Any]:
    """Read the header of a safetensors file: name -> {dtype, shape, data_offsets}; reads no weights.

    Raises `UserError` if the file is none.
    """
    size = _header_size(file)
    with file.open("rb") as handle:
        if handle.read(20) == b"version https://git-":
            raise UserError(
                f"{key}: {file} is a Git LFS pointer and not the weights; run `git lfs pull` in its folder."
            )
        handle.seek(8)
        try:
            return json.loads(handle.read(size) if 0 < size < 2**28 else b"")
        except ValueError as error:
            raise UserError(
                f"{key}: {file} is no safetensors file, or a damaged one; copy or download it again."
            ) from error


def _header_size(file: Path) -> int:
    with file.open("rb") as handle:
        return int.from_bytes(handle.read(8), "little")


def free_bytes(device: torch.device, everywhere: bool = False) -> float:
    """Return the free memory of the device, or of all GPUs and the host together."""
    import psutil

    gc.collect()  # a model that is no longer in use may hang in a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # blocks that torch only keeps would count as taken
    host = float(psutil.virtual_memory().available)
    gpus = range(torch.cuda.device_count())
    if everywhere:
        return host + sum(torch.cuda.mem_get_info(i)[0] for i in gpus)
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host


def pretrained(
    cls: type[PreTrainedModel],
    folder: Path,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    lacking: str = "model.vqmodel.",
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """Load a transformers model for inference: frozen, on its device, quantised or spread if the spec says so.

    lacking: beginning of the names of tensors that the files need not hold, by default the image tokeniser, which families
    load apart. config: where it is not just the folder's. Raises `UserError` if the files do not fit the class or the memory.
    """
    check_loading(spec.quantisation, spec.device_map)
    check_memory(folder, spec, device, dtype)
    return _load(cls, spec, device, dtype, lacking, pretrained_model_name_or_path=folder, config=config)


def assembled(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Build a transformers model from a config and tensors named as its own, loaded just as `pretrained` does.

    Raises `UserError` if the tensors do not fit the config or the memory.
    """
    check_loading(spec.quantisation, spec.device_map)
    width = torch.empty(0, dtype=dtype).element_size()
    _check_bytes(sum(tensor.numel() for tensor in tensors.values()) * width, spec, device, dtype)
    return _load(cls, spec, device, dtype, "", pretrained_model_name_or_path=None, config=config, state_dict=tensors)


def _load(
    cls: type[PreTrainedModel], spec: ModelSpec, device: torch.device, dtype: torch.dtype, lacking: str, **source: Any
) -> PreTrainedModel:
    from transformers import BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # its bar of tensors is noise beside the bar of images
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": spec.attention, "local_files_only": True}
    if spec.quantisation is not None:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=spec.quantisation == "8bit",
            load_in_4bit=spec.quantisation == "4bit",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type="nf4",  # for weights that are about normal; the library's default is fp4
        )
    if spec.device_map is not None:
        settings["device_map"] = spec.device_map
    elif device.type == "cuda" or spec.quantisation is not None:
        settings["device_map"] = {"": device}  # straight to the GPU: 7B weights need not pass through the host's memory
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of what does not fit becomes one sentence here
    try:
        model, found = cls.from_pretrained(**source, **settings, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"model.weights={spec.weights} cannot be loaded: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    # transformers fills what is not there with random numbers and warns
    missing = sorted(name for name in found["missing_keys"] if not lacking or not name.startswith(lacking))
    if missing:
        raise UserError(f"model.weights={spec.weights} lacks {len(missing)} of the model's tensors, e.g. {missing[0]}.")
    if "device_map" not in settings:
        model.to(device)
    return model.eval().requires_grad_(False)


def read_config(folder: Path, key: str, kind: str, example: str) -> dict[str, Any]:
    """Read a folder's config.json. Raises `UserError` unless it is of that kind (`model_type`), like the example."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{key}={folder}: its config.json cannot be read as JSON ({error}).") from error
    if config.get("model_type") != kind:
        raise UserError(
            f"{key}={folder} holds a '{config.get('model_type')}' model, not '{kind}' in transformers' layout; take e.g. "
            f"{example}."
        )
    return config


def tokenizer(folder: Path, key: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder. Raises `UserError` if there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json says all; the class that a folder names may cut text otherwise (Llama's, in DeepSeek's folders)
    cls = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}={folder} has no tokenizer that can be loaded: {_first_line(error)}") from error


def read_tensors(path: Path, key: str) -> dict[str, Tensor]:
    """Read the tensors of a file (.safetensors; .pt, .pth, .ckpt, .bin without code) or of a folder's shards.

    A wrapping `{"model": {...}}` or `{"state_dict": {...}}` is opened. Raises `UserError` if it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.is_dir():
        index = _index(path)
        files = [path / name for name in _shards(index)] if index else sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{key}={path} holds no .safetensors file.")
        return {name: tensor for file in files for name, tensor in read_tensors(file, key).items()}
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{key}={path} cannot be read as weights: {_first_line(error)}") from error
    for wrapper in ("model", "state_dict", "module"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict):
        raise UserError(f"{key}={path} holds a {type(found).__name__}, not named tensors.")
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def fit(module: nn.Module, tensors: dict[str, Tensor], key: str) -> None:
    """Copy tensors into a module of just these names and shapes. Raises `UserError` naming the first misfit."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        what = f"lack {missing[0]!r}" if missing else f"have an unknown {extra[0]!r}"
        raise UserError(f"the weights of {key} {what} ({len(missing)} missing, {len(extra)} unknown).")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            have, want = tuple(tensors[name].shape), tuple(tensor.shape)
            raise UserError(f"the weights of {key}: {name!r} has shape {have}, the model wants {want}.")
    module.load_state_dict(tensors)


def _index(folder: Path) -> Path | None:
    """Return the index of a folder's shards; that of .bin files says nothing where safetensors are, which are read then."""
    names = INDEXES[:1] if any(folder.glob("*.safetensors")) else INDEXES
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _shards(index: Path) -> list[str]:
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
