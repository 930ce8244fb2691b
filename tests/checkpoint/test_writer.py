"""Saving: whole or not at all, the same answer on every rank, and nothing left behind."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from dataclasses import replace

import pytest
import torch

from moe_dist.checkpoint import (
    CheckpointError,
    Fragment,
    NoSpaceError,
    TensorInfo,
    find_latest,
    open_checkpoint,
    save,
    verify,
    writer,
)
from moe_dist.checkpoint.format import read_manifest
from tests.checkpoint.worlds import World, catalogue, on_threads, saved, truth

WORLD = World(2, 1)


def attempt(root, step, *, pieces=None, state=None, shapes=None, **options):
    """Save on two threads; the result or exception of each rank."""

    def work(group):
        mine = WORLD.fragments(group.rank, truth())
        mine = pieces(group.rank, mine) if pieces else mine
        table = shapes(group.rank) if shapes else catalogue()
        return save(root, step, mine, state or {"step": step}, catalogue=table, group=group, **options)

    return on_threads(WORLD.size, work)


def assert_all_raise_alike(results, message, kind=CheckpointError):
    assert [type(result) for result in results] == [kind] * len(results), results
    assert len({str(result) for result in results}) == 1
    assert message in str(results[0])


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_a_save_leaves_the_step_and_latest_and_nothing_else(tmp_path):
    results = attempt(tmp_path / "checkpoints", 12)
    assert results == [tmp_path / "checkpoints" / "step-12"] * 2
    assert names(tmp_path / "checkpoints") == ["latest", "step-12"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-12\n"
    assert names(results[0]) == [
        "manifest.json",
        "rank-00000.json",
        "rank-00000.safetensors",
        "rank-00001.json",
        "rank-00001.safetensors",
        "tensors.json",
        "trainer_state.json",
    ]
    assert verify(results[0]).ok


def test_files_are_plain_safetensors_under_readable_keys(tmp_path):
    from safetensors.torch import load_file

    path = saved(tmp_path, 1, World(1, 1), truth())
    tensors = load_file(path / "rank-00000.safetensors")
    key = ("exp_avg", "layers.0.experts.gate_up_proj", 7)
    assert torch.equal(tensors["exp_avg/layers.0.experts.gate_up_proj[7]@0"], truth()[key])
    assert torch.equal(tensors["weights/norm.weight@0"], truth()["weights", "norm.weight", -1])


def test_the_same_state_gives_the_same_bytes(tmp_path):
    first, second = attempt(tmp_path / "a", 3)[0], attempt(tmp_path / "b", 3)[0]
    assert read_manifest(first) == read_manifest(second)


def test_rank_without_fragments_and_tensors_without_elements(tmp_path):
    shapes = {"w": TensorInfo((4,), None, ("weights",)), "none": TensorInfo((0, 3), None, ("weights",))}
    path = attempt(
        tmp_path,
        1,
        pieces=lambda rank, _: {"weights": [Fragment("w", -1, 0, torch.ones(4))] if rank == 1 else []},
        shapes=lambda _: shapes,
    )[0]
    assert verify(path).ok
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensor("weights", "none").shape == (0, 3)
        assert checkpoint.tensor("weights", "w").tolist() == [1, 1, 1, 1]


def test_tensors_longer_than_a_chunk_strided_and_needing_grad(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_dist.checkpoint.tensorfile.CHUNK_BYTES", 64)
    values = torch.randn(2, 1000, requires_grad=True)
    shapes = {"w": TensorInfo((1000,), None, ("weights",))}
    path = save(tmp_path, 1, {"weights": [Fragment("w", -1, 0, values.t()[:, 1])]}, {}, catalogue=shapes)
    with open_checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint.tensor("weights", "w"), values[1])
    assert verify(path).ok


def drop_one(rank, mine):
    return {**mine, "exp_avg": [f for f in mine["exp_avg"] if f.expert != 7]}


def write_twice(rank, mine):
    mine["weights"].append(Fragment("norm.weight", -1, 1, torch.zeros(2)))
    return mine


def beyond(rank, mine):
    if rank == 1:
        mine["weights"].append(Fragment("norm.weight", -1, 5, torch.zeros(2)))
    return mine


def stranger(rank, mine):
    if rank == 1:
        mine["weights"].append(Fragment("layers.9.router", -1, 0, torch.zeros(2)))
    return mine


def one_in_bf16(rank, mine):
    if rank == 1:
        mine["weights"] = [replace(piece, tensor=piece.tensor.bfloat16()) for piece in mine["weights"]]
    return mine


def complex_numbers(rank, mine):
    if rank == 1:
        mine["weights"].append(Fragment("z", -1, 0, torch.zeros(2, dtype=torch.complex64)))
    return mine


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (drop_one, "exp_avg of layers.0.experts.gate_up_proj expert 7 [0, 30): in no file"),
        (write_twice, "weights of norm.weight [1, 3): twice, in rank-0000"),
        (beyond, "the tensor has 5 elements only"),
        (stranger, "weights of layers.9.router [0, 2) in rank-00001.safetensors: not among"),
        (one_in_bf16, "BF16 in rank-00001.safetensors, but F32 in rank-00000.safetensors"),
        (complex_numbers, "rank 1: weights/z@0: torch.complex64 cannot be stored"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_fragments_that_do_not_make_up_the_tensors_are_an_error_on_all_ranks(tmp_path, pieces, message):
    attempt(tmp_path, 1)
    assert_all_raise_alike(attempt(tmp_path, 2, pieces=pieces), message)
    assert names(tmp_path) == ["latest", "step-1"]


def test_ranks_that_hold_different_tables_are_an_error(tmp_path):
    results = attempt(tmp_path, 1, shapes=lambda rank: catalogue(buffers=rank == 1))
    assert_all_raise_alike(results, "rank 0 and ranks [1] disagree")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": float("nan")}}, "trainer_state.json.a.b: nan"),
        ({"a": [1, (2, 3)]}, "trainer_state.json.a[1]: a tuple"),
        ({"t": torch.zeros(1)}, "trainer_state.json.t: a Tensor"),
        ({1: 2}, "the key 1 is not a string"),
    ],
)
def test_state_that_json_would_change_is_named(tmp_path, value, message):
    assert_all_raise_alike(attempt(tmp_path, 1, state=value), message)
    assert not tmp_path.joinpath("step-1").exists()


@pytest.mark.parametrize(
    ("stage", "rank"),
    [("prepare", 0), ("prepare", 1), ("open_folder", 0), ("write", 0), ("write", 1), ("commit", 0)],
)
def test_an_error_of_one_rank_in_any_stage_is_the_same_on_all(tmp_path, monkeypatch, stage, rank):
    attempt(tmp_path, 1)
    whole = getattr(writer._Save, stage)

    def failing(self, *args):
        if self.group.rank == rank:
            raise OSError(errno.EIO, "Input/output error", "some file")
        return whole(self, *args)

    monkeypatch.setattr(writer._Save, stage, failing)
    assert_all_raise_alike(attempt(tmp_path, 2), f"checkpoint step 2 was not saved: rank {rank}: ")
    assert names(tmp_path) == ["latest", "step-1"]
    assert (tmp_path / "latest").read_text() == "step-1\n"


def test_latest_that_cannot_move_is_told_and_the_step_stays(tmp_path, monkeypatch):
    attempt(tmp_path, 1)

    def failing(root, name):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writer, "point_latest", failing)
    assert_all_raise_alike(attempt(tmp_path, 2), "checkpoint step 2 is saved, but `latest` could not be moved")
    found = find_latest(tmp_path)
    assert found.path == tmp_path / "step-2"
    assert "`latest` says step-1, but step-2 was saved after it" in found.notes


def test_a_file_that_stays_invisible_is_an_error_and_not_a_hang(tmp_path, monkeypatch):
    writing = writer.write_layout

    def elsewhere(path, layout):
        record = writing(path, layout)
        if path.name == "rank-00001.safetensors":
            path.unlink()
        return record

    monkeypatch.setattr(writer, "write_layout", elsewhere)
    results = attempt(tmp_path, 1, visible_within_s=0.2)
    assert_all_raise_alike(results, "rank-00001.safetensors is not visible after 0.2 s")
    assert "file system that all ranks share" in str(results[0])


def test_leftovers_of_the_same_step_are_replaced(tmp_path):
    (tmp_path / "step-4.tmp-00ff00ff").mkdir(parents=True)
    (tmp_path / "step-4.tmp-00ff00ff" / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "step-4").mkdir()
    (tmp_path / "step-4" / "rank-00000.json").write_text("{}")
    attempt(tmp_path, 4)
    assert names(tmp_path) == ["latest", "step-4"]
    assert verify(tmp_path / "step-4").ok


def test_a_complete_step_is_replaced_by_the_later_save(tmp_path):
    saved(tmp_path, 4, WORLD, truth(1))
    saved(tmp_path, 4, World(1, 1), truth(2))
    with open_checkpoint(tmp_path / "step-4", verify="full") as checkpoint:
        assert torch.equal(checkpoint.tensor("weights", "norm.weight"), truth(2)["weights", "norm.weight", -1])
    assert names(tmp_path) == ["latest", "step-4"]


def test_too_little_space_is_found_before_anything_is_written(tmp_path, monkeypatch):
    attempt(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(writer.shutil, "rmtree", lambda *_, **__: pytest.fail("nothing is there to be removed"))
    results = attempt(tmp_path, 2)
    assert_all_raise_alike(results, f"no space in {tmp_path}: ", NoSpaceError)
    assert "bytes needed, 1,000 free" in str(results[0])
    assert names(tmp_path) == ["latest", "step-1"]


@pytest.fixture
def small_disk(tmp_path):
    root = tmp_path / "small"
    root.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(root)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield root
    subprocess.run(["umount", str(root)], check=True)


def test_a_disk_that_fills_up_while_writing_leaves_the_checkpoint_before_it(small_disk, monkeypatch):
    values = torch.randn(30_000)  # 120 kB: one checkpoint fits, a second does not
    shapes = {"w": TensorInfo((30_000,), None, ("weights",))}
    pieces = {"weights": [Fragment("w", -1, 0, values)]}
    first = save(small_disk, 1, pieces, {}, catalogue=shapes)
    roomy = shutil.disk_usage(small_disk)._replace(free=1 << 40)
    free = shutil.disk_usage(small_disk).free
    asked = iter([roomy])  # the first question is answered wrongly, as when somebody else fills the disk meanwhile
    asking = shutil.disk_usage
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: next(asked, None) or asking(path))
    two = {"w": TensorInfo((60_000,), None, ("weights",))}
    with pytest.raises(
        NoSpaceError, match=r"no space in .*small: 24\d,\d\d\d bytes needed, [\d,]+ free \(No space left"
    ):
        save(small_disk, 2, {"weights": [Fragment("w", -1, 0, torch.randn(60_000))]}, {}, catalogue=two)
    assert names(small_disk) == ["latest", "step-1"]
    assert shutil.disk_usage(small_disk).free == free
    assert find_latest(small_disk).path == first
    save(
        small_disk,
        3,
        {"weights": [Fragment("w", -1, 0, values[:5_000])]},
        {},
        catalogue={"w": TensorInfo((5_000,), None, ("weights",))},
    )


def test_a_limit_on_file_sizes_is_told_as_lack_of_space(tmp_path):
    shapes = {"w": TensorInfo((30_000,), None, ("weights",))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(NoSpaceError, match="File too large"):
            save(tmp_path, 1, {"weights": [Fragment("w", -1, 0, torch.randn(30_000))]}, {}, catalogue=shapes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/checkpoints: Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1, {}, {}, catalogue={})


def test_no_pickle_and_nothing_but_json_and_safetensors(tmp_path):
    path = attempt(tmp_path, 1)[0]
    assert {name.rsplit(".", 1)[1] for name in names(path)} == {"json", "safetensors"}
    for file in path.iterdir():
        start = file.read_bytes()[:2]
        assert start != b"\x80\x04"
        assert start != b"PK", os.fspath(file)
