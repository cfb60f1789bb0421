"""The decoding engines: AR's, the window's with its parts (draft, verify, refine), and the drivers around them."""

from sjd2.decoding.decoder import Decoder
from sjd2.decoding.engine import Sample
from sjd2.decoding.generate import DecodeResult, StepInfo, generate, stream

__all__ = ["DecodeResult", "Decoder", "Sample", "StepInfo", "generate", "stream"]
