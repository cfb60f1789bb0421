"""Which engine runs a decoder."""

from __future__ import annotations

from sjd2.decoding.autoregressive import AutoregressiveEngine
from sjd2.decoding.decoder import BaseDecoder
from sjd2.decoding.engine import Engine
from sjd2.decoding.sampling import SamplingParams
from sjd2.decoding.window import WindowEngine
from sjd2.models.base import ImageModel


def engine_class(decoder: BaseDecoder) -> type[Engine]:
    """Return the engine that runs a decoder: its own, AR's, or the window's."""
    if decoder.engine is not None:
        return decoder.engine
    return AutoregressiveEngine if decoder.window == 1 else WindowEngine


def start_engine(model: ImageModel, decoder: BaseDecoder, rows: int, prompt: int, sampling: SamplingParams) -> Engine:
    """Open the engine of a decoder with `rows` empty rows for prompts of up to `prompt` tokens."""
    return engine_class(decoder)(model, decoder, rows, prompt, sampling)
