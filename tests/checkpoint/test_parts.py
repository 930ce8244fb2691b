"""Tensors cut along an inner dimension: fragments of many runs, against sets of elements."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from moe_dist import checkpoint
from moe_dist.checkpoint import Fragment, Place, Range, TensorInfo
from moe_dist.checkpoint.blocks import blocks_of, split_rows
from moe_dist.checkpoint.coverage import coverage_problems
from moe_dist.checkpoint.errors import CheckpointError
from moe_dist.checkpoint.fragments import cut_at, wanted_for_part
from moe_dist.checkpoint.index import Stored, decode_index, encode_index
from tests.checkpoint.worlds import on_threads

SHAPE = (7, 12)


def part_places(part: int, parts: int, offset: int, length: int) -> list[Place]:
    """Of the part-th of `parts` groups of columns of a matrix of `SHAPE`."""
    run = SHAPE[1] // parts
    return wanted_for_part("w", run=run, first=part * run, stride=SHAPE[1], flat_offset=offset, length=length)


def elements(at: Range) -> list[int]:
    return [at.offset + run * at.stride + k for run in range(at.runs) for k in range(at.length)]


def cuts(chance: random.Random, numel: int, pieces: int) -> list[tuple[int, int]]:
    """[0, numel) cut into (offset, length)."""
    edges = sorted({0, numel, *(chance.randrange(numel + 1) for _ in range(pieces - 1))})
    return [(low, high - low) for low, high in pairwise(edges)]


@pytest.mark.parametrize("seed", range(10))
def test_places_are_the_elements_of_the_part(seed):
    chance = random.Random(seed)
    parts = chance.choice([1, 2, 3, 4])
    whole = torch.arange(SHAPE[0] * SHAPE[1])
    for part in range(parts):
        local = whole.view(SHAPE).chunk(parts, dim=1)[part].reshape(-1)
        for offset, length in cuts(chance, local.numel(), 5):
            places = part_places(part, parts, offset, length)
            assert len(places) <= 3
            found = [element for place in places for element in elements(place.range)]
            assert found == local[offset : offset + length].tolist()
            for fragment in cut_at(places, local[offset : offset + length]):
                assert fragment.range.of(whole).flatten().tolist() == fragment.tensor.tolist()


@pytest.mark.parametrize("width", [5, 12, 100])
def test_blocks_hold_each_element_once(width):
    for at in (Range("w", -1, 3, 40), Range("w", -1, 2, 3, 5, 12), Range("w", -1, 4, 5, 3, 5), Range("w", -1, 0, 1)):
        found = {}
        for block in blocks_of(at, width):
            assert block.right <= width
            for row in range(block.rows):
                for column in range(block.columns):
                    element = (block.row + row) * width + block.column + column
                    assert element not in found
                    found[element] = block.start + row * block.columns + column
        assert sorted(found, key=found.get) == elements(at)
    assert len(list(split_rows(3, 4 * width, width))) <= 3


def stored(parts: int, pieces: int, seed: int) -> list[Stored]:
    """The matrix, by `parts` ranks that hold columns of it, in `pieces` pieces each."""
    chance, found = random.Random(seed), []
    for part in range(parts):
        for offset, length in cuts(chance, SHAPE[0] * SHAPE[1] // parts, pieces):
            found += [
                Stored(f"rank-{part}", "weights", place.range, "F32")
                for place in part_places(part, parts, offset, length)
            ]
    chance.shuffle(found)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_every_fault_in_a_tiling_by_parts_is_found(seed):
    table = {"w": TensorInfo(SHAPE, None, ("weights",))}
    found = stored(2 + seed % 3, 1 + seed % 4, seed)
    assert coverage_problems(table, found) == []
    for number, piece in enumerate(found):
        rest, at = found[:number] + found[number + 1 :], piece.range
        missing = coverage_problems(table, rest)
        assert missing
        assert all("in no file" in line for line in missing)
        assert any("twice" in line for line in coverage_problems(table, [*found, replace(piece, file="another")]))
        for change in ({"offset": at.offset + 1}, {"length": at.length + 1}, {"runs": at.runs + 1, "stride": 12}):
            assert coverage_problems(table, [*rest, replace(piece, range=replace(at, **change))]), (at, change)
        assert any("F64" in line for line in coverage_problems(table, [*rest, replace(piece, dtype="F64")])) or not rest


def test_a_rank_that_is_missing_is_one_line():
    table = {"w": TensorInfo(SHAPE, None, ("weights",))}
    half = [piece for piece in stored(2, 1, 0) if piece.file == "rank-1"]
    assert coverage_problems(table, half) == ["weights of w [0, 6) and 6 more, each 12 on: in no file"]


def save_by_parts(root, parts: int, pieces: int) -> torch.Tensor:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(parts))

    def save(group):
        local = values.chunk(parts, dim=1)[group.rank].reshape(-1)
        mine: list[Fragment] = []
        for offset, length in cuts(random.Random(pieces), local.numel(), pieces):
            mine += cut_at(part_places(group.rank, parts, offset, length), local[offset : offset + length])
        table = {"w": TensorInfo(SHAPE, None, ("weights",))}
        return checkpoint.save(root, 1, {"weights": mine}, {}, catalogue=table, group=group)

    on_threads(parts, save)
    return values


@pytest.mark.parametrize(("written", "pieces"), [(1, 3), (2, 1), (3, 4), (4, 2)])
def test_any_parts_are_read_from_any_parts(tmp_path, written, pieces):
    values = save_by_parts(tmp_path, written, pieces)
    assert checkpoint.verify(tmp_path / "step-1").ok
    with checkpoint.open_checkpoint(tmp_path / "step-1") as opened:
        assert torch.equal(opened.tensor("weights", "w"), values)
        for parts in (1, 2, 3, 4, 6):
            for part, wanted in enumerate(values.chunk(parts, dim=1)):
                flat = torch.full((wanted.numel(),), torch.nan)
                for offset, length in cuts(random.Random(parts), wanted.numel(), 3):
                    places = part_places(part, parts, offset, length)
                    opened.fill("weights", places, flat[offset : offset + length])
                assert torch.equal(flat.view_as(wanted), wanted), (parts, part)


def test_a_hole_among_runs_is_named(tmp_path):
    save_by_parts(tmp_path, 2, 1)
    with checkpoint.open_checkpoint(tmp_path / "step-1") as opened:
        opened._pieces["weights", "w", -1] = [
            piece for piece in opened._pieces["weights", "w", -1] if piece.file == "rank-00001.safetensors"
        ]
        with pytest.raises(CheckpointError, match=r"weights of w \[0, 6\) and 6 more, each 12 on: in no file"):
            opened.tensor("weights", "w")
        with pytest.raises(CheckpointError, match=r"w \[4, 6\) and 2 more, each 12 on: in no file"):
            opened.read("weights", [Range("w", -1, 4, 4, 3, 12)])


def test_the_index_keeps_runs_and_refuses_those_that_overlap():
    pieces = [Stored("rank-00000.safetensors", "weights", Range("w", -1, 6, 6, 7, 12), "F32")]
    data = encode_index(0, "rank-00000.safetensors", pieces)
    assert decode_index(data, where="index") == pieces
    with pytest.raises(CheckpointError, match="impossible fragment"):
        decode_index(data.replace(b'"stride": 12', b'"stride": 5'), where="index")


def test_many_wide_matrices_cost_no_time():
    """A row-parallel matrix of 4,096 x 4,096 over 8 ranks, each part cut in 8 again: 64 times 3 fragments of a tensor
    that has 32,768 runs."""
    side, parts = 4096, 8
    run, table, found = side // parts, {"w": TensorInfo((side, side), None, ("weights",))}, []
    start = time.process_time()
    for part in range(parts):
        local = side * run
        for offset in range(0, local, local // 8 + 1):
            places = wanted_for_part(
                "w", run=run, first=part * run, stride=side, flat_offset=offset,
                length=min(local // 8 + 1, local - offset),
            )  # fmt: skip
            found += [Stored(f"rank-{part}", "weights", place.range, "F32") for place in places]
    assert coverage_problems(table, found) == []
    assert len(found) <= 3 * 64
    assert time.process_time() - start < 0.2


def test_checkpoints_of_the_format_before_runs_are_read(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr("moe_dist.checkpoint.format.VERSION", 1)
        values = save_by_parts(tmp_path, 1, 3)
    assert '"version": 1' in (tmp_path / "step-1" / "manifest.json").read_text()
    with checkpoint.open_checkpoint(tmp_path / "step-1", verify="full") as opened:
        assert torch.equal(opened.tensor("weights", "w"), values)
