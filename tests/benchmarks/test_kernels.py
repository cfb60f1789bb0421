"""`python -m benchmarks.kernels` counts the operations of a pass by part, and leaves the model as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernels import PARTS, REST, TRANSFORMER, Launches


def test_the_command_counts_a_pass_by_part(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = kernels.main(
        ["--decoders", "ar,scd,lantern", "--sampler", "gumbel", "--out", str(tmp_path / "sub" / "k.json")]
    )
    result = json.loads(out.read_text())
    ar, scd = result["decoders"]
    for row in (ar, scd):
        assert sum(row[part] for part in PARTS) == row["all"]
        assert row["beside"] == row["all"] - row[TRANSFORMER]
    assert ar["refine"] == ar["drafter"] == 0
    assert ar["beside"] < 70  # 102 before random numbers were tabled by position
    assert 0 < scd["drafter"] < 20
    assert list(result["skipped"]) == ["lantern"]
    assert "| scd | 32 |" in capsys.readouterr().out


def test_views_cost_nothing_and_nested_parts_belong_to_the_outer_one() -> None:
    launches, x = Launches(), torch.ones(4, 4)
    with launches:
        x[:, 1:].T.unsqueeze(0).expand(2, -1, -1)
        launches.within("verify", lambda: launches.within("drafter", lambda: x + 1)())()
    assert dict(launches.parts) == {"verify": 1}
    assert launches.part == REST


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--decoders", "scdd"], "did you mean 'scd'"), (["--batch", "0"], "must be 1 or more")]
)
def test_wrong_options_say_how_to_fix_them(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        kernels.main(arguments)
    assert words in capsys.readouterr().err
