"""Composing: mixtures and merges from the same experts, their receipts, and what does not belong together."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from moe_dist.checkpoint import fingerprint
from moe_dist.cli.main import main
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.composition.compose import compose
from moe_dist.methods.self_moe.composition.config import MIXTURES, load_config
from moe_dist.models import load_model
from moe_dist.models.adapter import open_lora
from moe_dist.models.folder import open_weights
from tests.models.mixse.tiny import SKILLS, adapter, base_model
from tests.models.tiny import batch
from tests.reference import relative_error


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(base folder, {skill: adapter folder})."""
    root = tmp_path_factory.mktemp("parts")
    base_model("llama").save_pretrained(root / "base")
    return root / "base", {name: adapter(root / "base", root / name, seed=i) for i, name in enumerate(SKILLS)}


def configured(tmp_path, base, experts, **fields):
    tree = {"base": str(base), "experts": {name: str(folder) for name, folder in experts.items()}, **fields}
    (tmp_path / "compose.yaml").write_text(json.dumps({"compose": tree}))
    return load_config(tmp_path / "compose.yaml")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(batch()).logits


def change(folder, target: str) -> torch.Tensor:
    """ΔW of an expert in float64."""
    expert = open_lora(folder)
    with expert.files:
        a, b = (part.double() for part in expert.pair(target))
    return expert.scale * (b @ a)


def merged_change(folder, base, target: str) -> torch.Tensor:
    after, before = (open_weights(path).read(f"{target}.weight").double() for path in (folder, base))
    return after - before


@pytest.mark.parametrize("method", [name for name in MIXTURES if name != "joint"])
def test_a_mixture_loads_and_its_receipt_says_what_is_in_it(tmp_path, parts, method):
    base, experts = parts
    receipt = compose(configured(tmp_path, base, experts, method=method), tmp_path / "out")
    model = load_model(tmp_path / "out", dense=True)
    assert model.mixse.spec.experts == SKILLS
    assert relative_error(logits(model), logits(load_model(base, dense=True))) > 1e-3
    saved = json.loads((tmp_path / "out" / "compose_receipt.json").read_text())
    assert saved == receipt.to_dict()
    assert saved["base"]["fingerprint"] == fingerprint(base)
    assert [expert["fingerprint"] for expert in saved["experts"]] == [
        fingerprint(folder) for folder in experts.values()
    ]
    counted = sum(tensor.numel() for tensor in load_file(experts["code"] / "adapter_model.safetensors").values())
    assert saved["experts"][0]["parameters"] == counted
    assert f"{counted:,} parameters" in receipt.render()


def test_uniform_is_the_mean_of_all_experts(tmp_path, parts):
    base, experts = parts
    compose(configured(tmp_path, base, experts, method="uniform"), tmp_path / "uniform")
    compose(configured(tmp_path, base, experts, method="dare", density=1.0), tmp_path / "mean")
    mean = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mean")
    assert relative_error(logits(load_model(tmp_path / "uniform", dense=True)), logits(mean)) < 1e-5


def test_m10_instance_is_its_one_expert(tmp_path, parts):
    base, experts = parts
    compose(configured(tmp_path, base, {"all": experts["code"]}, method="instance"), tmp_path / "out")
    target = open_lora(experts["code"]).targets[0]
    assert relative_error(merged_change(tmp_path / "out", base, target), change(experts["code"], target)) < 1e-5


def test_m10_ties_of_identical_experts_at_density_one_is_that_expert(tmp_path, parts):
    base, experts = parts
    same = dict.fromkeys(SKILLS, experts["prose"])
    compose(configured(tmp_path, base, same, method="ties", density=1.0), tmp_path / "out")
    for target in open_lora(experts["prose"]).targets:
        assert relative_error(merged_change(tmp_path / "out", base, target), change(experts["prose"], target)) < 1e-5


def test_m10_ties_trims_elects_and_averages(tmp_path, parts):
    base, experts = parts
    compose(configured(tmp_path, base, experts, method="ties", density=0.4), tmp_path / "out")
    for target in open_lora(experts["code"]).targets[:3]:
        changes = [change(folder, target) for folder in experts.values()]
        kept = []
        for delta in changes:
            least = delta.abs().flatten().sort(descending=True).values[int(0.4 * delta.numel()) - 1]
            kept.append(torch.where(delta.abs() >= least, delta, 0.0))
        stacked = torch.stack(kept)
        sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
        agree = (stacked.sign() == sign) & (stacked != 0)
        wanted = (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
        assert relative_error(merged_change(tmp_path / "out", base, target), wanted) < 1e-5


def test_m10_dare_drops_at_random_and_scales_up(tmp_path, parts):
    base, experts = parts
    one = {"code": experts["code"]}
    compose(configured(tmp_path, base, one, method="dare", density=0.3, seed=5), tmp_path / "out")
    compose(configured(tmp_path, base, one, method="dare", density=0.3, seed=5), tmp_path / "again")
    compose(configured(tmp_path, base, one, method="dare", density=0.3, seed=6), tmp_path / "other")
    kept = total = 0
    for target in open_lora(experts["code"]).targets:
        full, found = change(experts["code"], target), merged_change(tmp_path / "out", base, target)
        here = found.abs() > 1e-6
        assert relative_error(found[here], full[here] / 0.3) < 1e-4
        kept, total = kept + here.sum().item(), total + here.numel()
        assert torch.equal(found, merged_change(tmp_path / "again", base, target))
        assert not torch.equal(found, merged_change(tmp_path / "other", base, target))
    assert abs(kept / total - 0.3) < 0.02


def test_joint_begins_with_experts_that_change_nothing(tmp_path, parts):
    base, _ = parts
    receipt = compose(configured(tmp_path, base, {}, method="joint", skills=["a", "b"], top_k=2), tmp_path / "out")
    model = load_model(tmp_path / "out", dense=True)
    assert torch.equal(logits(model), logits(load_model(base, dense=True)))
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.experts_a[:8].std() > 0
    assert not torch.equal(layer.experts_a[:8], layer.experts_a[8:])
    assert [expert["rank"] for expert in receipt.experts] == [8, 8]


def test_what_does_not_belong_together_is_refused_and_leaves_nothing(tmp_path, parts):
    base, experts = parts
    base_model("llama", intermediate_size=40).save_pretrained(tmp_path / "small")
    cases = [
        ({"base": tmp_path / "small"}, "is for a weight"),
        ({"base": tmp_path / "absent"}, "no such folder"),
        ({"experts": {"code": tmp_path / "absent"}}, "no such folder"),
        ({"experts": {"code": base}}, "no LoRA adapter"),
        ({"experts": {}}, "compose.experts is empty"),
        ({"experts": {"a/b": experts["code"]}}, "no name of an expert"),
        ({"top_k": 4}, "top_k=4"),
        ({"method": "instance"}, "takes the one expert"),
        ({"method": "joint"}, "begins with new experts"),
        ({"method": "mixse", "density": 0.5}, "merges nothing"),
        ({"method": "mixse", "skills": ["a"]}, "is for method joint"),
        ({"method": "joint", "experts": {}, "skills": ["a", "a"]}, "a skill twice"),
    ]
    for fields, message in cases:
        given = {"base": base, "experts": experts, **fields}
        with pytest.raises(UserError, match=message):
            compose(configured(tmp_path, given.pop("base"), given.pop("experts"), **given), tmp_path / "out")
        assert not (tmp_path / "out").exists(), message
    assert not list(tmp_path.glob(".building*"))


def test_the_verb_prints_its_receipt(tmp_path, parts, capsys):
    base, experts = parts
    configured(tmp_path, base, experts)
    assert main(["self-moe", "compose", str(tmp_path / "compose.yaml"), str(tmp_path / "out"), "compose.top_k=2"]) == 0
    said = capsys.readouterr().out
    assert "3 expert(s) over" in said
    assert "top 2 of 3" in said
    assert main(["self-moe", "compose", str(tmp_path / "compose.yaml"), str(tmp_path / "out")]) == 2
    assert "already exists" in capsys.readouterr().err
