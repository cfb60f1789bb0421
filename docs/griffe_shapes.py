"""Extension of griffe: the comment on tensor shapes in a docstring (`# B samples, ...`) is not a heading."""

from __future__ import annotations

import re
from typing import Any

import griffe

SHAPES = re.compile(r"^# (.+(?:\n# .+)*)", re.MULTILINE)


class Shapes(griffe.Extension):
    """Turn lines that begin with `# ` into a paragraph in italics."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = SHAPES.sub(_italic, obj.docstring.value)


def _italic(found: re.Match[str]) -> str:
    text = found[1].replace("\n# ", " ")
    return f"\n*{text}*\n"
