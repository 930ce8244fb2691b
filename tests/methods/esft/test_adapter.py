"""Adapters: the official files, the way back to the base, merging, and what is refused (acceptance check E7)."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moe_dist.config.expert_files import ExpertConfig, read_expert_config, write_expert_config
from moe_dist.errors import UserError
from moe_dist.methods.esft.adapter_folder import MANIFEST
from moe_dist.methods.esft.adapter_load import load_adapter, swap_adapter, unload_adapter
from moe_dist.methods.esft.adapter_save import save_adapter
from moe_dist.methods.esft.merge import merge_adapters
from moe_dist.models import export_model, load_model
from moe_dist.parallel.grid import build_grid
from tests.methods.esft.adapters import logits, snapshot, trained
from tests.models.compare import file_tensors, same_bits
from tests.models.tiny import CONFIGS

EXPERTS = {1: [2, 0]}
LAST = {"mixtral": 4, "qwen2_moe": 5, "qwen3_moe": 6, "olmoe": 7, "deepseek_v2": 7, "deepseek_v3": 7, "gpt_oss": 3}

ON_DISK = {  # what an expert's tensors are called, after "model.layers.1."
    "mixtral": [f"block_sparse_moe.experts.{{}}.{name}.weight" for name in ("w1", "w2", "w3")],
    "gpt_oss": [f"mlp.experts.{{}}.{name}_proj{end}" for name in ("gate_up", "down") for end in ("", "_bias")],
}
OFTEN = [f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")]


def plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_there_and_back_to_the_bit(tiny, tmp_path, family, dtype):
    folder = tiny(family, dtype=dtype)
    ids = [0, LAST[family]]
    model = trained(folder, {1: ids})
    adapter = save_adapter(model, tmp_path / "adapter")

    held = load_file(adapter / "model.safetensors")
    names = ON_DISK.get(family, OFTEN)
    assert set(held) == {f"model.layers.1.{name.format(e)}" for name in names for e in ids}
    assert {tensor.dtype for tensor in held.values()} == {dtype}
    size = (adapter / "model.safetensors").stat().st_size
    with (adapter / "model.safetensors").open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    _, span = next((n, m.trainable) for n, m in model.named_modules() if getattr(m, "trainable", None) is not None)
    assert size == 8 + header + sum(p.numel() * dtype.itemsize for p in span.parameters())
    assert read_expert_config(adapter / "expert_cfg.json").experts == {"1": ids}
    assert (adapter / "config.json").read_bytes() == (folder / "config.json").read_bytes()

    # On our model, and on transformers' own against what transformers makes of the exported trained model.
    ours, theirs = load_model(folder), plain(folder)
    exported = export_model(model, tmp_path / "exported")
    for base, want in ((ours, logits(model)), (theirs, logits(plain(exported)))):
        before, weights = logits(base), snapshot(base)
        load_adapter(base, adapter)
        assert torch.equal(logits(base), want)
        assert not torch.equal(want, before)
        unload_adapter(base, adapter)
        assert torch.equal(logits(base), before)
        same_bits(snapshot(base), weights)

    merged = merge_adapters([adapter], tmp_path / "merged", base=folder)
    same_bits(file_tensors(merged), file_tensors(exported))
    assert sorted(f.name for f in merged.iterdir()) == sorted(f.name for f in folder.iterdir())
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            assert (merged / file.name).read_bytes() == file.read_bytes()
    changed = {k for k, v in file_tensors(merged).items() if not torch.equal(v, file_tensors(folder)[k])}
    stacked = {name.replace(".{}", "") for name in names} if family == "gpt_oss" else None
    assert changed == ({f"model.layers.1.{name}" for name in stacked} if stacked else set(held))


def test_two_adapters_in_any_order(tiny, tmp_path):
    folder = tiny("qwen3_moe")
    a = save_adapter(trained(folder, {0: [1, 5], 1: [2]}), tmp_path / "a")
    b = save_adapter(trained(folder, {0: [0], 1: [6]}, seed=2), tmp_path / "b")
    both = save_adapter(trained(folder, {0: [1, 3], 1: [6]}, seed=3), tmp_path / "both")
    model = plain(folder)
    before, weights = logits(model), snapshot(model)
    load_adapter(model, a)
    with_a = logits(model)
    load_adapter(model, b)
    with_both = logits(model)
    merge_adapters([a, b], tmp_path / "merged", base=folder)
    assert torch.equal(with_both, logits(plain(tmp_path / "merged")))
    unload_adapter(model, a)  # not the last one loaded
    unload_adapter(model, b)
    assert torch.equal(logits(model), before)
    same_bits(snapshot(model), weights)

    load_adapter(model, b)
    swap_adapter(model, b, a)
    assert torch.equal(logits(model), with_a)
    loaded = snapshot(model)
    with pytest.raises(UserError, match="loaded already"):
        load_adapter(model, a)
    with pytest.raises(UserError, match="both hold layer 0 expert 1, and"):
        load_adapter(model, both)
    with pytest.raises(UserError, match="is not loaded"):
        swap_adapter(model, b, both)
    same_bits(snapshot(model), loaded)

    # The last one wins, and gives back what it has covered.
    load_adapter(model, both, overlap="last")
    merge_adapters([a, both], tmp_path / "last", base=folder, overlap="last")
    assert torch.equal(logits(model), logits(plain(tmp_path / "last")))
    load_adapter(model, b, overlap="last")  # shares layer 1 expert 6 with the second
    unload_adapter(model, both)
    assert torch.equal(logits(model), with_both)
    unload_adapter(model, b)
    unload_adapter(model, a)
    same_bits(snapshot(model), weights)
    with pytest.raises(UserError, match="both hold layer 0 expert 1, and"):
        merge_adapters([a, both], tmp_path / "never", base=folder)
    assert not list(tmp_path.glob("*never*"))
    with pytest.raises(UserError, match="overlap='mean'"):
        load_adapter(model, a, overlap="mean")


def _save_and_load_on_ranks(folder, adapter, out, expert):
    grid = build_grid(expert=expert)
    save_adapter(trained(folder, {0: [1, 5], 1: [2]}, grid=grid), out)
    model = load_model(folder, grid)
    before, weights = logits(model), snapshot(model)
    load_adapter(model, adapter)
    with_adapter = logits(model)
    unload_adapter(model, adapter)
    same_bits(snapshot(model), weights)
    return before, with_adapter


@pytest.mark.parametrize("expert", [1, 2])
def test_ranks_write_the_same_files_and_load_their_share(ranks, tiny, tmp_path, expert):
    folder = tiny("qwen3_moe")
    alone = trained(folder, {0: [1, 5], 1: [2]})
    adapter = save_adapter(alone, tmp_path / "alone")
    results = ranks(2, _save_and_load_on_ranks, folder, adapter, tmp_path / "together", expert)
    for file in adapter.iterdir():
        assert file.read_bytes() == (tmp_path / "together" / file.name).read_bytes()
    assert not list(tmp_path.glob(".*"))
    for before, with_adapter in results:
        assert torch.equal(before, logits(load_model(folder)))
        assert torch.equal(with_adapter, logits(alone))


def test_the_base_may_lie_in_another_layout(tiny, tmp_path):
    """Sharded, or stacked as transformers has it in memory: the adapter is the same, and merging keeps the layout."""
    adapter = save_adapter(trained(tiny("qwen3_moe"), EXPERTS), tmp_path / "adapter")
    (adapter / MANIFEST).unlink()  # another layout is another fingerprint
    want = logits(plain(merge_adapters([adapter], tmp_path / "merged", base=tiny("qwen3_moe"))))
    model = plain(tiny("qwen3_moe"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    for name in ("sharded", "fused"):
        out = merge_adapters([adapter], tmp_path / f"{name}-merged", base=tmp_path / name)
        assert torch.equal(logits(plain(out)), want)
        assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in (tmp_path / name).iterdir())
        again = save_adapter(trained(tmp_path / name, EXPERTS), tmp_path / f"{name}-adapter")
        same_bits(file_tensors(again), file_tensors(adapter))


def test_other_groups_of_parameters(tiny, tmp_path):
    """Shared experts, and everything but experts, where the expert config says so; a family that renames them."""
    for family, flags in (("deepseek_v2", (True, False)), ("mixtral", (False, True))):
        folder = tiny(family)
        model = trained(folder, EXPERTS)
        for name, parameter in model.named_parameters():
            if (".shared_experts." in name and flags[0]) or (".mlp.gate." in name and flags[1]):
                parameter.requires_grad_(True).data += 0.1
        adapter = save_adapter(model, tmp_path / family)
        config = read_expert_config(adapter / "expert_cfg.json")
        assert (config.shared_experts, config.non_expert_modules) == flags
        part = ".shared_experts." if flags[0] else ".block_sparse_moe.gate."
        assert any(part in key for key in file_tensors(adapter))
        base = load_model(folder)
        weights = snapshot(base)
        load_adapter(base, adapter)
        assert torch.equal(logits(base), logits(model))
        unload_adapter(base, adapter)
        same_bits(snapshot(base), weights)
        export_model(model, tmp_path / f"{family}-exported")
        merge_adapters([adapter], tmp_path / f"{family}-merged", base=folder)
        same_bits(file_tensors(tmp_path / f"{family}-merged"), file_tensors(tmp_path / f"{family}-exported"))
        write_expert_config(adapter / "expert_cfg.json", ExpertConfig(config.experts))
        (adapter / MANIFEST).unlink()
        with pytest.raises(UserError, match=r"is there, but expert_cfg\.json has"):
            load_adapter(base, adapter)


def test_an_adapter_of_the_official_code(tiny, tmp_path, capsys):
    """No manifest, which is said in one line; keys of old adapters lack "model."."""
    folder = tiny("deepseek_v2")
    model = trained(folder, EXPERTS)
    adapter = save_adapter(model, tmp_path / "adapter")
    (adapter / MANIFEST).unlink()
    held = load_file(adapter / "model.safetensors")
    old = {key.removeprefix("model."): tensor for key, tensor in held.items()}
    save_file(old, adapter / "model.safetensors")
    base = load_model(folder)
    capsys.readouterr()
    load_adapter(base, adapter)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no manifest, so names and shapes are checked but not the base model" in said
    assert torch.equal(logits(base), logits(model))

    some = next(iter(held))
    bad = {
        "is there twice": {**held, next(iter(old)): held[some].clone()},
        f"{some} is missing": {key: tensor for key, tensor in held.items() if key != some},
        "expert that expert_cfg.json does not name": {
            **held,
            some.replace("experts.0", "experts.5"): held[some].clone(),
        },
        "lm_heat.weight is unknown": {**held, "lm_heat.weight": torch.ones(2)},
        "expected \\[24, 32\\]": {key: tensor[:-1].contiguous() for key, tensor in held.items()},
        "expected floating point": {key: tensor.int() for key, tensor in held.items()},
    }
    for message, tensors in bad.items():
        save_file(tensors, adapter / "model.safetensors")
        untouched = load_model(folder)
        weights = snapshot(untouched)
        with pytest.raises(UserError, match=message):
            load_adapter(untouched, adapter)
        same_bits(snapshot(untouched), weights)
    save_file(held, adapter / "model.safetensors")
    for experts, message in (({"0": [1]}, "layer 0 has no experts"), ({"1": [0, 99]}, r"no experts \[99\]")):
        write_expert_config(adapter / "expert_cfg.json", ExpertConfig(experts))
        with pytest.raises(UserError, match=message):
            load_adapter(load_model(folder), adapter)
    write_expert_config(adapter / "expert_cfg.json", ExpertConfig({"1": [0, 2]}, shared_experts=True))
    with pytest.raises(UserError, match="shared_experts: true, but there is no tensor"):
        load_adapter(load_model(folder), adapter)


def test_another_base_is_refused(tiny, tmp_path):
    folder = tiny("olmoe")
    adapter = save_adapter(trained(folder, EXPERTS), tmp_path / "adapter")
    other = plain(folder)
    other.lm_head.weight.data[3, 4] += 1
    other.save_pretrained(tmp_path / "other")
    for load in (plain, load_model):
        model = load(tmp_path / "other")
        weights = snapshot(model)
        with pytest.raises(UserError, match="made for another base model"):
            load_adapter(model, adapter)
        same_bits(snapshot(model), weights)
    with pytest.raises(UserError, match="made for another base model"):
        merge_adapters([adapter], tmp_path / "merged", base=tmp_path / "other")
    assert not list(tmp_path.glob("*merged*"))
    # A copy under another name is the same model; a model that nobody loaded from a folder says nothing.
    load_adapter(load_model(shutil.copytree(folder, tmp_path / "copy")), adapter)
    nameless = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**_config(folder)))
    with pytest.raises(UserError, match=r"cannot be told.*base="):
        load_adapter(nameless, adapter)
    load_adapter(nameless, adapter, base=folder)


def _config(folder):
    return json.loads((folder / "config.json").read_text())


def test_damage_is_found_before_anything_is_used(tiny, tmp_path):
    folder = tiny("olmoe")
    whole = save_adapter(trained(folder, EXPERTS), tmp_path / "whole")
    weights, manifest = whole / "model.safetensors", json.loads((whole / MANIFEST).read_text())
    data = bytearray(weights.read_bytes())
    cut, flipped = bytes(data[:-100]), bytes(data[:-100]) + bytes([data[-100] ^ 1]) + bytes(data[-99:])
    cases = {
        "damaged: size or sha256": lambda a: (a / weights.name).write_bytes(cut),
        "model.safetensors is damaged: size or": lambda a: (a / weights.name).write_bytes(flipped),
        "model.safetensors is missing": lambda a: (a / weights.name).unlink(),
        "truncated": lambda a: [(a / weights.name).write_bytes(cut), (a / MANIFEST).unlink()],
        "no expert_cfg.json": lambda a: (a / "expert_cfg.json").unlink(),
        "no valid JSON": lambda a: (a / MANIFEST).write_text("{"),
        "format 7": lambda a: (a / MANIFEST).write_text(json.dumps({**manifest, "format": 7})),
        "base: 1 has to be an object": lambda a: (a / MANIFEST).write_text(json.dumps({**manifest, "base": 1})),
        "is not in adapter_manifest": lambda a: shutil.copy(a / weights.name, a / "model-2.safetensors"),
    }
    model = plain(folder)
    before = snapshot(model)
    for message, spoil in cases.items():
        adapter = tmp_path / "spoilt"
        shutil.rmtree(adapter, ignore_errors=True)
        shutil.copytree(whole, adapter)
        spoil(adapter)
        with pytest.raises(UserError, match=message):
            load_adapter(model, adapter)
        with pytest.raises(UserError, match=message):
            merge_adapters([adapter], tmp_path / "merged", base=folder)
    same_bits(snapshot(model), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spoilt", "whole"]


def test_nothing_is_written_over(tiny, tmp_path):
    folder = tiny("olmoe")
    model = trained(folder, EXPERTS)
    adapter = save_adapter(model, tmp_path / "adapter")
    for write in (
        lambda: save_adapter(model, adapter),
        lambda: merge_adapters([adapter], adapter, base=folder),
    ):
        with pytest.raises(UserError, match="not empty"):
            write()
    with pytest.raises(UserError, match="no experts of ours"):
        save_adapter(plain(folder), tmp_path / "other")
    frozen = trained(folder, {})
    with pytest.raises(UserError, match="nothing to write"):
        save_adapter(frozen, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
