"""sjd2: fast decoding of autoregressive text-to-image models, with measurements that can be trusted.

import sjd2
model = sjd2.load("tiny")
result = sjd2.generate(model, "a large red circle above a small blue square on a plain teal background")
result.save("images")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sjd2.api import Images, decoder, generate, list_decoders, list_models, load

__version__ = "0.2.0"
__all__ = ["Images", "__version__", "decoder", "generate", "list_decoders", "list_models", "load"]


def __getattr__(name: str) -> Any:
    # torch comes in with the first use, so that commands which only read settings stay quick
    if name in __all__:
        from sjd2 import api

        return getattr(api, name)
    raise AttributeError(f"module 'sjd2' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
