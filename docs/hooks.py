"""Hook of mkdocs: fill the tables of the command-line reference from the comments of conf/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- groups -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark by one table per settings group: option, first sentence of its file."""
    return markdown.replace(MARK, "\n".join(_tables())) if MARK in markdown else markdown


def _tables() -> list[str]:
    lines: list[str] = []
    for folder in sorted(path for path in (ROOT / "conf").rglob("*") if path.is_dir()):
        options = sorted(folder.glob("*.yaml"))
        name = folder.relative_to(ROOT / "conf").as_posix()
        if not options or name.startswith(("decoder_defaults", "finetune_defaults")):
            continue
        lines += [f"### `{name}=`", "", "| option | what it is |", "| :--- | :--- |"]
        lines += [f"| `{option.stem}` | {_headline(option)} |" for option in options]
        lines.append("")
    return lines


def _headline(path: Path) -> str:
    """Return what the comment at the top of a yaml file says before its first command."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.startswith("# @"):  # a directive of Hydra
            continue
        if not line.startswith("# ") or line.startswith("#  "):
            break
        words.append(line[2:])
    return " ".join(words).replace("|", "\\|")
