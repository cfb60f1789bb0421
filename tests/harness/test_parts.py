"""Parts of decoders: every pair of the groups composes or is refused, and no value reaches a part it was not written for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra.utils
import pytest
from omegaconf import DictConfig, OmegaConf

import sjd2
from harness.cli import composed_settings
from harness.words import at_home
from sjd2.config import CONF, choices, compose, instantiate, plain
from sjd2.errors import UserError
from sjd2.part_choices import PARTS
from tests.helpers.cli import Cli
from tests.helpers.tiers import by_default

if TYPE_CHECKING:
    from collections import OrderedDict as Unknown

DECODERS = sorted(path.stem for path in (CONF / "decoder").glob("*.yaml"))
OPTIONS = {part: choices(f"decoder/{part}") for part in PARTS}
EXPERIMENT = """\
# @package _global_
defaults:
  - override /decoder: sjd
  - override /decoder/verifier: relaxed
limit: 2
run_dir: {run_dir}
decoder:
  lossless: false
  window: 6
  verifier:
    neighbours: 3
"""


@cache
def composed(*words: str) -> DictConfig:
    return compose(words).decoder


@cache
def groups(decoder: str) -> tuple[str, ...]:
    """Return the parts that a decoder's yaml lets one choose."""
    if decoder == "ar":
        return ()
    text = (CONF / "decoder" / f"{decoder}.yaml").read_text(encoding="utf-8")
    entries = OmegaConf.create(text).get("defaults", [])
    found = {key.split()[-1] for entry in entries if isinstance(entry, DictConfig) for key in entry} & set(PARTS)
    for parent in (entry for entry in entries if isinstance(entry, str) and entry != "_self_"):
        found |= set(groups(parent))
    if decoder == "sjd2-fc":  # its yaml chooses the chain inside its drafter, which therefore stays
        found.remove("drafter")
    return tuple(part for part in PARTS if part in found)


@cache
def of_part(part: str, option: str) -> dict[str, Any]:
    """Return a part as its own yaml describes it."""
    node = plain(OmegaConf.load(CONF / "decoder" / part / f"{option}.yaml"))
    if node.pop("defaults", None):  # drafter/front has a drafter for its main chain
        node["chain"] = of_part("drafter", "jacobi")
    return node


def built(node: dict[str, Any]) -> Any:
    """Return the object that a node describes."""
    return instantiate(OmegaConf.create({"node": node}).node)


@cache
def built_part(part: str, option: str) -> Any:
    return built(of_part(part, option))


def refusal(target: Callable[..., Any], settings: dict[str, Any]) -> str | None:
    """Return why a decoder is refused, None if it is built."""
    try:
        target(**settings)
    except UserError as error:
        return str(error)
    return None


CASES = [(decoder, "tiny") for decoder in DECODERS if groups(decoder)]
CASES += [(decoder, "lumina") for decoder in ("gsd", "lantern++", "sjd2")]


FULL = [("scd", "tiny"), ("eagle", "tiny"), ("sjd2-fc", "tiny"), ("pathspec-relaxed", "tiny"), ("lantern++", "lumina")]


@pytest.mark.parametrize("case", by_default(CASES, [], slow=[case for case in CASES if case not in FULL]), ids="-".join)
def test_every_part_of_the_groups_replaces_another_whole(case: tuple[str, str]) -> None:
    decoder, model = case
    own = plain(composed(f"decoder={decoder}", f"model={model}"))
    for part in groups(decoder):
        for option in OPTIONS[part]:
            got = plain(composed(f"decoder={decoder}", f"model={model}", f"decoder/{part}={option}"))
            expected = of_part(part, option)
            if own.get(part, {}).get("_target_") == expected["_target_"]:
                expected = own[part]
            lossless = got.pop("lossless")  # an exact part may lift this label, none takes it away
            assert lossless or not own["lossless"]
            assert got == {key: value for key, value in (own | {part: expected}).items() if key != "lossless"}


@pytest.mark.parametrize("decoder", [d for d in DECODERS if groups(d)])
def test_every_pair_of_parts_is_built_or_refused_with_a_reason(decoder: str) -> None:
    """Parts are independent of each other, as the test above shows, so a pair is put together from two compositions.

    Each part is built once from its yaml: through Hydra every one of the hundreds of pairs takes a hundred times as long.
    """
    own, outcomes = plain(composed(f"decoder={decoder}")), set()
    parts = groups(decoder)
    target = hydra.utils.get_object(own.pop("_target_"))
    rest = {key: built(value) if isinstance(value, dict) else value for key, value in own.items() if key not in parts}
    for chosen in itertools.product(*([None, *OPTIONS[part]] for part in parts)):
        pair = {part: option and built_part(part, option) for part, option in zip(parts, chosen, strict=True)}
        exact = not {"grouped", "relaxed", "all", "keep", "annealed", "entropy", "runs", "phrases", "cross_path"} & set(
            chosen
        )
        reason = refusal(target, rest | pair | {"lossless": exact and own["lossless"]})
        assert reason is None or (reason.endswith(".") and ". " not in reason.replace("e.g. ", ""))  # one sentence
        outcomes.add(reason is None)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("words", "part", "option"),
    [
        ("decoder=gsd model=lumina", "verifier", "exact"),
        ("decoder=lantern", "verifier", "exact"),
        ("decoder=lantern++", "verifier", "grouped"),
        ("decoder=eagle decoder/refiner=coupled", "drafter", "jacobi"),
        ("decoder=sjd-fc", "drafter", "jacobi"),
        ("decoder=jacobi", "refiner", "coupled"),
    ],
)
def test_a_part_has_no_setting_of_the_one_before(words: str, part: str, option: str) -> None:
    decoder = compose([*words.split(), f"decoder/{part}={option}"]).decoder
    assert plain(decoder)[part] == of_part(part, option)
    instantiate(decoder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("decoder=eagle decoder/drafter=jacobi", "needs a refiner.*decoder/refiner=coupled"),
        ("decoder=sjd decoder/drafter=eagle", "nothing to refine; set decoder.refiner=null"),
        ("decoder=lantern decoder/verifier=exact decoder.verifier.neighbours=3", "unknown setting of decoder.verifier"),
        ("decoder=sjd decoder/verifier=relaxed", "set decoder.lossless=false"),
        ("decoder=ar decoder/verifier=exact", "decoder=ar drafts nothing, so it takes no decoder/verifier=exact"),
        (
            "decoder=sjd decoder.verifier=exact",
            "decoder.verifier must be Verifier or null, got 'exact'; write decoder/verifier=exact",
        ),
        ("decoder=jacobi ~decoder/refiner", "needs a refiner"),
    ],
)
def test_a_senseless_pair_has_a_reason(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        instantiate(compose(words.split()).decoder)


def test_a_decoder_of_one_piece_has_a_reason(cli: Cli) -> None:
    assert cli("decoder=zipar", "decoder/verifier=exact") != 0
    assert "this decoder is one piece, without a verifier to choose" in cli.err
    assert cli("decoder=scd", "decoder/verfier=block") != 0
    assert "unknown part of a decoder 'verfier', did you mean 'verifier'? Valid: drafter, refiner, verifier." in cli.err


def test_the_settings_shown_are_those_of_the_run() -> None:
    shown = composed_settings(["--cfg", "job", "decoder=gsd", "decoder/verifier=exact", "decoder.window=5"])
    assert shown is not None
    decoder = OmegaConf.create(shown).decoder
    assert (plain(decoder)["verifier"], decoder.window) == (of_part("verifier", "exact"), 5)
    assert composed_settings(["--cfg", "job", "decoder=gsd"]) is None
    assert composed_settings(["decoder=gsd", "decoder/verifier=exact"]) is None
    assert composed_settings(["--cfg", "hydra", "decoder=gsd", "decoder/verifier=exact"]) is None


@pytest.mark.parametrize(
    ("words", "lossless"),
    [
        ("decoder=gsd decoder/verifier=exact", True),
        ("decoder=lantern decoder/verifier=exact", True),
        ("decoder=gsd", False),
        ("decoder=gsd decoder/refiner=coupled", False),  # its verifier is still there
        ("decoder=gsd decoder/verifier=exact decoder/refiner=keep", False),
        ("decoder=gsd decoder/verifier=exact decoder.lossless=false", False),  # the command line counts
        ("decoder=denoise decoder/verifier=exact", True),
        ("decoder=denoise decoder/verifier=exact decoder.rule=paper", False),
    ],
)
def test_a_decoder_is_lossless_once_its_inexact_parts_are_replaced(words: str, lossless: bool) -> None:
    node = compose(words.split()).decoder
    assert node.lossless is lossless
    assert instantiate(node).lossless is lossless


def test_values_of_the_command_line_reach_the_chosen_part() -> None:
    node = compose(["decoder=lantern", "decoder/verifier=grouped", "decoder.verifier.group=3"]).decoder
    assert plain(node)["verifier"] == of_part("verifier", "grouped") | {"group": 3}
    chain = "decoder/drafter@decoder.drafter.chain"
    node = compose(["decoder=sjd2-fc", f"{chain}=jacobi", "decoder.drafter.chain.init=left"]).decoder
    assert node.drafter.chain.init == "left"
    assert node.drafter.siblings == [4, 3, 2]
    assert type(sjd2.decoder("lantern", model="tiny", verifier="exact").verifier).__name__ == "Exact"


@pytest.mark.usefixtures("plain")
def test_an_experiment_chooses_a_part(cli: Cli, tmp_path: Path) -> None:
    """Its AR baseline has none of it, nor does AR beside it; another decoder or part drops what was meant for the first."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(EXPERIMENT.format(run_dir="null"), encoding="utf-8")
    words = [f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "experiment=mine"]
    relaxed = of_part("verifier", "relaxed")
    assert plain(compose(words).decoder)["verifier"] == relaxed | {"neighbours": 3}
    assert plain(compose([*words, "decoder=ar"]).decoder) == plain(compose(["decoder=ar"]).decoder)
    assert plain(compose([*words, "decoder/verifier=exact"]).decoder)["verifier"] == of_part("verifier", "exact")
    lantern = plain(compose([*words, "decoder=gsd"]).decoder)
    assert lantern["verifier"] == relaxed | {"neighbours": 3}

    assert cli(*words) == 0, cli.err
    assert cli.run("sjd").config.decoder.verifier.neighbours == 3
    assert plain(cli.run("ar").config.decoder) == plain(compose(["decoder=ar"]).decoder)


# ---- types of settings


@dataclass(kw_only=True)
class Half:
    """One annotation that cannot be resolved here, and one that can."""

    size: int
    other: Unknown | None = None


def test_one_annotation_that_cannot_be_resolved_leaves_the_others_checked() -> None:
    node = OmegaConf.create({"half": {"_target_": f"{__name__}.Half", "size": "wide"}})
    with pytest.raises(UserError, match=r"half\.size must be a whole number, got 'wide'"):
        instantiate(node.half)
    node.half.size = 3
    assert instantiate(node.half).size == 3


# ---- paths


@pytest.mark.usefixtures("plain")
def test_a_tilde_is_the_home_folder_in_every_path(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line, in a yaml, in Python, after local-dir:, and where Hydra itself writes; texts stay as they are."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.txt").write_text("a red circle\n", encoding="utf-8")
    words = [
        "prompts=file",
        "prompts.path='~/mine.txt'",
        "evaluation.metrics.clip.model='local-dir:~/clip'",
        "logger.notes='~ 3'",
    ]
    cfg = compose([*words, "+logger.tags=['~/x']", "runs_dir='~'"])
    assert cfg.prompts.path == f"{tmp_path}/home/mine.txt"
    assert cfg.evaluation.metrics.clip.model == f"local-dir:{tmp_path}/home/clip"
    assert cfg.logger.notes == "~ 3"
    assert cfg.runs_dir == f"{tmp_path}/home"
    assert (
        sjd2.decoder("lantern", drafter="eagle", verifier={"cache": "~/tables"}).verifier.cache
        == f"{tmp_path}/home/tables"
    )

    words = ["a.b=[~/c,~/d]", "notes=~ 3", "x~y/z=1", "~decoder/refiner"]
    assert at_home(words) == [f"a.b=[{tmp_path}/home/c,{tmp_path}/home/d]", *words[1:]]
    # the quoted one reaches Hydra as it would from a yaml
    words = ["decoder=scd", "prompts=file", "prompts.path=~/mine.txt", "baseline=null", "runs_dir='~/runs'"]
    assert cli("-m", *words) == 0, cli.err
    assert not (tmp_path / "~").exists()
    assert [path.name for path in (tmp_path / "home" / "runs").glob("toy-scd-*")]
    assert (tmp_path / "home" / "runs" / "sweeps").is_dir()
