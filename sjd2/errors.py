"""Errors that are the user's to fix: one sentence that says what is wrong and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A wrong setting, a missing file or an impossible combination; the message is one sentence with the fix."""


def unknown(kind: str, value: object, valid: Iterable[str]) -> UserError:
    """Return the error for a choice that does not exist, with the most similar valid one as a hint."""
    valid = sorted(valid)
    near = difflib.get_close_matches(str(value), valid, n=3)
    near.sort(key=lambda name: sorted(name) != sorted(str(value)))  # swapped letters first: sdc is scd, not sjd-fc
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
