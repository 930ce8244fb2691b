"""`verify` names what is damaged, whoever reads it and with however many ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_dist.checkpoint import CheckpointError, Problem, Report, verify
from moe_dist.checkpoint.format import MANIFEST
from tests.checkpoint.damage import flip, swap, trust
from tests.checkpoint.worlds import World, on_threads, saved, truth

WORLD = World(2, 2)


@pytest.fixture
def path(tmp_path):
    return saved(tmp_path, 1, WORLD, truth())


def bad_files(path) -> list[str]:
    """Verified by one and by three ranks: all must say the same."""
    alone = verify(path)
    for report in on_threads(3, lambda group: verify(path, group=group)):
        assert set(report.problems) == set(alone.problems)
    return sorted({problem.file for problem in alone.problems})


def test_a_whole_checkpoint_has_no_problems(path):
    assert bad_files(path) == []
    report = verify(path)
    assert report.ok
    assert "whole, 10 files" in str(report)
    assert report.bytes == sum(file.stat().st_size for file in path.iterdir() if file.name != MANIFEST)


FILES = ["rank-00002.safetensors", "rank-00001.json", "tensors.json", "trainer_state.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_names_the_file(path, name):
    flip(path / name, (path / name).stat().st_size // 2)
    assert bad_files(path) == [name]
    assert "sha256" in str(verify(path))


@pytest.mark.parametrize("name", FILES)
def test_an_emptied_file_is_named_with_its_sizes(path, name):
    size = (path / name).stat().st_size
    (path / name).write_bytes(b"")
    assert bad_files(path) == [name]
    assert f"{name}: 0 bytes instead of {size:,}" in str(verify(path))


@pytest.mark.parametrize("name", FILES)
def test_a_deleted_file_is_named(path, name):
    (path / name).unlink()
    assert bad_files(path) == [name]
    assert f"{name}: missing" in str(verify(path))


def test_two_swapped_files_are_both_named_and_told_apart(path):
    first, second = path / "rank-00000.json", path / "rank-00001.json"
    swap(first, second)
    swap(path / "rank-00002.safetensors", path / "rank-00003.safetensors")
    assert bad_files(path) == [
        "rank-00000.json",
        "rank-00001.json",
        "rank-00002.safetensors",
        "rank-00003.safetensors",
    ]


def test_a_swap_of_files_of_one_size_says_whose_content_it_is(tmp_path):
    import torch

    from moe_dist.checkpoint import Fragment, TensorInfo, save

    def work(group):
        piece = Fragment("w", -1, 4 * group.rank, torch.randn(4))
        return save(
            tmp_path, 1, {"weights": [piece]}, {}, catalogue={"w": TensorInfo((8,), None, ("weights",))}, group=group
        )

    path = on_threads(2, work)[0]
    swap(path / "rank-00000.safetensors", path / "rank-00001.safetensors")
    text = str(verify(path))
    assert "rank-00000.safetensors: holds the content of rank-00001.safetensors" in text
    assert "rank-00001.safetensors: holds the content of rank-00000.safetensors" in text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe"])
def test_a_manifest_that_is_none_is_named(path, content):
    (path / MANIFEST).write_bytes(content)
    assert bad_files(path) == [MANIFEST]


def test_a_flipped_bit_in_the_manifest_is_not_blamed_on_another_file(path):
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"step": 1', '"step": 3'))
    assert bad_files(path) == [MANIFEST]
    assert "its own sha256 differs" in str(verify(path))


def test_a_missing_manifest_and_a_missing_folder(path, tmp_path):
    assert "no such checkpoint folder" in str(verify(tmp_path / "step-9"))
    (path / MANIFEST).unlink()
    assert "not a complete checkpoint" in str(verify(path))


def edit_index(path, rank, change):
    name = f"rank-{rank:05d}.json"
    value = json.loads((path / name).read_text())
    change(value["fragments"])
    (path / name).write_text(json.dumps(value))
    trust(path, name)


def test_a_lost_expert_is_named(path):
    for rank in range(WORLD.size):
        edit_index(path, rank, lambda pieces: pieces.__setitem__(slice(None), [p for p in pieces if p["expert"] != 3]))
    text = str(verify(path))
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        assert f"{kind} of layers.1.experts.down_proj expert 3 [0, 21): in no file" in text
    assert "expert 2" not in text


def test_an_expert_that_two_ranks_wrote_is_named(path):
    other = next(p for p in json.loads((path / "rank-00003.json").read_text())["fragments"] if p["expert"] >= 0)
    edit_index(path, 0, lambda pieces: pieces.append(other))
    text = str(verify(path))
    assert f"{other['name']} expert {other['expert']}" in text
    assert "twice, in rank-0000" in text


def test_a_value_that_is_not_finite_is_named(path):
    file = path / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    file.write_bytes(data)
    trust(path, file.name)
    (problem,) = verify(path).problems
    assert problem.file == file.name
    assert problem.what.endswith("a value is not finite")


def test_an_unreadable_file_is_a_problem_and_no_exception(path, monkeypatch):
    def failing(file, mode):
        raise OSError(5, "Input/output error")

    # The package's `verify` is the function; the module of that name is behind it.
    monkeypatch.setattr(sys.modules["moe_dist.checkpoint.verify"], "open", failing, raising=False)
    report = verify(path)
    assert not report.ok
    assert {problem.what for problem in report.problems} == {"not readable (Input/output error)"}


def test_a_long_list_of_problems_is_cut_where_it_is_one_message():
    report = Report(Path("step-3"), 1, 10, tuple(Problem(f"rank-{n}.safetensors", "missing") for n in range(11)))
    assert report.brief().endswith("rank-7.safetensors: missing; and 3 more")
    with pytest.raises(CheckpointError, match="and 3 more"):
        report.raise_if_bad()
    assert str(report).count("missing") == 11
