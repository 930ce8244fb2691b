"""Reading back at any other layout, and what is said when a piece is not there."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
import torch

from moe_dist.checkpoint import (
    CheckpointError,
    Fragment,
    FrozenBase,
    Place,
    Range,
    TensorInfo,
    fingerprint,
    open_checkpoint,
    save,
)
from moe_dist.checkpoint.format import read_manifest
from tests.checkpoint.damage import rewrite_tensors, trust
from tests.checkpoint.worlds import KINDS, World, catalogue, loaded, saved, truth

LAYOUTS = [(1, 1), (2, 2), (4, 1), (1, 4), (2, 3)]


@pytest.mark.parametrize("written", LAYOUTS, ids=str)
def test_every_layout_reads_what_any_other_wrote_to_the_bit(tmp_path, written):
    values = truth()
    path = saved(tmp_path, 1, World(*written, seed=1), values)
    for number, layout in enumerate(LAYOUTS):
        world = World(*layout, seed=2 + number)
        for rank, shard in enumerate(loaded(path, world)):
            for kind in KINDS:
                assert torch.equal(shard[kind], world.shard(rank, values, kind)), (layout, rank, kind)


def test_ep_1_to_2_to_4_to_1_keeps_weights_and_moments_to_the_bit(tmp_path):
    values = truth(5)
    path = saved(tmp_path, 1, World(1, 1), values)
    for step, (expert, shards) in enumerate([(2, 2), (4, 1), (2, 1), (1, 1)], start=2):
        world = World(expert, shards, seed=step)
        shards_by_rank = loaded(path, world)
        rebuilt = dict.fromkeys(values)
        for key, value in values.items():
            rebuilt[key] = torch.full_like(value, float("nan"))
        for rank in range(world.size):
            for place in world.places(rank):
                at = place.range
                for kind in KINDS:
                    piece = shards_by_rank[rank][kind][place.start : place.start + at.length]
                    rebuilt[kind, at.name, at.expert][at.offset : at.offset + at.length] = piece
        assert all(torch.equal(rebuilt[key], values[key]) for key in values), (expert, shards)
        path = saved(tmp_path, step, world, rebuilt)


@pytest.fixture
def path(tmp_path):
    return saved(tmp_path, 1, World(2, 2), truth())


def test_read_gives_own_memory_and_whole_tensors_their_shape(path):
    values = truth()
    with open_checkpoint(path) as checkpoint:
        (part,) = checkpoint.read("weights", [Range("embed.weight", -1, 5, 20)])
        whole = checkpoint.tensor("exp_avg", "layers.1.experts.down_proj", 7)
        scalar = checkpoint.tensor("weights", "scale")
    part += 1
    assert torch.equal(part, values["weights", "embed.weight", -1][5:25] + 1)
    assert torch.equal(whole, values["exp_avg", "layers.1.experts.down_proj", 7].view(3, 7))
    assert scalar.shape == ()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Range("no.such", -1, 0, 1), "holds no weights of no.such"),
        (Range("layers.0.experts.gate_up_proj", 4, 0, 1), "gate_up_proj expert 4"),
        (Range("norm.weight", -1, 3, 4), r"norm.weight \[5, 7\): in no file"),
    ],
)
def test_what_is_not_there_is_named(path, wanted, message):
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.fill("weights", [Place(wanted, 0)], torch.zeros(10))


def test_a_kind_that_was_not_saved_is_named(path):
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=r"holds no ema of norm\.weight"):
        checkpoint.read("ema", [Range("norm.weight", -1, 0, 5)])


def test_a_buffer_of_another_dtype_is_refused_and_not_cast(path):
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="is F32, not BF16"):
        checkpoint.fill("weights", [Place(Range("norm.weight", -1, 0, 5), 0)], torch.zeros(5, dtype=torch.bfloat16))


def test_other_dtypes_come_back_as_they_were(tmp_path):
    buffers = {
        "counts": torch.tensor([1 << 40, -3]),
        "flag": torch.tensor([True, False, True]),
        "half": torch.randn(5).to(torch.bfloat16),
        "double": torch.randn(3, dtype=torch.float64),
    }
    shapes = {name: TensorInfo(tuple(value.shape), None, ("buffers",)) for name, value in buffers.items()}
    pieces = {"buffers": [Fragment(name, -1, 0, value) for name, value in buffers.items()]}
    with open_checkpoint(save(tmp_path, 0, pieces, {}, catalogue=shapes)) as checkpoint:
        for name, value in buffers.items():
            assert checkpoint.tensor("buffers", name).dtype == value.dtype
            assert torch.equal(checkpoint.tensor("buffers", name), value)


def test_the_state_of_the_trainer_comes_back(tmp_path):
    from tests.checkpoint.worlds import on_threads

    world, values = World(2, 1), truth()
    state = {"step": 7, "lr": 0.1 + 0.2, "big": 1 << 70, "nested": {"a": [1, None, True, "\u00e9"]}}

    def work(group):
        pieces = world.fragments(group.rank, values)
        return save(tmp_path, 7, pieces, state, catalogue=catalogue(), group=group)

    with open_checkpoint(on_threads(2, work)[0]) as checkpoint:
        assert checkpoint.trainer_state == state
        assert (checkpoint.step, checkpoint.world) == (7, 2)


def test_a_hole_in_the_index_names_tensor_and_range(path):
    for name in sorted(read_manifest(path).files):
        if name.startswith("rank-") and name.endswith(".json"):
            value = json.loads((path / name).read_text())
            value["fragments"] = [
                entry
                for entry in value["fragments"]
                if (entry["name"], entry["kind"], entry["offset"]) != ("embed.weight", "weights", 0)
            ]
            (path / name).write_text(json.dumps(value))
            trust(path, name)
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"weights of embed.weight \[0, 13\)"),
    ):
        checkpoint.tensor("weights", "embed.weight")


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_that_leaves_its_folder_is_refused(path, name):
    value = json.loads((path / "rank-00001.json").read_text())
    (path / "rank-00001.json").write_text(json.dumps({**value, "file": name}))
    trust(path, "rank-00001.json")
    with pytest.raises(CheckpointError, match="refused"):
        open_checkpoint(path)


def test_an_index_that_names_an_unlisted_file_is_refused(path):
    value = json.loads((path / "rank-00001.json").read_text())
    (path / "rank-00001.json").write_text(json.dumps({**value, "file": "other.safetensors"}))
    trust(path, "rank-00001.json")
    with pytest.raises(CheckpointError, match=r"other.safetensors, which the manifest does not list"):
        open_checkpoint(path)


@pytest.mark.parametrize("change", [{"offset": -4}, {"length": 0}, {"expert": -2}, {"offset": None}])
def test_an_impossible_fragment_in_the_index_is_refused(path, change):
    value = json.loads((path / "rank-00000.json").read_text())
    value["fragments"][0] |= change
    (path / "rank-00000.json").write_text(json.dumps(value))
    trust(path, "rank-00000.json")
    with pytest.raises(CheckpointError, match=r"rank-00000\.json"):
        open_checkpoint(path)


def test_a_file_linked_to_the_outside_is_refused(path, tmp_path):
    file = path / "rank-00000.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors: a link that leads out"):
        open_checkpoint(path)


def as_dtype(header):
    header[next(iter(header))]["dtype"] = "I32"


def as_shape(header):
    entry = header[next(iter(header))]
    entry["shape"] = [1, *entry["shape"]]


def overlap(header):
    first, second = list(header.values())[:2]
    second["data_offsets"] = [first["data_offsets"][1] - 4, second["data_offsets"][1]]


def renamed(header):
    header["something else"] = header.pop(next(iter(header)))


@pytest.mark.parametrize("change", [as_dtype, as_shape, overlap, renamed])
def test_a_tensor_file_that_is_not_what_its_index_says_is_named(path, change):
    rewrite_tensors(path / "rank-00000.safetensors", change)
    trust(path, "rank-00000.safetensors")
    world = World(2, 2)
    messages = []
    with open_checkpoint(path, verify="sizes") as checkpoint:
        for kind in KINDS:
            try:
                checkpoint.fill(kind, world.places(0), torch.zeros_like(world.shard(0, truth(), kind)))
            except CheckpointError as error:
                messages.append(str(error))
    assert messages
    assert all("rank-00000.safetensors" in message for message in messages)


def test_a_header_longer_than_the_file_is_named(path):
    file = path / "rank-00000.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: not readable"),
    ):
        checkpoint.tensor("weights", "embed.weight")


def test_full_verification_at_opening_finds_what_sizes_cannot(path):
    file = path / "rank-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    open_checkpoint(path).close()
    with pytest.raises(CheckpointError, match=r"rank-00003\.safetensors: its content"):
        open_checkpoint(path, verify="full")


def test_a_run_that_trains_other_experts_is_refused_before_it_loads(path):
    with open_checkpoint(path) as checkpoint:
        checkpoint.check_matches(catalogue())
        other = {name: replace(info, experts=info.experts and (0, 4)) for name, info in catalogue().items()}
        with pytest.raises(CheckpointError, match=r"down_proj: experts \[4\] not in the checkpoint; .*\[2, 3, 7, 9\]"):
            checkpoint.check_matches(other)
        many = {f"w{number}": TensorInfo((1,)) for number in range(20)} | catalogue()
        with pytest.raises(CheckpointError, match=r"w0: not in the checkpoint; .*; and 12 more"):
            checkpoint.check_matches(many)


def test_the_base_model_is_checked_by_its_tensors(tmp_path):
    from safetensors.torch import save_file

    base = tmp_path / "base"
    base.mkdir()
    save_file({"w": torch.arange(9.0)}, base / "model.safetensors")
    frozen = FrozenBase(str(base), fingerprint(base))
    path = save(tmp_path / "c", 0, {}, {}, catalogue={}, frozen=frozen)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.frozen == frozen
        checkpoint.check_base(base)
        save_file({"w": torch.arange(9.0) + 1}, base / "model.safetensors")
        with pytest.raises(CheckpointError, match="not the base model"):
            checkpoint.check_base(base)
