"""The decoding engine: one pass, its parts (draft, verify, refine), and the drivers around it."""

from sjd2.decoding.generate import Decoder, DecodeResult, StepInfo, generate, stream
from sjd2.decoding.window import Sample

__all__ = ["DecodeResult", "Decoder", "Sample", "StepInfo", "generate", "stream"]
