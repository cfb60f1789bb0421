"""`--help`: stages, config groups with their choices, and the settings with the comments of conf/config.yaml."""

from __future__ import annotations

import itertools
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence

import yaml

from harness.console import GROUPS, program
from harness.settings import STAGES, TYPES
from sjd2 import __version__
from sjd2.config import CONF, choices
from sjd2.files import split_lines

WIDTH = 80
SECTION = re.compile(r"(\w+):\s*(\S.*?)\s+#\s*(.+)")  # key: value   # comment
INTRO = """\
sjd2 {version}: fast decoding of autoregressive text-to-image models

usage: {program} [key=value ...]        one command
       {program} -m key=a,b [...]       one job per combination, one table
       {program} [...] --cfg job        show all settings without running
       {program} --config-dir DIR [...] also read yaml files of your own
"""
EXAMPLES = """\
examples:
  {program} decoder=scd limit=4
  {program} -m decoder=ar,sjd,sjd2
  {program} stage=report
"""


def help_text() -> str:
    """Return the whole text, at most 80 columns wide."""
    words = [part for word in sys.argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    search = [folder for flag, folder in itertools.pairwise(words) if flag in ("--config-dir", "-cd")]
    stages = [(name, stage.does) for name, stage in STAGES.items()]
    groups = [(group, ", ".join(choices(group, search))) for group in (*GROUPS, "experiment", "debug")]
    parts = [
        INTRO.format(version=__version__, program=program()),
        "stages, as stage=NAME:\n" + _columns(stages),
        "groups, as group=CHOICE, and group.key=value for one of its settings:\n" + _columns(groups),
        "settings, as key=value:\n" + _columns(list(_settings())),
        EXAMPLES.format(program=program()),
    ]
    return "\n".join(parts).rstrip()


def _settings() -> Iterator[tuple[str, str]]:
    """Yield (key=default, comment) of every setting outside the groups, in the order of conf/config.yaml."""
    for line in split_lines((CONF / "config.yaml").read_text(encoding="utf-8")):
        if (found := SECTION.match(line)) and found[1] in TYPES and found[1] != "stage":
            own = "model.sampling." in found[2]
            yield (
                (found[1] + "=", f"{found[3]}; {_of_models(found[1])}") if own else (f"{found[1]}={found[2]}", found[3])
            )


def _of_models(key: str) -> str:
    """Return the default of a sampling parameter, where each model has its own: 'default: janus 5, others 3'."""
    files = {name: CONF / "model" / f"{name}.yaml" for name in choices("model")}
    values = {
        name: yaml.safe_load(file.read_text(encoding="utf-8"))["sampling"].get(key, 0)
        for name, file in files.items()
        if file.is_file()
    }
    usual = max(values.values(), key=list(values.values()).count)
    named = [f"{name} {value:g}" for name, value in values.items() if value != usual]
    return f"default: {', '.join([*named, f'others {usual:g}'])}" if named else f"default: {usual:g}"


def _columns(rows: Sequence[tuple[str, str]]) -> str:
    indent = max(len(name) for name, _ in rows) + 4
    fill = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
    return "\n".join(fill.fill(f"  {name}".ljust(indent) + text) for name, text in rows) + "\n"
