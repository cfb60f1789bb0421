"""What a run prints while it works: a bar on a terminal, plain lines elsewhere; errors in one sentence."""

from __future__ import annotations

import contextlib
import difflib
import errno
import itertools
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from sjd2.config import choices, compose, conf_folders
from sjd2.errors import UserError, unknown

GROUPS = ("model", "decoder", "prompts", "evaluation", "finetune", "tune", "logger", "runtime", "bounds")
SEVERAL = "several choices need -m: python run.py -m {key}=a,b"
LAUNCHERS = {"submitit_slurm": "slurm", "submitit_local": "slurm", "joblib": "joblib", "ray": "ray"}  # and their extras
CHECKOUT = "python run.py"  # how messages name the command; shown as the user typed it
PLAIN_EVERY = 10.0  # seconds between two lines where there is no terminal
PATIENCE_S = 3.0  # seconds without a line that need no explanation


def program() -> str:
    """Return how the user started this command: `sjd2`, or `python run.py` in a checkout."""
    return "sjd2" if Path(sys.argv[0]).stem == "sjd2" else CHECKOUT


def say(text: str) -> None:
    """Print one line at once, also through a pipe."""
    print(text.replace(CHECKOUT, program()), flush=True)


@contextlib.contextmanager
def patience(text: str, *, after: float = PATIENCE_S) -> Iterator[None]:
    """Print `text` if what is done inside takes longer than `after` seconds, and at its end how long it took."""
    begin, timer = time.monotonic(), threading.Timer(after, say, [f"{text} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := time.monotonic() - begin) > after:
        say(f"{text}: {seconds:.0f} s.")


@contextlib.contextmanager
def spoken(output: str) -> Iterator[None]:
    """Where `output` is json, leave stdout to the one JSON value of the command: everything else goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if output == "json" else contextlib.nullcontext():
        yield


def answer(value: Any) -> None:
    """Print the JSON value of a command, past what `spoken` redirects."""
    print(json.dumps(value, indent=1, ensure_ascii=False), file=sys.__stdout__, flush=True)


def show_logs() -> None:
    """Print what the packages log (training progress, resumed checkpoints) as plain lines on stderr."""
    if not logging.getLogger().handlers:
        logging.basicConfig(format="%(message)s")
    for package in ("sjd2", "baselines", "evaluation", "sweeps", "benchmarks"):
        logging.getLogger(package).setLevel(logging.INFO)


class Progress:
    """Images done, images/s, tokens per forward and the time left; use as a context manager."""

    def __init__(
        self, title: str, done: int, total: int, *, shown: bool = True, beside: Progress | None = None
    ) -> None:
        """Start at `done` of `total` images; rates count only what this launch makes. Of several ranks one is `shown`.

        beside: a run that takes turns with this one; the terminal has one display for both.
        """
        self.title, self.done, self.total, self.first = title, done, total, done
        self.tokens = self.forwards = 0
        self.seconds = 0.0
        self.began = self.reported = time.monotonic()
        self._own = beside is None
        self._bar = (_bar() if shown and sys.stderr.isatty() else None) if beside is None else beside._bar

    def __enter__(self) -> Progress:
        if self._bar is not None:
            if self._own:
                self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, rates="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            if self._own:
                self._bar.stop()
        elif self.done > self.first:
            say(self.line())

    def advance(self, *, images: int, tokens: int, forwards: int, seconds: float) -> None:
        """Count finished images, their tokens, the forward passes that made them and the time these took."""
        self.done, self.tokens, self.forwards = self.done + images, self.tokens + tokens, self.forwards + forwards
        self.seconds += seconds
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rates=self.rates())
        elif time.monotonic() - self.reported >= PLAIN_EVERY and self.done < self.total:
            self.reported = time.monotonic()
            say(self.line())

    def rates(self) -> str:
        """Return '1.23 images/s, 3.4 tokens/forward'."""
        pace = (self.done - self.first) / max(self.seconds, 1e-9)
        return f"{pace:.3g} images/s, {self.tokens / max(self.forwards, 1):.2f} tokens/forward"

    def line(self) -> str:
        """Return the progress as one plain line."""
        left = (time.monotonic() - self.began) / max(self.done - self.first, 1) * (self.total - self.done)
        rest = f", {left:.0f} s left" if self.done < self.total else ""
        return f"{self.title}: {self.done}/{self.total} images, {self.rates()}{rest}"


def _bar() -> Any:
    # rich is imported only where a terminal shows the bar
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rates]}", markup=False),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(file=sys.stderr))


# ---- errors in one sentence


def guarded(function: Callable[[], object]) -> int:
    """Run the program and return its exit code; errors are printed as one sentence, with their stack if SJD2_TRACE is set."""
    try:
        function()
        return 0
    except KeyboardInterrupt:
        message, code = "stopped; the same command resumes where this one ended.", 130
        error: BaseException | None = None
    except BrokenPipeError:  # whoever reads the output, e.g. head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as caught:  # the one place where every error becomes a sentence
        error, message, code = caught, sentence(caught), 1
    if error is not None and os.environ.get("SJD2_TRACE"):
        traceback.print_exception(error)
    message = message.replace(CHECKOUT, program())
    print(f"error: {message}" if error else message, file=sys.stderr, flush=True)
    return code


def sentence(error: BaseException) -> str:
    """Return one sentence with the fix for an error of the user, of Hydra, of the disk or of the device."""
    if isinstance(error, UserError):
        return str(error)
    for base in type(error).__mro__:
        if base.__module__.startswith(("hydra.", "omegaconf.")):
            return _composition(error)
    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        return "a config group takes the name of a choice, not null; e.g. logger=none switches W&B off."
    if isinstance(error, OSError) and error.errno in _DISK:
        place = f" at '{error.filename}'" if error.filename else ""
        return f"{_DISK[error.errno].format(place=place)}; finished images are kept, and the same command resumes from there."
    if type(error).__name__ == "OutOfMemoryError":
        return "the device is out of memory; lower batch_size, decoder.window or dtype and start again."
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text} (this may be a bug: add debug=trace to see where it comes from)"


_DISK = {
    errno.ENOSPC: "the disk is full{place}; free some space",
    errno.EDQUOT: "your disk quota is used up{place}; free some space",
    errno.EACCES: "no permission{place}; choose another runs_dir or change the folder's permissions",
    errno.EPERM: "no permission{place}; choose another runs_dir or change the folder's permissions",
    errno.EFBIG: "files may not grow further{place} (a limit of the shell or the file system); raise it",
    errno.EROFS: "the file system is read-only{place}; choose another runs_dir",
}


def _composition(error: BaseException) -> str:
    """Turn Hydra's error about a command line into one sentence."""
    text = str(error)
    if (found := re.search(r"Could not (?:find|load) 'hydra/launcher/(\w+)'", text)) and found[1] in LAUNCHERS:
        return f"hydra/launcher={found[1]} is not installed; add it with: pip install -e '.[{LAUNCHERS[found[1]]}]'."
    options = getattr(error, "options", None)
    if options is not None and (found := re.search(r"Could not (?:find|load) '(.+?)'", text)):
        group, _, choice = found[1].rpartition("/")
        return str(unknown(group, choice, options))
    if found := re.search(r"Could not (?:find|load) '(.+?)/([^/']+)'", text):
        return f"unknown {found[1]} '{found[2]}'; {SEVERAL.format(key=found[1])}."
    if found := re.search(r"Ambiguous value for argument '(.+?)='?", text):
        several = f"{found[1]} has several values; {SEVERAL.format(key=found[1])}; one list is written {found[1]}=[a,b]"
        return f"{several}, one text with a comma '{found[1]}=\"a,b\"'."
    if found := re.search(r"Could not override '(.+?)'", text):
        return _unknown_key(found[1])
    if (override := getattr(error, "override", None)) is not None:
        return _unreadable(
            str(override), next(line for line in text.split("\n") if not line.startswith("Error parsing"))
        )
    if "Could not append to config" in text and (found := re.search(r"already at '(.+?)'", text)):
        return f"'{found[1]}' exists already; write {found[1]}=... without the +."
    lines = [line.strip() for line in text.split("\n") if line.strip() and not line.startswith(("See http", "    "))]
    cause = f" ({' '.join(str(error.__cause__).split())})" if error.__cause__ else ""
    return " ".join(lines) + cause


def _unreadable(word: str, reason: str) -> str:
    """Return the sentence for a word that Hydra's grammar refuses, quoted so that it reads the value as it stands."""
    key, _, value = word.partition("=")
    if value and not value.startswith(("[", "{")) and value.count('"') + value.count("'") == 0:
        return f"cannot read the value of {key}; text with any of = , : ( ) [ ] {{ }} is quoted twice: '{key}=\"{value}\"'."
    return f"cannot read '{word}' ({reason}); write key=value, with quotes around spaces: 'key=\"a b\"'."


def _unknown_key(key: str) -> str:
    """Name the settings nearest to a key that does not exist, from the configuration without it."""
    if found := re.fullmatch(r"decoder/(\w+)@.*", key):
        return f"this decoder chooses a part inside its {found[1]}, which therefore stays; start from another decoder."
    if found := re.fullmatch(r"decoder/(\w+)", key):
        parts = {part.name for folder in conf_folders() for part in (folder / "decoder").glob("*/")}
        if found[1] not in parts:
            return str(unknown("part of a decoder", found[1], parts))
        return f"this decoder is one piece, without a {found[1]} to choose; decoder=sjd takes any of conf/{key}/."
    keys = [k for k in setting_names(sys.argv[1:], without=key) if not k.endswith("_target_")]
    parent, _, leaf = key.rpartition(".")
    while parent and not any(k.startswith(f"{parent}.") for k in keys):  # the nearest part of the key that exists
        parent = parent.rpartition(".")[0]
    siblings = [k for k in keys if k.rpartition(".")[0] == parent] if parent else []
    named = {k.rpartition(".")[2]: k for k in siblings}  # a long parent would make every sibling look alike
    folded = {k.lower(): k for k in keys}
    near = [folded[k] for k in difflib.get_close_matches(key.lower(), [] if siblings else folded, n=1, cutoff=0.7)]
    group = choices(key.replace(".", "/"))  # decoder.refiner, where the decoder has none
    near = near or [named[name] for name in difflib.get_close_matches(leaf, [] if group else named, n=1, cutoff=0.6)]
    leaves = difflib.get_close_matches(leaf, [] if siblings else [k.rpartition(".")[2] for k in keys], n=1, cutoff=0.85)
    owners = "" if near else _owners(key)
    near = near or ([] if owners else [k for k in keys if k.rpartition(".")[2] in leaves][:1])
    hint = f", did you mean '{near[0]}'?" if near else owners or "."
    place = f"settings of {parent}" if siblings else "settings"
    listed = siblings or [k for k in keys if "." not in k]
    return f"unknown setting '{key}'{hint} Valid {place}: {', '.join(sorted(listed))}."


def _owners(key: str) -> str:
    """Return which choices of its group have a setting, as the middle of a sentence; '' if none has."""
    *path, leaf = key.split(".")
    if parts := choices("/".join([*path, leaf])):
        return f", a group: {'/'.join([*path, leaf])}=NAME ({', '.join(parts)})."
    for place in range(len(path), 0, -1):  # decoder.drafter.weights: in conf/decoder/drafter/, else in conf/decoder/
        group, inner = "/".join(path[:place]), [*path[place:], leaf]
        found = [name for name in choices(group) if _holds(group, name, inner)]
        if found:
            return f", a setting of {group}={', '.join(found)}."
    return ""


def _holds(group: str, name: str, path: Sequence[str]) -> bool:
    """Return whether the yaml of a choice has a setting, whatever its defaults add."""
    file = next(file for folder in conf_folders() if (file := folder / group / f"{name}.yaml").is_file())
    node: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    node = node.get(group, node)  # with `# @package _global_` it holds the group itself
    for key in path:
        if not isinstance(node, dict) or key not in node:
            return False
        node = node[key]
    return True


def setting_names(arguments: Sequence[str], *, without: str) -> Iterator[str]:
    """Yield every dotted key of the configuration that these arguments make once the setting `without` is left out."""
    choice = re.compile(rf"({'|'.join(GROUPS)})=[\w-]+$")  # sweeps and quoted values change no key
    kept = [argument for argument in arguments if choice.match(argument) and not argument.startswith(f"{without}=")]
    folders = [value for flag, value in itertools.pairwise(arguments) if flag in ("--config-dir", "-cd")]
    config = compose(kept, search=folders)

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for key in node:
            yield f"{prefix}{key}"
            if isinstance(child := node._get_node(key), DictConfig) and not child._is_none():
                yield from walk(child, f"{prefix}{key}.")

    yield from walk(config, "")
