"""Bad folders: every fault is a UserError that names the file or the tensor, and no weight was read before it."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_dist.errors import UserError
from moe_dist.models import load_model
from moe_dist.models.folder import open_weights


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny("qwen3_moe"), tmp_path / "one")


@pytest.fixture
def sharded(tiny, tmp_path):
    return shutil.copytree(tiny("qwen3_moe", shard="20KB"), tmp_path / "many")


def _rewrite(folder, change):
    """Apply `change` to the dictionary of tensors of a single-file folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def _error(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_model(folder)
    return str(caught.value)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def test_a_run_is_no_model_folder_but_has_one_in_it(tmp_path):
    with pytest.raises(UserError, match=r"not a model folder: it has no config.json$"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=rf"It is a run; `moe-dist export {tmp_path} OUT` writes its model"):
        load_model(tmp_path)


def test_missing_shard(sharded):
    lost = sorted(sharded.glob("*.safetensors"))[2]
    lost.unlink()
    assert lost.name in _error(sharded)


@pytest.mark.parametrize("keep", [4, 40, 0.5, 0.999])
def test_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep if keep >= 1 else int(len(data) * keep)])
    message = _error(folder)
    assert "truncated" in message
    assert "model.safetensors" in message


def test_damaged_header(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(bytes(data))
    assert "damaged" in _error(folder)
    file.write_bytes(struct.pack("<Q", 2) + b"{}" + b"left over")
    assert "damaged" in _error(folder)


def test_wrong_shape_of_an_expert_and_of_a_dense_tensor(folder):
    def change(tensors):
        tensors[EXPERT] = tensors[EXPERT].T
        tensors[NORM] = tensors[NORM][:5]

    _rewrite(folder, change)
    message = _error(folder)
    assert f"{EXPERT} is [32, 24], expected [24, 32]" in message
    assert NORM in message


def test_unexpected_tensor(folder):
    _rewrite(folder, lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.ones(2)}))
    assert "model.layers.0.mlp.extra.weight" in _error(folder)


def test_more_experts_than_the_config_says(folder):
    extra = EXPERT.replace(".3.", ".7.")
    _rewrite(folder, lambda tensors: tensors.update({extra: tensors[EXPERT].clone()}))
    assert extra in _error(folder)


def test_missing_expert_is_not_filled_by_its_neighbour(folder):
    _rewrite(folder, lambda tensors: tensors.pop(EXPERT))
    message = _error(folder)
    assert "expert 3 is missing" in message
    assert "model.layers.1.mlp.experts.gate_up_proj" in message


def test_missing_dense_tensor_and_missing_layer(folder):
    _rewrite(folder, lambda tensors: tensors.pop(NORM))
    assert NORM in _error(folder)

    def drop(tensors):
        for name in [name for name in tensors if "layers.1.mlp.experts" in name]:
            del tensors[name]

    _rewrite(folder, drop)
    assert "model.layers.1.mlp.experts.down_proj" in _error(folder)


def test_fused_and_single_experts_together(folder):
    _rewrite(folder, lambda tensors: tensors.update({"model.layers.0.mlp.experts.down_proj": torch.ones(7, 32, 24)}))
    assert "several tensors claim model.layers.0.mlp.experts.down_proj" in _error(folder)


def test_pickles_are_refused_with_the_way_out(folder):
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in _error(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    message = _error(folder)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_the_index_cannot_leave_the_folder(sharded, name):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][NORM] = name
    index.write_text(json.dumps(content))
    assert "not a file name inside the folder" in _error(sharded)


def test_index_and_files_disagree(sharded):
    index = sharded / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    listed = {**good["weight_map"], "ghost": good["weight_map"][NORM]}
    index.write_text(json.dumps({"weight_map": listed}))
    assert "ghost" in _error(sharded)
    listed = dict(good["weight_map"])
    del listed[NORM]
    index.write_text(json.dumps({"weight_map": listed}))
    assert f"{NORM}, but model.safetensors.index.json does not list it" in _error(sharded)
    index.write_text("[]")
    assert "not an index" in _error(sharded)


def test_only_whole_names_are_folders(tmp_path, folder):
    for name in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        assert "no model folder" in _error(name)
    assert "is a file" in _error(folder / "config.json")
    (folder / "config.json").unlink()
    assert "no config.json" in _error(folder)


def test_hub_names_go_to_the_hub(monkeypatch, folder):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    assert load_model("someone/some-model.v1").dtype == torch.float32
    assert asked == ["someone/some-model.v1"]

    def offline(name, **_):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "no network" in _error("someone/some-model.v1")


def test_quantised_and_broken_configs(folder):
    path = folder / "config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, "quantization_config": {"quant_method": "mxfp4"}}))
    assert "mxfp4" in _error(folder)
    path.write_text("{not json")
    assert "not a JSON object" in _error(folder)


def test_rows_of_stacked_tensors(tiny):
    with open_weights(tiny("gpt_oss")) as files:
        key = "model.layers.0.mlp.experts.gate_up_proj"
        whole = files.read(key)
        assert torch.equal(files.read_row(key, 2), whole[2])
