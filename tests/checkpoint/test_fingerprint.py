"""The identity of a base model: its tensors, and nothing else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from moe_dist.checkpoint import CheckpointError, fingerprint
from moe_dist.checkpoint.fingerprint import SAMPLE_BYTES, STRIDE_BYTES

HOWS = ("sampled", "full")


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "norm": torch.randn(8, generator=generator),
        "experts": torch.randn(700_000, generator=generator),  # two strides and a bit
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
    }


def model(folder, values):
    folder.mkdir()
    save_file(values, folder / "model.safetensors")
    return folder


@pytest.fixture
def base(tmp_path):
    return model(tmp_path / "base", tensors())


@pytest.mark.parametrize("how", HOWS)
def test_a_copy_and_a_resharded_copy_are_the_same_model(base, tmp_path, how):
    shutil.copytree(base, tmp_path / "copy")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    values = tensors()
    weight_map = {"norm": "b.safetensors", "experts": "a.safetensors", "half": "b.safetensors"}
    save_file({"experts": values["experts"]}, sharded / "a.safetensors")
    save_file({"norm": values["norm"], "half": values["half"]}, sharded / "b.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (sharded / "config.json").write_text("{}")
    own = fingerprint(base, how=how)
    assert own.startswith(f"{how}:")
    assert fingerprint(tmp_path / "copy", how=how) == own
    assert fingerprint(sharded, how=how) == own


def trained(values):
    values["experts"][1000:] += 1e-3


def one_norm_value(values):
    values["norm"][3] += 1


def last_value(values):
    values["experts"][-1] += 1


def cast(values):
    values["half"] = values["half"].half()


def reshaped(values):
    values["half"] = values["half"].view(5, 3)


def renamed(values):
    values["other"] = values.pop("half")


def dropped(values):
    del values["norm"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("change", [trained, one_norm_value, last_value, cast, reshaped, renamed, dropped])
def test_another_model_has_another_fingerprint(base, tmp_path, how, change):
    values = tensors()
    change(values)
    assert fingerprint(model(tmp_path / "other", values), how=how) != fingerprint(base, how=how)


def test_the_full_way_sees_what_lies_between_two_samples(base, tmp_path):
    values = tensors()
    values["experts"][(SAMPLE_BYTES + STRIDE_BYTES) // 8] += 1
    other = model(tmp_path / "other", values)
    assert fingerprint(other, how="full") != fingerprint(base, how="full")
    assert fingerprint(other) == fingerprint(base), "documented: a sampled fingerprint reads samples"


def test_a_folder_without_tensors_or_with_a_missing_or_cut_shard_is_named(base, tmp_path):
    with pytest.raises(CheckpointError, match="no safetensors files"):
        fingerprint(tmp_path / "absent")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm": "b.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"b\.safetensors missing"):
        fingerprint(base)
    (base / "model.safetensors.index.json").unlink()
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="does not lie within the file"):
        fingerprint(base)
    file.write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        fingerprint(base)


def test_an_index_that_leaves_the_folder_is_refused(base):
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="refused"):
        fingerprint(base)
