"""Errors that are the user's to fix: one sentence that says what is wrong and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SYNONYMS = {"gpu": "cuda", "none": "null", "off": "null", "fp16": "float16", "half": "float16", "bf16": "bfloat16",
            "fp32": "float32", "float": "float32", "double": "float64"}  # fmt: skip


class UserError(ValueError):
    """A wrong setting, a missing file or an impossible combination; the message is one sentence with the fix."""


def unknown(kind: str, value: object, valid: Iterable[str]) -> UserError:
    """Return the error for a choice that does not exist, with the most similar valid one as a hint."""
    valid = sorted(valid)
    if not valid:
        return UserError(f"unknown {kind} '{value}'; there is none to set.")
    given = str(value).lower()
    folded = {name.lower(): name for name in valid}
    near = [folded[name] for name in difflib.get_close_matches(given, folded, n=3)]
    near.sort(key=lambda name: sorted(name.lower()) != sorted(given))  # swapped letters first: sdc is scd, not sjd-fc
    near = [SYNONYMS[given], *near] if SYNONYMS.get(given) in valid else near
    hint = f", did you mean '{near[0]}'?" if near else "."
    return UserError(f"unknown {kind} '{value}'{hint} Valid: {', '.join(valid)}.")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, its class name where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def choose(kind: str, value: str, valid: Iterable[str]) -> str:
    """Return `value` if it is one of `valid`, else raise a `UserError` that lists them."""
    valid = list(valid)
    if value not in valid:
        raise unknown(kind, value, valid)
    return value
