"""One expert out of a mixture: as PEFT reads it, and merged."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers

from moe_dist.checkpoint import fingerprint
from moe_dist.cli.main import main
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.composition.compose import compose
from moe_dist.methods.self_moe.composition.config import ComposeConfig, ComposeSection
from moe_dist.methods.self_moe.composition.export import export_expert
from moe_dist.models import load_model
from moe_dist.models.mixse import given_alpha
from tests.models.mixse.tiny import SKILLS, adapter, base_model
from tests.models.tiny import batch
from tests.reference import relative_error


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `base`, an adapter for each skill, and `mixture`."""
    root = tmp_path_factory.mktemp("export")
    base_model("qwen2").save_pretrained(root / "base")
    experts = {name: str(adapter(root / "base", root / name, seed=i)) for i, name in enumerate(SKILLS)}
    compose(ComposeConfig(ComposeSection(base=str(root / "base"), experts=experts)), root / "mixture")
    return root


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(batch()).logits


def alone(place, name: str) -> torch.Tensor:
    model = load_model(place / "mixture")
    with given_alpha(model, [float(skill == name) for skill in SKILLS]):
        return logits(model)


@pytest.mark.parametrize("name", SKILLS)
def test_both_forms_are_the_expert_alone(place, tmp_path, name):
    export_expert(place / "mixture", name, tmp_path / "adapter", form="peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    with_peft = logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    export_expert(place / "mixture", name, tmp_path / "merged", form="merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_error(alone(place, name), with_peft) < 1e-5
    assert relative_error(logits(merged), with_peft) < 1e-5
    assert "mixse" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not (tmp_path / "merged" / "mixse").exists()


def test_an_expert_of_ours_knows_its_base_again_in_the_mixture(place, tmp_path):
    """Experts with a manifest name their base by fingerprint: that of the mixture without its experts."""
    assert fingerprint(place / "mixture", experts=False) == fingerprint(place / "base")
    assert fingerprint(place / "mixture") != fingerprint(place / "base")
    joint = ComposeSection(base=str(place / "base"), method="joint", skills=["a", "b"])
    compose(ComposeConfig(joint), tmp_path / "joint")
    export_expert(tmp_path / "joint", "a", tmp_path / "merged", form="merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(transformers.AutoModelForCausalLM.from_pretrained(place / "base")))


def test_refusals_leave_nothing(place, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    cases = [
        ((place / "mixture", "poetry", tmp_path / "out"), "no expert 'poetry'; it has code, maths, prose"),
        ((place / "base", "code", tmp_path / "out"), "is no mixture"),
        ((place / "mixture", "code", tmp_path / "taken"), "not empty"),
    ]
    for form in ("peft", "merged"):
        for arguments, message in cases:
            with pytest.raises(UserError, match=message):
                export_expert(*arguments, form=form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_the_verb(place, tmp_path, capsys):
    words = ["self-moe", "export", str(place / "mixture"), str(tmp_path / "out")]
    assert main([*words, "--expert", "code", "--form", "merged"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert main([*words, "--expert", "nobody"]) == 2
    assert "no expert 'nobody'" in capsys.readouterr().err
