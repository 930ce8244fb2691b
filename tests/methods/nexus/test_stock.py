"""Export for plain transformers: a stock architecture with equal logits, or our modeling code beside the weights."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers

from moe_dist.errors import UserError
from moe_dist.methods.nexus.stock import export
from moe_dist.models import load_model
from tests.methods.nexus.tiny import DENSE, ROUTERS, nexus_folder
from tests.models.compare import distance, file_tensors, same_bits
from tests.models.tiny import batch

FITTING = ("llama", "mistral", "qwen2")


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch()).logits


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", FITTING)
def test_a_stock_qwen2_moe_has_the_same_logits(tmp_path, family, router):
    folder = nexus_folder(family, tmp_path / "in", router=router)
    receipt = export(folder, tmp_path / "out")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock) is transformers.Qwen2MoeForCausalLM
    assert distance(_logits(stock), _logits(load_model(folder))) < 1e-6
    assert sorted(receipt.tensors) == sorted(file_tensors(tmp_path / "out"))
    assert receipt.checks[1].error < 1e-6
    # And it is a stock family of ours again.
    assert distance(_logits(load_model(tmp_path / "out")), _logits(stock)) < 2e-6


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("llama", {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"use_shared_expert": False, "norm_topk_prob": True, "num_experts_per_tok": 2, "router": "linear"}),
    ],
    ids=["mistral-window", "qwen2-window", "llama-heads", "llama-tied", "no-shared-expert"],
)
def test_what_else_a_model_may_have_comes_along(tmp_path, family, fields):
    folder = nexus_folder(family, tmp_path / "in", **fields)
    export(folder, tmp_path / "out", form="qwen2_moe")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert distance(_logits(stock), _logits(load_model(folder))) < 1e-6


def test_what_does_not_fit_is_refused_with_the_reason(tmp_path):
    for family in DENSE:
        if family not in FITTING:
            folder = nexus_folder(family, tmp_path / family)
            with pytest.raises(UserError, match=f"the blocks of {family} are not Llama's"):
                export(folder, tmp_path / "out", form="qwen2_moe")
    folder = nexus_folder("llama", tmp_path / "biased", attention_bias=True)
    with pytest.raises(UserError, match="attention_bias"):
        export(folder, tmp_path / "out", form="qwen2_moe")
    assert not (tmp_path / "out").exists()


# A process that cannot import this package.
ALONE = """
import sys
sys.modules["moe_dist"] = None
import torch, transformers
folder, out = sys.argv[1:]
transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.load(out + ".ids", weights_only=True)
with torch.no_grad():
    torch.save({"logits": model(ids).logits, "state": model.state_dict()}, out)
print(type(model).__module__)
"""


@pytest.mark.parametrize("family", ["qwen3", "gemma"])
def test_modeling_code_beside_the_weights_needs_nothing_of_ours(tmp_path, family):
    folder = nexus_folder(family, tmp_path / "in")
    export(folder, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").glob("*.py")} == {
        "configuration_nexus.py", "modeling_nexus.py", "router_nexus.py",
    }  # fmt: skip
    same_bits(file_tensors(tmp_path / "out"), file_tensors(folder))
    torch.save(batch(), tmp_path / "result.ids")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "out"), str(tmp_path / "result")],
        capture_output=True, text=True, cwd=tmp_path, timeout=240,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("transformers_modules.")
    result = torch.load(tmp_path / "result", weights_only=True)
    model = load_model(tmp_path / "out")  # runs none of that code
    assert type(model).__module__ == "moe_dist.models.nexus.modeling_nexus"
    assert distance(_logits(model), result["logits"]) < 2e-6
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
