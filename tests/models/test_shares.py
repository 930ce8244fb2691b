"""What each rank of any layout loads and initialises: its part of the one model, to the bit, and no more."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_dist.errors import UserError
from moe_dist.models import init_model, load_model
from moe_dist.models.folder import WeightFiles
from moe_dist.models.stages import stage_layers
from moe_dist.parallel.grid import Grid, layout
from moe_dist.parallel.shard import shard_of
from tests.models.tiny import CONFIGS, make_folder

LAYOUT = {"pipeline": 2, "tensor": 2}
CASES = [("mixtral", {"tie_word_embeddings": True}), ("deepseek_v2", {}), ("qwen3_moe", {"num_hidden_layers": 3})]


def _ranks() -> list[Grid]:
    return [layout(4, rank, **LAYOUT) for rank in range(4)]


def _check(build) -> None:
    """build(grid) is a rank's model; all ranks' together are the model of one process, names and values."""
    whole = dict(build(Grid.single()).named_parameters(remove_duplicate=False))
    seen = set()
    for grid in _ranks():
        model = build(grid)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shard = shard_of(parameter)
            assert torch.equal(parameter, whole[name] if shard is None else shard.cut(whole[name])), name
            assert parameter.untyped_storage().nbytes() == parameter.nbytes, f"{name} keeps the whole tensor alive"
            assert hasattr(parameter, "is_expert") == hasattr(whole[name], "is_expert"), name
            seen.add(name)
        assert not any(buffer.is_meta for buffer in model.buffers())
    assert seen == whole.keys()


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_initialising(family, changes):
    config = {"model_type": family, **CONFIGS[family], **changes}
    _check(lambda grid: init_model(config, grid, seed=5))


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_loading(monkeypatch, tmp_path, family, changes):
    folder = make_folder(family, tmp_path, **changes)
    read, original = [], WeightFiles.read
    monkeypatch.setattr(WeightFiles, "read", lambda files, key: (read.append(key), original(files, key))[1])
    _check(lambda grid: load_model(folder, grid))
    whole = load_model(folder)
    for grid in _ranks():
        read.clear()
        load_model(folder, grid)
        layers = {int(key.split(".")[2]) for key in read if key.startswith("model.layers.")}
        assert layers == set(stage_layers(whole, 2)[grid.pipeline_rank])
        ends = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} & set(read)
        head = "model.embed_tokens.weight" if changes.get("tie_word_embeddings") else "lm_head.weight"
        assert ends == ({"model.embed_tokens.weight"} if grid.is_first_stage else {head, "model.norm.weight"})


def test_every_stage_sees_the_whole_folder(tmp_path):
    make_folder("mixtral", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, file)
    for grid in _ranks():
        with pytest.raises(UserError, match=r"lacks tensors.*model.layers.1.self_attn.q_proj.weight"):
            load_model(tmp_path, grid)


def test_both_ends_of_a_tie_in_one_folder(tmp_path):
    make_folder("mixtral", tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, file)
    _check(lambda grid: load_model(tmp_path, grid))
    save_file({**tensors, "lm_head.weight": embedding + 1}, file)
    for grid in _ranks():
        with pytest.raises(UserError, match=r"ties lm_head.weight and model.embed_tokens.weight.*different values"):
            load_model(tmp_path, grid)
    del tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding}, file)
    _check(lambda grid: load_model(tmp_path, grid))
