"""Check the words of a command line as the shell splits them, where Hydra would answer with its options or its grammar.

Every error names the command line that was meant. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from harness.console import GROUPS
from harness.settings import STAGES, TYPES
from sjd2.config import choices
from sjd2.errors import UserError

SETTINGS = {*TYPES, *GROUPS, "experiment", "debug", "hydra"}
LONG = ("help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun", "shell-completion",
        "config-path", "config-name", "config-dir", "experimental-rerun", "info")  # fmt: skip
SHORT = ("-h", "-c", "-p", "-r", "-m", "-sc", "-cp", "-cn", "-cd", "-i")
VALUED = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
          "--experimental-rerun", "--info", "-i")  # fmt: skip
MANY = ("-m", "--multirun")

AT_HOME = re.compile(
    r"(?<=[=,\[])~[\w.-]*(?=/)"
)  # a shell expands the ~ of a word's start, and Hydra's grammar has none


def at_home(words: Sequence[str]) -> list[str]:
    """Return the words with home folders for the `~` of their values: 'prompts.path=~/mine.txt', 'a=~/b,~/c'."""
    return [AT_HOME.sub(lambda found: os.path.expanduser(found[0]), word) for word in words]


def check_words(words: Sequence[str]) -> None:
    """Raise `UserError` for a word that is no setting and no option of Hydra, with the word that was meant."""
    values = {place + 1 for place, word in enumerate(words) if word in VALUED}
    named = [word for place, word in enumerate(words) if place not in values]
    for number, word in enumerate(named):
        if word.startswith("-"):
            _check_option(word, named[number + 1 : number + 2])
        else:
            _check_setting(word, named[number + 1 :])
    place = next((place for place, word in enumerate(words) if word in MANY), 0)
    if all(any("=" in word for word in side) for side in (words[:place], words[place:])):
        raise UserError("-m stands before all settings: python run.py -m key=a,b ...")


def _check_option(word: str, following: Sequence[str]) -> None:
    """Check a word that starts with a dash: `--limit 5`, `-limit=5`, `--halp`."""
    key, _, value = word.lstrip("-").partition("=")
    if key.split(".")[0] in SETTINGS:
        raise UserError(f"settings are written without dashes: {key}={value or ''.join(following) or 'VALUE'}.")
    if word in SHORT or (word.startswith("--") and any(option.startswith(key) for option in LONG)):
        return
    near = difflib.get_close_matches(key, LONG, n=1, cutoff=0.4)
    hint = f", did you mean '--{near[0]}'?" if near else ";"
    raise UserError(
        f"unknown option '{word}'{hint} settings are written key=value, and python run.py --help lists them."
    )


def _check_setting(word: str, following: Sequence[str]) -> None:
    """Check a word without dashes, with those after it: `decoder=ar, scd`, `limit = 5`, `limit:5`, `scd`."""
    key, equals, value = word.partition("=")
    after = _value(following)
    if word.startswith("="):
        raise UserError(f"'{word}' names no setting; write key={word[1:]} without blanks around the =.")
    if word.endswith(",") or (following and following[0].startswith(",")):
        raise UserError(f"a list of choices has no blanks and no comma at its end: {_joined([word, *following])}.")
    if equals and value.startswith("="):
        raise UserError(f"write one = only: {key}{value}.")
    if word.startswith("~") and not equals and word[1:] in {*TYPES, *GROUPS}:
        raise UserError(f"{word[1:]} cannot be left out of the settings; give it another value: {word[1:]}=VALUE.")
    if not equals and not word.startswith("~"):
        raise UserError(_without_equals(word, after))
    if (equals and not value and after) or key != key.strip():
        raise UserError(f"settings have no blanks around the =: {key.strip()}={value.strip() or after}.")
    if key in (*GROUPS, "experiment") and value.endswith((".yaml", ".yml")):
        raise UserError(f"a choice is named without its ending: {key}={value.rpartition('.')[0]}.")
    if key in ("prompts", "prompt") and (" " in value or _is_prompt_file(value)):
        path = "FILE" if " " in value else value
        raise UserError(
            f"prompts come from a file, of texts one per line or a table: prompts=file prompts.path={path}."
        )


def _is_prompt_file(value: str) -> bool:
    """Return whether a value ends as a file of prompts does."""
    if "." not in value:
        return False
    from evaluation.prompts import FORMATS  # brings numpy in, which --help and shell completion do without

    return Path(value).suffix.lower() in FORMATS


def _value(following: Sequence[str]) -> str:
    """Return the value that stands apart from its key: of `limit = 5`, `limit =5` and `limit 5` it is 5; '' if none does."""
    first = next(iter(following), "")
    if first == "=":
        return "".join(following[1:2])
    return first.lstrip("=") if first.startswith("=") or not ("=" in first or first.startswith(("-", "~"))) else ""


def _joined(words: Sequence[str]) -> str:
    """Return the list that blanks around its commas have torn apart: ["decoder=ar,", "scd"] -> decoder=ar,scd."""
    text = words[0]
    for before, word in itertools.pairwise(words):
        if not (before.endswith(",") or word.startswith(",")) or "=" in word:
            break
        text += word
    return text.strip(",")


def _without_equals(word: str, after: str) -> str:
    """Return the sentence for a word without an equals sign."""
    key, colon, value = word.partition(":")
    if key.split(".")[0] in SETTINGS:
        value = value or after or "VALUE"
        if colon:
            return f"settings are written with =, not with a colon: {key}={value}."
        return f"a setting is one word, without blanks around the =: {key}={value}."
    if word in STAGES:
        return f"a stage is chosen by name: stage={word}."
    if word == "help":
        return "python run.py --help lists the settings."
    for group in (*GROUPS, "experiment"):
        if word in choices(group):
            return f"'{word}' is a choice of {group}: write {group}={word}."
    return f"cannot read {shlex.quote(word)}: settings are written key=value, and python run.py --help lists them."
