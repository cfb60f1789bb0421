"""The run folder: identity, records that survive a kill, the lock, prompt lists."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from evaluation import run_folder
from evaluation.identity import by_content, identity
from evaluation.prompts import FORMATS, Prompts, read_prompts
from evaluation.run_folder import NEEDED, RunFolder, run_folders
from sjd2 import locks
from sjd2.errors import UserError
from sjd2.files import append_lines, read_lines
from sjd2.locks import lock
from tests.helpers.separators import SEPARATORS

PARTS = {
    "model": {"size": "7b"},
    "law": {"temperature": 1.0, "top_k": 5},
    "seed": 0,
    "batch_size": 8,
    "dtype": "float32",
}


def record(prompt: int, repeat: int = 0) -> dict:
    own = {"id": [prompt, repeat], "prompt": "ä", "tokens": 3, "image": f"images/{prompt:05d}_{repeat}.png"}
    return dict.fromkeys(NEEDED, 0) | own


def make(run: RunFolder, *prompts: int) -> None:
    for prompt in prompts:
        run.path.mkdir(exist_ok=True, parents=True)
        image = np.full((4, 6, 3), prompt, np.uint8)
        run.append(record(prompt) | run.write_image((prompt, 0), image, np.array([prompt, 2, 3])))


# ---- identity


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch_size": 4},
        {"dtype": "float64"},
        {"law": {"temperature": 0.9, "top_k": 5}},
        {"model": {"size": "1b"}},
    ],
)
def test_identity_follows_every_part(change: dict) -> None:
    assert identity(**PARTS)["id"] != identity(**PARTS | change)["id"]


def test_identity_knows_neither_order_nor_the_spelling_of_numbers() -> None:
    shuffled = dict(reversed(PARTS.items())) | {"law": {"top_k": 5.0, "temperature": 1}}
    assert identity(**shuffled) == identity(**PARTS)
    assert identity(**PARTS | {"refill": True})["id"] != identity(**PARTS | {"refill": False})["id"]


def test_files_count_by_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "head.bin").write_bytes(b"same")
    a, b = ({"drafter": {"weights": str(tmp_path / name)}} for name in ("a", "b"))
    assert by_content(a) == by_content(b) != a
    assert by_content(a, covered=True) == {"drafter": {"weights": "local"}}
    before = by_content(b)
    (tmp_path / "b" / "head.bin").write_bytes(b"other")
    assert by_content(b) != before
    assert by_content({"weights": "hub/id"}) == {"weights": "hub/id"}
    library = {"verifier": {"library": str(tmp_path / "a" / "head.bin")}}  # mined again, it is another run's
    assert by_content(library) != library


def test_claim_refuses_the_folder_of_another_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    first = identity(**PARTS)
    run.claim(OmegaConf.create({"limit": 1, "identity": first}), first)
    run.claim(OmegaConf.create({"limit": 2, "identity": first}), first)
    assert run.config.limit == 2
    other = identity(**PARTS | {"seed": 7})
    with pytest.raises(UserError, match=r"seed: 0 there, 7 asked for"):
        run.claim(OmegaConf.create({"identity": other}), other)
    assert run.config.limit == 2


# ---- records


def test_records_are_sorted_single_and_joined_over_ranks(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    make(run, 11, 2)
    run_folder.append_lines(tmp_path / "samples-01.jsonl", [record(5), record(2)])
    assert [r["id"][0] for r in run.records()] == [2, 5, 11]
    assert run.missing([(1, 0), (2, 0), (5, 0), (5, 1)]) == [(1, 0), (5, 1)]


@pytest.mark.parametrize("cut", [1, 2, 30, 10_000])
def test_a_line_cut_by_a_kill_is_dropped_and_written_again(tmp_path: Path, cut: int) -> None:
    run = RunFolder(tmp_path)
    make(run, 0, 1)
    path = tmp_path / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][: max(1, len(lines[1]) - cut)])
    assert [r["id"] for r in run.records()] == [[0, 0]]
    assert run.damaged == 1
    make(run, 1, 2)
    assert path.read_bytes().startswith(lines[0] + lines[1])
    assert [r["id"][0] for r in run.records()] == [0, 1, 2]
    assert run.damaged == 0


def test_a_damaged_line_in_the_middle_costs_only_itself(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    make(run, 0, 1, 2)
    lines = (tmp_path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "samples.jsonl").write_bytes(lines[0] + b"\xff\x00 3\n" + lines[2])
    assert [r["id"][0] for r in run.records()] == [0, 2]
    assert run.damaged == 1


def test_images_tokens_and_traces(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    make(run, 3, 1)
    assert [image[0, 0, 0] for image in run.images()] == [1, 3]
    assert [image.shape for image in run.images([(3, 0)])] == [(4, 6, 3)]
    first = run.records()[0]
    assert run.tokens(first).tolist() == [1, 2, 3]
    assert not run.traced(first)
    run.write_trace((1, 0), [(0.5, 1), (1.0, 3)])
    assert run.traced(first)
    (tmp_path / first["image"]).unlink()
    with pytest.raises(UserError, match=r"cannot read .*00001_0\.png"):
        list(run.images())


def test_provenance_joins_start_and_end(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.launch({"device": "cpu"}) == 0
    run.close_launch(0, {"peak_memory_gb": 1.5})
    assert run.launch({"device": "cuda"}) == 1
    assert run.provenance() == [{"launch": 0, "device": "cpu", "peak_memory_gb": 1.5}, {"launch": 1, "device": "cuda"}]


def test_run_folders_are_those_with_images(tmp_path: Path) -> None:
    for name in ("b", "a", "empty"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("identity: {id: x}\n")
    for name in ("b", "a"):
        make(RunFolder(tmp_path / name), 0)
    assert [path.name for path in run_folders(tmp_path)] == ["a", "b"]
    with pytest.raises(UserError, match="no run folder"):
        RunFolder.open(tmp_path / "nothing")


def test_metrics_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.metrics == {}
    (tmp_path / "metrics.json").write_text('{"fid": 1.5}')
    assert run.metrics == {"fid": 1.5}
    (tmp_path / "metrics.json").write_text('{"fid": 1')
    with pytest.raises(UserError, match="damaged"):
        _ = run.metrics


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    run_folder.write_atomically(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run_folder.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


# ---- lock


def _hold(path: Path, ready: multiprocessing.Event, seconds: float) -> None:
    with lock(path):
        ready.set()
        time.sleep(seconds)


def test_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / ".lock", ready, 60))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on \S+ since"), lock(tmp_path / ".lock"):
        pass
    holder.kill()
    holder.join()
    with lock(tmp_path / ".lock"):
        pass


def test_lock_waits_for_its_turn(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / ".lock", ready, 1.0))
    holder.start()
    assert ready.wait(60)
    with lock(tmp_path / ".lock", wait=True):
        assert not holder.is_alive() or holder.join(5) is None
    holder.join()


def test_lock_without_flock_takes_over_from_a_dead_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    path = tmp_path / ".lock"
    owner = {"host": locks.socket.gethostname(), "since": "then"}
    path.write_text(json.dumps(owner | {"pid": done.pid}))
    with lock(path), pytest.raises(UserError, match=f"process {os.getpid()}"), lock(path):
        pass
    path.write_text(json.dumps(owner | {"pid": 1, "host": "elsewhere"}))
    with pytest.raises(UserError, match="delete"), lock(path):
        pass


# ---- prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a cat\r\n\n  zwei Hünde \n"),
        ("p.csv", 'id,caption\n1,a cat\n2,"zwei Hünde"\n'),
        ("p.json", '["a cat", "zwei Hünde"]'),
        ("p.json", '{"images": [], "annotations": [{"id": 1, "caption": "a cat"}, {"caption": "zwei Hünde"}]}'),
        ("p.jsonl", '{"prompt": "a cat"}\n\n"zwei Hünde"\n'),
        ("bom.csv", "\ufeffprompt\na cat\nzwei Hünde\n"),
        ("bom.txt", "\ufeffa cat\r\nzwei Hünde"),
    ],
)
def test_prompt_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == ["a cat", "zwei Hünde"]


@pytest.mark.parametrize("ending", FORMATS)
def test_a_prompt_of_every_separator_is_one_prompt(tmp_path: Path, ending: str) -> None:
    """Read from a file, written into a record and read again."""
    odd, path = f"a{SEPARATORS}b", tmp_path / f"p{ending}"
    line = json.dumps({"prompt": odd}, ensure_ascii=False)
    text = {".txt": f"{odd}\n{odd}", ".csv": f"id,prompt\r\n1,{odd}", ".tsv": f"id\tprompt\n1\t{odd}"}
    text |= {".json": f"[{line}, {line}]", ".jsonl": f"{line}\r\n{line}"}
    path.write_bytes(("\ufeff" + text[ending]).encode())
    assert set(read_prompts(path)) == {odd}
    append_lines(path.with_name("lines.jsonl"), [{"prompt": odd}, {"prompt": odd}])
    assert read_lines(path.with_name("lines.jsonl")) == ([{"prompt": odd}] * 2, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'"a"\n{"prompt": "a \\ud83d"}\n', r"line 2: .ud83d is half a surrogate pair"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "not UTF-8 at byte 0"),
        ("p.parquet", b"x", r"Valid endings: \.txt, \.csv, \.tsv, \.json, \.jsonl"),
        ("p.csv", b"a,b\n1,2\n", r"line 2: no 'prompt' among its columns \(a, b\); .*prompts.column"),
        ("p.json", b'{"a": 1}', "must hold a list"),
        ("p.json", b'["a", 3]', "entry 1: 3 is no prompt"),
        ("p.json", b'["a",', "is no json"),
        ("p.jsonl", b'"a"\n{"prompt": \n', "is no jsonl in line 2"),
    ],
)
def test_unreadable_prompt_files_say_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_missing_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"prompts\.path=FILE"):
        _ = Prompts(name="file").texts


def test_column_ids_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,long\na,aa\nb,bb\n")
    short, long = Prompts(name="file", path=str(path), repeats=2), Prompts(name="file", path=str(path), column="long")
    assert long.texts == ["aa", "bb"]
    assert short.ids() == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert short.ids(3) == short.ids()[:3]
    assert [short.ids().place(key) for key in short.ids()] == [0, 1, 2, 3]
    many = Prompts(name="file", path=str(path), repeats=10**9)  # takes no memory: only what is used is made
    assert many.wanted(3) == short.ids(3)
    assert many.ids()[-1] == (1, 10**9 - 1)
    with pytest.raises(
        UserError, match=r"2 prompts with prompts.repeats=1000000000 are 2,000,000,000 images; give limit="
    ):
        many.wanted(None)
    with pytest.raises(UserError, match="asks for 2,000,000,000 images; a run has at most"):
        many.wanted(10**12)
    assert short.digest != long.digest
    copy = tmp_path / "copy.txt"
    copy.write_text("a\nb\n")
    assert Prompts(name="file", path=str(copy)).digest == short.digest


def test_shapes_are_the_held_out_captions() -> None:
    prompts = Prompts(name="shapes")
    assert len(prompts.texts) == len(set(prompts.texts)) == 2000
