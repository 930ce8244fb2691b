"""One LoRA expert merged into its base, as PEFT does it; and adapters that cannot be used."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from moe_dist.errors import UserError
from moe_dist.methods.self_moe.composition.merge import merge_adapter
from moe_dist.models.adapter import open_lora
from moe_dist.models.folder import open_weights
from tests.methods.nexus.tiny import dense_folder
from tests.models.tiny import batch
from tests.reference import relative_error


def make_adapter(base, folder, **config):
    """An adapter that PEFT itself has made and saved, with values in B."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": "all-linear", **config}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@pytest.mark.parametrize("family", ["llama", "gemma", "olmo2"])
def test_a_merged_expert_gives_the_logits_of_base_and_adapter(tmp_path, family):
    base = dense_folder(family, tmp_path / "base")
    wrapped = make_adapter(base, tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_error(merged(batch()).logits, wrapped(batch()).logits) < 1e-5
    before, after = open_weights(base), open_weights(tmp_path / "merged")
    changed = {key for key in before.tensors if not torch.equal(before.read(key), after.read(key))}
    assert changed == {f"{target}.weight" for target in open_lora(tmp_path / "adapter").targets}


def test_bfloat16_weights_are_the_float32_sum_rounded_once(tmp_path):
    base = dense_folder("llama", tmp_path / "base", dtype=torch.bfloat16)
    make_adapter(base, tmp_path / "adapter", target_modules=["up_proj"])
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    adapter, before, after = open_lora(tmp_path / "adapter"), open_weights(base), open_weights(tmp_path / "merged")
    for target in adapter.targets:
        a, b = adapter.pair(target)
        wanted = before.read(f"{target}.weight").float() + adapter.scale * (b @ a)
        assert torch.equal(after.read(f"{target}.weight"), wanted.bfloat16())


def test_an_adapter_that_is_not_plain_lora_or_does_not_fit_leaves_nothing(tmp_path):
    base = dense_folder("llama", tmp_path / "base")
    small = dense_folder("llama", tmp_path / "small", intermediate_size=24)
    make_adapter(base, tmp_path / "adapter")

    def changed(name, **fields):
        shutil.copytree(tmp_path / "adapter", tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        return tmp_path / name

    cases = [
        (changed("dora", use_dora=True), base, "use_dora is True"),
        (changed("rs", use_rslora=True), base, "use_rslora is True"),
        (changed("bias", bias="all"), base, "bias is 'all'"),
        (changed("pissa", init_lora_weights="pissa"), base, "init_lora_weights is 'pissa'"),
        (changed("kind", peft_type="IA3"), base, "only LORA"),
        (changed("rank", r=3), base, "not of rank 3"),
        (tmp_path / "adapter", small, "is for a weight"),
        (tmp_path / "base", base, "no LoRA adapter of PEFT"),
    ]
    for adapter, model, message in cases:
        with pytest.raises(UserError, match=message):
            merge_adapter(model, adapter, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
    torn = shutil.copytree(tmp_path / "adapter", tmp_path / "torn")
    (torn / "adapter_model.safetensors").write_bytes((torn / "adapter_model.safetensors").read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated"):
        open_lora(torn)
