"""MiXSE folders: what is in them, what they refuse, and what loads."""

from __future__ import annotations

import json
import os
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moe_dist.checkpoint import fingerprint
from moe_dist.errors import UserError
from moe_dist.models import export_model, init_model, load_model
from moe_dist.models.folder import describe_file
from moe_dist.models.mixse import given_alpha, write_mixse_folder
from moe_dist.models.mixse.install import mixse_layers
from moe_dist.parallel.grid import Grid
from tests.models.mixse.tiny import FAMILIES, SKILLS, adapter, base_model, mixture
from tests.models.tiny import batch, make_folder
from tests.reference import relative_error

ROUTER = "router.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `base`, an adapter for each skill, and the `mixse` folder of them."""
    folder = tmp_path_factory.mktemp("llama")
    mixture("llama", folder, bias=True, top_k=2, seed=7)
    return folder


def experts(made, *names):
    return {name: made / name for name in names or SKILLS}


def test_what_is_in_a_folder(made):
    """The base's files are the base's, linked and not copied; the experts are PEFT's; no pickle, no code."""
    folder = made / "mixse"
    for file in (made / "base").iterdir():
        if file.name != "config.json":
            assert os.path.samefile(file, folder / file.name)
    config, before = (json.loads((place / "config.json").read_text()) for place in (folder, made / "base"))
    assert config.pop("mixse") == {
        "experts": list(SKILLS),
        "ranks": [4, 4, 2],
        "scales": [2.0, 2.0, 2.0],
        "targets": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "router_input": "block_input",
        "top_k": 2,
        "bias": True,
        "routing": "learned",
        "seed": 7,
    }
    assert config == before
    for skill in SKILLS:
        for file in ADAPTER:
            assert (folder / "mixse" / skill / file).read_bytes() == (made / skill / file).read_bytes()
    router = load_file(folder / "mixse" / ROUTER)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in router.items()} == {
        "weight": ((3, 32), torch.float32),
        "bias": ((3,), torch.float32),
    }
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} == {".json", ".safetensors"}


def test_a_file_system_without_links_gets_copies(made, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    folder = write_mixse_folder(made / "base", experts(made), tmp_path / "out", bias=True, top_k=2, seed=7)
    for file in (made / "mixse").rglob("*"):
        if file.is_file():
            assert (folder / file.relative_to(made / "mixse")).read_bytes() == file.read_bytes()
            assert not os.path.samefile(folder / file.relative_to(made / "mixse"), file)


def test_experts_with_different_layers_are_zero_where_they_have_none(made, tmp_path):
    small = adapter(made / "base", tmp_path / "small", seed=9, rank=3, targets=["q_proj", "down_proj"])
    given = {"small": small, "code": made / "code"}
    model = load_model(write_mixse_folder(made / "base", given, tmp_path / "out"))
    layers = dict(mixse_layers(model))
    assert len(layers) == 14
    assert not layers["model.layers.0.mlp.up_proj"].experts_a[:3].any()
    ids, base = batch(), transformers.AutoModelForCausalLM.from_pretrained(made / "base")
    alone = peft.PeftModel.from_pretrained(base, small)
    with torch.no_grad(), given_alpha(model, [1.0, 0.0]):
        assert relative_error(model(ids).logits, alone(ids).logits) < 2e-6
    # What is exported again are the tensors that the expert has.
    with torch.no_grad():
        for layer in layers.values():
            layer.experts_b.mul_(2)
    again = export_model(model, tmp_path / "again", grid=Grid.single())
    before, after = load_file(small / ADAPTER[1]), load_file(again / "mixse" / "small" / ADAPTER[1])
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key] * (2 if "lora_B" in key else 1)) for key in before)


def test_a_base_in_several_files_and_bfloat16(tmp_path):
    base = tmp_path / "base"
    base_model("gemma", dtype=torch.bfloat16).save_pretrained(base, max_shard_size="10KB")
    adapter(base, tmp_path / "code")
    folder = write_mixse_folder(base, {"code": tmp_path / "code"}, tmp_path / "out")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = load_model(folder)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "router" not in name} == {torch.bfloat16}
    assert model.mixse_router.weight.dtype == torch.float32
    ids = batch()
    with torch.no_grad(), given_alpha(model, [1.0]):
        half = model(ids).logits.float()
        whole = load_model(folder, dtype="float32")
        with given_alpha(whole, [1.0]):
            assert relative_error(half, whole(ids).logits) < 0.05


BAD = {
    "no lora": (lambda f: _config(f, peft_type="IA3"), "peft_type is 'IA3'"),
    "dora": (lambda f: _config(f, use_dora=True), "use_dora is True"),
    "other scales": (lambda f: _config(f, alpha_pattern={"q_proj": 4}), "alpha_pattern"),
    "another rank": (lambda f: _config(f, r=5), "not of rank 5"),
    "no config": (lambda f: (f / ADAPTER[0]).unlink(), "no adapter_config.json"),
    "no weights": (lambda f: (f / ADAPTER[1]).unlink(), "no adapter_model.safetensors"),
    "half a pair": (lambda f: _tensors(f, lambda key, t: None if "1.mlp.up_proj.lora_B" in key else t), "is missing"),
    "more than lora": (
        lambda f: _tensors(f, lambda key, t: t, extra={"base_model.model.lm_head.weight": torch.zeros(2, 2)}),
        "lm_head.weight is no tensor of a plain LoRA",
    ),
    "another base": (
        lambda f: _tensors(f, lambda key, t: torch.zeros(4, 31) if "0.self_attn.q_proj.lora_A" in key else t),
        r"layers.0.self_attn.q_proj is for a weight \[32, 31\], but this model's is \[32, 32\]",
    ),
    "no such layer": (
        lambda f: _tensors(f, lambda key, t: t, rename=lambda key: key.replace("layers.1.", "layers.5.")),
        "layers.5.mlp.down_proj is no linear layer",
    ),
    "cut short": (lambda f: os.truncate(f / ADAPTER[1], 900), "truncated"),
}


def _config(folder, **changes):
    path = folder / ADAPTER[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _tensors(folder, change, *, extra=None, rename=lambda key: key):
    found = load_file(folder / ADAPTER[1])
    kept = {rename(key): made for key, tensor in found.items() if (made := change(key, tensor)) is not None}
    save_file({**kept, **(extra or {})}, folder / ADAPTER[1])


@pytest.mark.parametrize("what", BAD)
def test_an_adapter_that_does_not_fit_is_named(made, tmp_path, what):
    spoil, says = BAD[what]
    bad = shutil.copytree(made / "maths", tmp_path / "spoilt")
    spoil(bad)
    with pytest.raises(UserError, match=says) as caught:
        write_mixse_folder(made / "base", {"code": made / "code", "maths": bad}, tmp_path / "out")
    assert "spoilt" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_head_is_not_mixed(made, tmp_path):
    """The mixture is of the blocks' layers: with block_input there is no α for what comes after them. PEFT stores the
    whole head beside such an adapter."""
    bad = adapter(made / "base", tmp_path / "head", targets=["q_proj", "lm_head"])
    with pytest.raises(UserError, match=r"lm_head.* is no tensor of a plain LoRA"):
        write_mixse_folder(made / "base", {"head": bad}, tmp_path / "out")


def test_what_an_adapter_was_trained_on_counts(made, tmp_path):
    """The manifest that our own exports write names the base by fingerprint."""
    known = shutil.copytree(made / "code", tmp_path / "code")
    files = {name: describe_file(known / name) for name in ADAPTER}
    base = {"model": "runs/base", "fingerprint": fingerprint(made / "base")}
    (known / "adapter_manifest.json").write_text(json.dumps({"format": 1, "base": base, "files": files}))
    with pytest.raises(UserError, match="give base_fingerprint"):
        write_mixse_folder(made / "base", {"code": known}, tmp_path / "out")
    other = tmp_path / "other"
    base_model("llama", seed=5).save_pretrained(other)
    with pytest.raises(UserError, match="made for another base model"):
        write_mixse_folder(other, {"code": known}, tmp_path / "out", base_fingerprint=fingerprint(other))
    out = write_mixse_folder(made / "base", {"code": known}, tmp_path / "out", base_fingerprint=base["fingerprint"])
    # Trained further, it keeps its manifest, which then says what the files are now.
    model = load_model(out)
    with torch.no_grad():
        for _, layer in mixse_layers(model):
            layer.experts_a.add_(1)
    again = load_model(export_model(model, tmp_path / "again", grid=Grid.single()))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"top_k": 4}, "top_k=4; expected 1 to 3"),
        ({"router_input": "layer_input"}, "choose one of block_input, base_last_hidden"),
        ({"routing": "top"}, "choose one of learned, uniform, random"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_values_that_no_mixture_has(made, tmp_path, values, says):
    with pytest.raises(UserError, match=says):
        write_mixse_folder(made / "base", experts(made), tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_bases_that_cannot_be_mixed(made, tmp_path):
    with pytest.raises(UserError, match="is a mixture itself"):
        write_mixse_folder(made / "mixse", experts(made), tmp_path / "out")
    with pytest.raises(UserError, match="no experts"):
        write_mixse_folder(made / "base", {}, tmp_path / "out")
    with pytest.raises(UserError, match="is no name of an expert"):
        write_mixse_folder(made / "base", {"../code": made / "code"}, tmp_path / "out")
    with pytest.raises(UserError, match="routed experts of its own"):
        write_mixse_folder(make_folder("mixtral", tmp_path / "moe"), experts(made), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        write_mixse_folder(made / "base", experts(made), tmp_path / "full")
    values = json.loads((made / "mixse" / "config.json").read_text())["mixse"]
    with pytest.raises(UserError, match="composed from trained ones"):
        init_model({"model_type": "llama", **FAMILIES["llama"], "mixse": values})


def _spec(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["mixse"] |= changes
    path.write_text(json.dumps(values))


DAMAGE = {
    "an expert is gone": (lambda f: shutil.rmtree(f / "mixse" / "maths"), "maths is no LoRA adapter"),
    "the router is gone": (lambda f: (f / "mixse" / ROUTER).unlink(), "router.safetensors is missing"),
    "a router for more": (
        lambda f: save_file({"weight": torch.zeros(4, 32), "bias": torch.zeros(4)}, f / "mixse" / ROUTER),
        "this mixture's router is",
    ),
    "another rank": (lambda f: _spec(f, ranks=[4, 4, 4]), "has rank 2 and scale 2.0; config.json says 4"),
    "another scale": (lambda f: _spec(f, scales=[2.0, 1.0, 2.0]), "says 4 and 1.0"),
    "a layer too many": (lambda f: _spec(f, targets=["q_proj", "gate"]), "no linear layer called gate"),
    "a layer too few": (lambda f: _spec(f, targets=["q_proj"]), "is no linear layer of this model"),
    "a strange key": (lambda f: _spec(f, temperature=2), "expected an object with some of the keys"),
    "no list": (lambda f: _spec(f, experts="code"), "expected a list"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_refused(made, tmp_path, what):
    spoil, says = DAMAGE[what]
    folder = shutil.copytree(made / "mixse", tmp_path / "copy")
    spoil(folder)
    with pytest.raises(UserError, match=says):
        load_model(folder)
