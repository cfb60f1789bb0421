"""Building frozen transformers models and tokenizers from local weights; problems become one sentence with the fix.

Remote code is never run.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from sjd2.errors import UserError, choose, first_line
from sjd2.models.tensors import stored_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

QUANTISATIONS = ("8bit", "4bit")
DEVICE_MAPS = ("auto", "balanced", "sequential")
# share of the bytes after quantisation: some layers stay as they are
REMAINING = {None: 1.0, "8bit": 0.55, "4bit": 0.32}

Model = TypeVar("Model", bound="PreTrainedModel")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Where and how transformers loads a model: all on `device` in `dtype`, unless device_map or quantisation says otherwise.

    weights: value of model.weights, for messages. attention: transformers' kernel.
    """

    weights: str
    device: torch.device
    dtype: torch.dtype
    attention: str = "sdpa"
    quantisation: str | None = None
    device_map: str | None = None

    def check(self) -> None:
        """Raise `UserError` for settings that do not exist or whose library is not installed."""
        if self.device_map is not None:
            choose("model.device_map", self.device_map, DEVICE_MAPS)
        if self.quantisation is not None:
            choose("model.quantisation", self.quantisation, QUANTISATIONS)
            if importlib.util.find_spec("bitsandbytes") is None:
                raise UserError(
                    f"model.quantisation={self.quantisation} needs bitsandbytes: pip install -e '.[quantisation]'."
                )

    def check_memory(self, num_bytes: float) -> None:
        """Raise `UserError` if weights of so many bytes (before quantisation) do not fit into the free memory."""
        needed = num_bytes * REMAINING[self.quantisation]
        free = free_bytes(self.device, everywhere=self.device_map is not None)
        if needed > free:
            where = "the devices together have" if self.device_map else f"{self.device} has"
            dtype = str(self.dtype).removeprefix("torch.")
            raise UserError(
                f"model.weights={self.weights} needs {needed / 1e9:.1f} GB in {dtype} and {where} {free / 1e9:.1f} GB free; "
                "use a smaller dtype, model.quantisation=8bit or 4bit, or model.device_map=auto."
            )

    def keywords(self) -> dict[str, Any]:
        """Return these options as keywords of `from_pretrained`."""
        from transformers import BitsAndBytesConfig

        keywords: dict[str, Any] = {
            "dtype": self.dtype,
            "attn_implementation": self.attention,
            "local_files_only": True,
        }
        if self.quantisation is not None:
            # of every layer and pass: "inputs will be cast from bfloat16 to float16"
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            keywords["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=self.quantisation == "8bit",
                # row by row: with a threshold the library picks outlier columns over all rows and slots of a pass, so that a
                # distribution depends on its neighbours, and no decoder is lossless
                llm_int8_threshold=0.0,
                load_in_4bit=self.quantisation == "4bit",
                bnb_4bit_compute_dtype=self.dtype,
                bnb_4bit_quant_type="nf4",  # for weights that are about normal; the library's default is fp4
            )
        if self.device_map is not None:
            keywords["device_map"] = self.device_map
        elif self.device.type == "cuda" or self.quantisation is not None:
            # straight to the GPU: 7B weights need not pass through the host's memory
            keywords["device_map"] = {"": self.device}
        return keywords


def free_bytes(device: torch.device, everywhere: bool = False) -> float:
    """Return the free memory of the device, or of all GPUs and the host together."""
    import psutil

    gc.collect()  # a model that is no longer in use may hang in a reference cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # blocks that torch only caches would count as taken
    host = float(psutil.virtual_memory().available)
    gpus = range(torch.cuda.device_count())
    if everywhere:
        return host + sum(torch.cuda.mem_get_info(i)[0] for i in gpus)
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host


def load_pretrained(
    cls: type[Model],
    folder: Path,
    options: LoadOptions,
    config: PreTrainedConfig | None = None,
    optional: str | None = "model.vqmodel.",
) -> Model:
    """Load a transformers model for inference: frozen, in eval mode, on its device.

    config: replaces the folder's. optional: prefix of the tensors that the files may lack, by default the image tokeniser,
    which families load separately. Raises `UserError` if the files fit neither the class nor the memory.
    """
    options.check()
    options.check_memory(stored_bytes(folder, options.dtype))
    return _load(cls, options, optional, pretrained_model_name_or_path=folder, config=config)


def load_assembled(
    cls: type[Model], config: PreTrainedConfig, tensors: dict[str, Tensor], options: LoadOptions
) -> Model:
    """Build a transformers model from a config and tensors with the model's own names, as `load_pretrained` does.

    Raises `UserError` if the tensors fit neither the config nor the memory.
    """
    options.check()
    options.check_memory(sum(tensor.numel() for tensor in tensors.values()) * options.dtype.itemsize)
    return _load(cls, options, None, pretrained_model_name_or_path=None, config=config, state_dict=tensors)


def _load(cls: type[Model], options: LoadOptions, optional: str | None, **source: Any) -> Model:
    keywords = options.keywords()
    loader: Any = cls  # the stubs of from_pretrained do not know output_loading_info's pair
    try:
        with quiet_transformers():
            model, found = loader.from_pretrained(**source, **keywords, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"model.weights={options.weights} cannot be loaded: {first_line(error)}") from error
    # transformers fills missing tensors with random numbers and only warns
    missing = sorted(name for name in found["missing_keys"] if optional is None or not name.startswith(optional))
    if missing:
        raise UserError(
            f"model.weights={options.weights} lacks {len(missing)} of the model's tensors, e.g. {missing[0]}."
        )
    if "device_map" not in keywords:
        model.to(options.device)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the bar of tensors, noise beside the bar of images, and the table of mismatches, which become one sentence.

    The settings of whoever called come back: this may run in a program that wants both.
    """
    from transformers.utils import logging as transformers_logging

    bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def read_config(folder: Path, key: str, model_type: str, example: str) -> dict[str, Any]:
    """Read a folder's config.json. Raises `UserError` unless it has this `model_type`; example: a checkpoint that has."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{key}={folder}: its config.json cannot be read as JSON ({error}).") from error
    if config.get("model_type") != model_type:
        raise UserError(
            f"{key}={folder} holds a '{config.get('model_type')}' model, not '{model_type}' in transformers' layout; use "
            f"e.g. {example}."
        )
    return config


def load_tokenizer(folder: Path, key: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder. Raises `UserError` if there is none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json is complete; the class that a folder names may cut text differently (Llama's, in DeepSeek's folders)
    cls: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}={folder} has no tokenizer that can be loaded: {first_line(error)}") from error
