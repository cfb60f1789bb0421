"""Every snippet of CONTRIBUTING.md works; README stays short; files that the documentation names exist."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sjd2.config import CONF
from sjd2.files import ROOT
from tests.helpers.cli import Cli

PAGES = [*sorted(ROOT.glob("[!C]*.md")), ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```', re.DOTALL | re.MULTILINE)
FILES = dict(FENCE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
MODULES = [name for name in FILES if name.endswith(".py") and not name.startswith("tests/")]
TESTS = [name for name in FILES if name.startswith("tests/")]
TOP = "sjd2|baselines|evaluation|harness|sweeps|benchmarks|tests|conf|docs|examples"
NAMED = re.compile(rf"`((?:{TOP})/[\w./+*-]+)`")
CHOICE = re.compile(r"(?<![\w./+~@-])([a-z_]+(?:/[a-z_]+)*)=([\w,+.-]+)")  # decoder=sjd,scd decoder/verifier=block
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)")


def load(folder: Path, name: str) -> ModuleType:
    """Import a file of CONTRIBUTING.md under the name that it would have in the repository."""
    dotted = name.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(dotted, folder / name)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[dotted] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Path]:
    """Write the files of CONTRIBUTING.md to a folder and import its modules; they are forgotten afterwards."""
    parents = {}
    for name, text in FILES.items():
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = set(sys.modules)
    for name in MODULES:
        module = load(tmp_path / "files", name)
        package, _, attribute = module.__name__.rpartition(".")
        parents[importlib.import_module(package)] = attribute
        setattr(sys.modules[package], attribute, module)
    yield tmp_path / "files"
    for package, attribute in parents.items():
        delattr(package, attribute)
    for name in [module for module in sys.modules if module not in before]:
        if Path(str(getattr(sys.modules[name], "__file__", ""))).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.mark.full
@pytest.mark.parametrize("name", TESTS)
def test_tests_of_contributing_pass(written: Path, tmp_path: Path, name: str) -> None:
    module = load(written, name)
    tests = [value for key, value in vars(module).items() if key.startswith("test_")]
    assert tests
    for test in tests:
        test(**({"tmp_path": tmp_path} if "tmp_path" in inspect.signature(test).parameters else {}))


@pytest.mark.parametrize(
    "command",
    [
        "decoder=above evaluation=colourful",
        "model=mini decoder=scd",
        "stage=finetune finetune=palette finetune.steps=2",
    ],
)
def test_commands_of_contributing_run(written: Path, cli: Cli, command: str) -> None:
    assert cli(*command.split(), "limit=4", "baseline=null", f"hydra.searchpath=[file://{written / 'conf'}]") == 0, (
        cli.err
    )


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_shell_variable_holds_several_words(page: Path) -> None:
    # zsh does not split them: commands are functions, groups of settings are arrays
    assert not re.findall(r'^ *\w+="[^"\n]* [^"\n]*"', page.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_sweeps_flag_stands_before_its_settings(page: Path) -> None:
    """Hydra takes no -m after a setting, those of a shell function included."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    assert not re.findall(r"^ *(?:python run\.py|sjd2|run) +[^-\s][^\n]* -m\b", text, re.MULTILINE)
    for name in re.findall(r"^ *(\w+)\(\) *\{ *python run\.py +[^-\"\s]", text, re.MULTILINE):
        assert not re.findall(rf"^ *{name} +-m\b", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_documentation_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = [name for name in NAMED.findall(text) if name not in FILES and not any(ROOT.glob(name.rstrip("/")))]
    links = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert not named + links


@pytest.mark.parametrize("page", [*PAGES, *sorted(CONF.rglob("*.yaml"))], ids=lambda page: page.name)
def test_choices_named_in_the_documentation_exist(page: Path) -> None:
    """`finetune=window` with no conf/finetune/window.yaml is a command that fails."""
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    text = "\n".join(line for line in lines if "--config-dir" not in line)  # which brings choices of its own
    own = {name.removeprefix("conf/").removesuffix(".yaml") for name in FILES}
    named = [
        f"{group}/{name}"
        for group, names in CHOICE.findall(text)
        if (CONF / group).is_dir()
        for name in names.split(",")
        if name.strip("+-_.") and name == name.lower() and name != "null"
    ]
    assert not [name for name in named if name not in own and not (CONF / f"{name.rstrip('.')}.yaml").is_file()]
