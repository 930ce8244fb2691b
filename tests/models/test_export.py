"""Export: the folder that comes out holds the bits that went in, whatever the layout on disk."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import transformers

from moe_dist.errors import UserError
from moe_dist.models import export_model, load_model, moe_layers
from moe_dist.models import shards as shards_module
from moe_dist.parallel.grid import build_grid
from tests.models.compare import file_tensors, same_bits
from tests.models.tiny import CONFIGS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_load_export_changes_no_bit(tiny, tmp_path, family, dtype):
    folder = tiny(family, dtype=dtype)
    out = export_model(load_model(folder), tmp_path / "out")
    same_bits(file_tensors(out), file_tensors(folder))
    first = transformers.AutoModelForCausalLM.from_pretrained(folder)
    second = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(first) is type(second)
    same_bits(dict(second.state_dict()), dict(first.state_dict()))
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((place / name).read_text()) for place in (folder, out))
        assert before == after
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in folder.iterdir())
    assert not list(tmp_path.glob(".*"))


def test_square_experts_keep_their_orientation(tiny, tmp_path):
    for family, key in (("gpt_oss", "intermediate_size"), ("qwen3_moe", "moe_intermediate_size")):
        folder = tiny(family, **{key: 32})
        same_bits(file_tensors(export_model(load_model(folder), tmp_path / family)), file_tensors(folder))


def _export_from_ranks(folder, out, expert):
    grid = build_grid(expert=expert)
    trainable = {"model.layers.0.mlp.experts": [1]}
    export_model(load_model(folder, grid, trainable=trainable), out, shard_bytes=20_000)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("expert", [1, 2])
def test_ranks_write_the_very_same_files(ranks, tiny, tmp_path, family, expert):
    folder = tiny(family)
    alone = export_model(load_model(folder), tmp_path / "alone", shard_bytes=20_000)
    ranks(2, _export_from_ranks, folder, tmp_path / "together", expert)
    names = sorted(file.name for file in alone.iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) > 3
    assert names == sorted(file.name for file in (tmp_path / "together").iterdir())
    for name in names:
        assert (alone / name).read_bytes() == (tmp_path / "together" / name).read_bytes(), name


def _export_from_axes(folder, out, sizes):
    grid = build_grid(**sizes)
    export_model(load_model(folder, grid), out, grid=grid, shard_bytes=20_000)


AXES = [
    ("mixtral", {"tensor": 2}, {"num_local_experts": 6}),
    ("qwen3_moe", {"pipeline": 2}, {"tie_word_embeddings": True}),
    ("deepseek_v3", {"pipeline": 2, "tensor": 2, "expert": 2}, {}),
    ("qwen2_moe", {"tensor": 2, "expert": 4, "sequence": 2}, {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "sizes", "changes"), AXES, ids=[family for family, *_ in AXES])
def test_stages_and_parts_write_the_very_same_files(ranks, tiny, tmp_path, family, sizes, changes, dtype):
    folder = tiny(family, dtype=dtype, **changes)
    alone = export_model(load_model(folder), tmp_path / "alone", shard_bytes=20_000)
    world = 2 if math.prod(sizes.values()) == 2 else 4
    ranks(world, _export_from_axes, folder, tmp_path / "together", sizes)
    names = sorted(file.name for file in alone.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "together").iterdir())
    for name in names:
        assert (alone / name).read_bytes() == (tmp_path / "together" / name).read_bytes(), name


def test_trained_values_are_exported_and_load_again(tiny, tmp_path):
    model = load_model(tiny("gpt_oss"))
    with torch.no_grad():
        for _, layer in moe_layers(model):
            for _, parameter, _ in layer.expert_parameters():
                parameter.add_(torch.randn_like(parameter))
        model.lm_head.weight.mul_(2)
    again = load_model(export_model(model, tmp_path / "out"))
    same_bits(again.state_dict(), model.state_dict())


def test_tied_weights_are_written_once(tiny, tmp_path):
    folder = tiny("qwen3_moe", tie_word_embeddings=True)
    out = export_model(load_model(folder), tmp_path / "out")
    same_bits(file_tensors(out), file_tensors(folder))
    assert "lm_head.weight" not in file_tensors(out)


def test_a_fused_folder_stays_fused(tiny, tmp_path):
    """transformers can also save the stacked tensors as it has them in memory, and reads them back."""
    stock = transformers.AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe"))
    stock.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = file_tensors(tmp_path / "fused")
    assert fused["model.layers.0.mlp.experts.gate_up_proj"].shape == (7, 48, 32)
    out = export_model(load_model(tmp_path / "fused"), tmp_path / "out")
    same_bits(file_tensors(out), fused)


def test_tokenizer_files_come_along(tiny, tmp_path):
    folder = shutil.copytree(tiny("olmoe"), tmp_path / "with")
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"):
        (folder / name).write_text(name)
    (folder / "notes.py").write_text("not a tokenizer file")
    out = export_model(load_model(folder), tmp_path / "out")
    assert (out / "tokenizer.json").read_text() == "tokenizer.json"
    assert (out / "chat_template.jinja").exists()
    assert not (out / "notes.py").exists()


def test_a_provider_gives_whole_tensors(tiny, tmp_path):
    """An engine that partitions parameters hands them out whole, one at a time, each once."""
    folder = tiny("qwen2_moe")
    model = load_model(folder)
    stored = {}
    for parameter in model.parameters():
        stored[id(parameter)] = parameter.data
        parameter.data = torch.empty(0)
    asked = []

    def full_tensor(parameter):
        asked.append(id(parameter))
        return stored[id(parameter)]

    out = export_model(model, tmp_path / "out", full_tensor=full_tensor)
    same_bits(file_tensors(out), file_tensors(folder))
    assert sorted(asked) == sorted(stored)


def test_refuses_a_folder_that_holds_something(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    model = load_model(tiny("olmoe"))
    export_model(model, tmp_path / "out")
    with pytest.raises(UserError, match="not empty"):
        export_model(model, tmp_path / "out")
    with pytest.raises(UserError, match="no MoE layer"):
        export_model(transformers.AutoModelForCausalLM.from_pretrained(tiny("olmoe")), tmp_path / "other")


def _export_to_a_full_disk(folder, out):
    grid = build_grid(expert=2)
    model = load_model(folder, grid)
    write, calls = shards_module.ShardSet.write, []

    def full(self, key, tensor, *, row=None):
        calls.append(key)
        if grid.rank == 1 and len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write(self, key, tensor, row=row)

    shards_module.ShardSet.write = full
    try:
        with pytest.raises(UserError, match="No space left on device"):
            export_model(model, out)
    finally:
        shards_module.ShardSet.write = write


def test_a_full_disk_on_one_rank_stops_all_and_leaves_nothing(ranks, tiny, tmp_path):
    ranks(2, _export_to_a_full_disk, tiny("qwen3_moe"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
