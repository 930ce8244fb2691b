"""N4, N9, N10: what a model becomes by an expert more or less, and what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers

from moe_dist.config.schema import DataSection, Source
from moe_dist.errors import UserError
from moe_dist.methods.nexus.config import NexusConfig, NexusSection
from moe_dist.methods.nexus.domain_file import read_domains
from moe_dist.methods.nexus.domains import embed
from moe_dist.methods.nexus.extend import extend, remove
from moe_dist.methods.nexus.preview import Preview, preview
from moe_dist.methods.nexus.upcycle import upcycle
from moe_dist.models import load_model
from tests.methods.nexus.text import TOKENS, documents, seed_folder, tokenizer, write_text
from tests.methods.nexus.tiny import DENSE, dense_folder
from tests.models.compare import file_tensors, same_bits

OLD = ("code", "prose", "sums")


def _config(files, names, folder, **nexus) -> NexusConfig:
    data = DataSection([Source(path=files[name], name=name) for name in names], seq_len=16, cache_dir=str(folder))
    return NexusConfig(data, NexusSection(seed=str(folder / "seed"), **nexus))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(family, router)`: a folder with seed, experts, the upcycled model, and domain files old and new."""
    done: dict = {}

    def get(family: str = "llama", router: str = "prototype"):
        folder = tmp_path_factory.mktemp(f"{family}-{router}") if (family, router) not in done else None
        if folder is None:
            return done[family, router]
        files = write_text(folder)
        seed_folder(family, folder / "seed")
        for number, name in enumerate((*OLD, "new"), start=1):
            dense_folder(family, folder / name, seed=number, vocab_size=TOKENS)
        embed(_config(files, OLD, folder)).write(folder / "old.safetensors")
        same = {"same_space_as": str(folder / "old.safetensors")}
        embed(_config(files, ("new",), folder, **same)).write(folder / "new.safetensors")
        experts = {name: str(folder / name) for name in OLD}
        method = {"method": "linear"} if router == "linear" else {"router": router}
        upcycle(
            _config(files, (), folder, experts=experts, domains=str(folder / "old.safetensors"), **method),
            folder / "model",
        )
        done[family, router] = (folder, files)
        return done[family, router]

    return get


def _extension(folder, files=None, names=(), **nexus) -> NexusConfig:
    section = {
        "model": str(folder / "model"),
        "experts": {"new": str(folder / "new")},
        "domains": str(folder / "new.safetensors"),
    }
    return _config(files, names, folder, **{**section, **nexus})


@pytest.mark.parametrize("family", DENSE)
def test_n4_every_tensor_after_an_extension(made, tmp_path, family):
    folder, _ = made(family)
    receipt = extend(_extension(folder), tmp_path / "out")
    model, new, found = (file_tensors(place) for place in (folder / "model", folder / "new", tmp_path / "out"))
    domain = read_domains(folder / "new.safetensors")
    assert sorted(receipt.tensors) == sorted(found)
    expected = {}
    for key, tensor in model.items():
        if key.endswith("domain_embeddings"):
            row = domain.prototypes_LNH[int(key.split(".")[2]), 0]
            expected[key] = torch.cat([tensor, row[None]])
        elif ".mlp." in key:
            expected[key] = tensor
        else:
            merged = 0.75 * tensor.double() + 0.25 * new[key].double()
            assert torch.allclose(found[key].double(), merged, rtol=1e-6, atol=1e-8), key
            expected[key] = found[key]
    for key, tensor in new.items():
        if ".mlp." in key:
            expected[key.replace(".mlp.", ".mlp.experts.3.")] = tensor
    same_bits(found, expected)
    extended = load_model(tmp_path / "out")
    assert extended.config.expert_names == [*OLD, "new"]
    assert extended.config.num_experts == 4
    assert all(check.error <= 1e-6 for check in receipt.checks)
    assert "measured: the experts that stay" in receipt.render()


def test_n4_merging_with_an_equal_model_changes_nothing(made, tmp_path):
    folder, _ = made()
    place = shutil.copytree(folder, tmp_path / "copy")
    model = file_tensors(place / "model")
    # A dense model whose other tensors are those of the Nexus model.
    from safetensors.torch import load_file, save_file

    new = load_file(place / "new" / "model.safetensors")
    save_file({key: model.get(key, tensor) for key, tensor in new.items()}, place / "new" / "model.safetensors")
    extend(_extension(place), tmp_path / "out")
    extend(_extension(place, merge=1.0), tmp_path / "whole")
    for out in ("out", "whole"):
        found = file_tensors(tmp_path / out)
        assert all(torch.equal(found[key], model[key]) for key in model if not key.endswith("domain_embeddings"))


@pytest.mark.parametrize("router", ["prototype", "paper", "linear"])
def test_n1_n9_old_experts_route_as_before_and_removal_restores_the_layers(made, tmp_path, router):
    folder, _ = made(router=router)
    extend(_extension(folder, merge=0.0), tmp_path / "out")
    before, after = load_model(folder / "model"), load_model(tmp_path / "out")
    x = torch.randn(40, 32)
    for old, new in zip(before.model.layers, after.model.layers, strict=True):
        with torch.no_grad():
            assert torch.equal(new.mlp.gate.rows()[:3], old.mlp.gate.rows())
            logits, longer = old.mlp.gate(x)[0], new.mlp.gate(x)[0]
        assert (longer[:, :3] - logits).abs().max() < 1e-6
        kept = longer.argmax(1) != 3
        assert torch.equal(longer.argmax(1)[kept], logits.argmax(1)[kept])
    remove(tmp_path / "out", "new", tmp_path / "back")
    same_bits(file_tensors(tmp_path / "back"), file_tensors(folder / "model"))
    with torch.no_grad():
        again = load_model(tmp_path / "back")
        for old, new in zip(before.model.layers, again.model.layers, strict=True):
            assert torch.equal(new.mlp(x), old.mlp(x))
    assert again.config.expert_names == list(OLD)
    # An expert from the middle: later ones move up.
    remove(tmp_path / "out", "prose", tmp_path / "fewer")
    found, whole = file_tensors(tmp_path / "fewer"), file_tensors(tmp_path / "out")
    for name in ("gate_proj", "up_proj", "down_proj"):
        for new, old in enumerate((0, 2, 3)):
            key = f"model.layers.1.mlp.experts.{{}}.{name}.weight"
            assert torch.equal(found[key.format(new)], whole[key.format(old)])
    rows = "model.layers.1.mlp.gate." + ("weight" if router == "linear" else "domain_embeddings")
    assert torch.equal(found[rows], whole[rows][[0, 2, 3]])


def test_forms_of_a_linear_router_s_new_row(made, tmp_path):
    folder, _ = made(router="linear")
    old = file_tensors(folder / "model")
    rows = "model.layers.0.mlp.gate.weight"
    found = {}
    for form in ("reset", "append", "centroid"):
        extend(_extension(folder, linear_extend=form), tmp_path / form)
        found[form] = file_tensors(tmp_path / form)[rows]
        assert found[form].shape == (4, 32)
        assert torch.equal(found[form][:3], old[rows]) == (form != "reset")
    domain = read_domains(folder / "new.safetensors")
    centroid = domain.prototypes_LNH[0, 0] + domain.inputs.mean_LH[0]
    assert torch.cosine_similarity(found["centroid"][3], centroid, dim=0) > 0.999999
    assert found["centroid"][3].norm().item() == pytest.approx(old[rows].norm(dim=1).mean().item(), rel=1e-5)
    assert not torch.equal(found["append"][3], found["centroid"][3])


def test_a_paper_router_s_new_row_can_be_as_long_as_the_old_ones(made, tmp_path):
    folder, _ = made(router="paper")
    config = _extension(folder, renorm_new=True)
    extend(config, tmp_path / "out")
    extend(_extension(folder), tmp_path / "plain")
    for new, plain in zip(*(load_model(tmp_path / name).model.layers for name in ("out", "plain")), strict=True):
        with torch.no_grad():
            rows, short = new.mlp.gate.rows(), plain.mlp.gate.rows()
        assert torch.equal(rows[:3], short[:3])
        assert rows[3].norm().item() == pytest.approx(rows[:3].norm(dim=1).mean().item(), rel=1e-5)
        assert torch.cosine_similarity(rows[3], short[3], dim=0) > 0.999999
    assert preview(tmp_path / "out", config).norm_ratio == pytest.approx([1.0, 1.0], rel=1e-5)
    assert load_model(tmp_path / "out").config.renormalised == [3]
    remove(tmp_path / "out", "code", tmp_path / "fewer")
    assert load_model(tmp_path / "fewer").config.renormalised == [2]
    with pytest.raises(UserError, match="is for the paper router"):
        extend(_extension(made()[0], renorm_new=True), tmp_path / "other")


def test_experts_one_by_one_get_equal_weight(made, tmp_path):
    """φ_moe is the mean of three; two more with λ = 1/4 and then 1/5 leave 1/5 to each."""
    folder, files = made()
    dense_folder("llama", tmp_path / "last", seed=9, vocab_size=TOKENS)
    extend(_extension(folder), tmp_path / "four")
    same = {"same_space_as": str(folder / "old.safetensors")}
    config = _config({**files, "last": files["new"]}, ("last",), folder, **same)
    embed(config).write(tmp_path / "last.safetensors")
    changes = {"model": str(tmp_path / "four"), "experts": {"last": str(tmp_path / "last")}}
    extend(_extension(folder, domains=str(tmp_path / "last.safetensors"), **changes), tmp_path / "five")
    models = [file_tensors(place) for place in (*(folder / name for name in (*OLD, "new")), tmp_path / "last")]
    key = "model.layers.0.self_attn.q_proj.weight"
    expected = torch.stack([tensors[key].double() for tensors in models]).mean(0)
    assert torch.allclose(file_tensors(tmp_path / "five")[key].double(), expected, atol=1e-7)


def test_preview_says_what_the_new_expert_gets(made, tmp_path):
    folder, files = made()
    config = _extension(folder, files, ("new", "code"))
    tokenizer().save_pretrained(folder / "model")
    extend(config, tmp_path / "out")
    seen = preview(tmp_path / "out", config)
    model = load_model(tmp_path / "out")
    rows = model.model.layers[1].mlp.gate.rows()
    assert seen.name == "new"
    assert seen.norm_ratio[1] == pytest.approx((rows[3].norm() / rows[:3].norm(dim=1).mean()).item(), rel=1e-5)
    assert seen.norm_ratio == pytest.approx([1.0, 1.0], rel=1e-5)
    cosines = [torch.cosine_similarity(rows[3], row, dim=0).item() for row in rows[:3]]
    assert seen.cosine[1] == pytest.approx(max(cosines), abs=1e-5)
    assert set(seen.shares) == {"new", "code"}
    assert sum(seen.shares["new"]) > sum(seen.shares["code"])
    assert "share of new (its own domain)" in seen.render()
    assert seen.warning is None
    assert "not known" in preview(tmp_path / "out", _extension(folder)).render()


def test_shares_are_counts_of_tokens(made, tmp_path):
    folder, files = made()
    config = _extension(folder, files, ("new", "sums"))
    tokenizer().save_pretrained(folder / "model")
    extend(config, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    encode = tokenizer()
    for domain, shares in preview(tmp_path / "out", config).shares.items():
        chosen: list = [[], []]
        hooks = [
            layer.mlp.gate.register_forward_hook(lambda _, __, out, ids=ids: ids.append(out[2]))
            for layer, ids in zip(model.model.layers, chosen, strict=True)
        ]
        for text in documents(domain):
            with torch.no_grad():
                model(torch.tensor([[*encode(text)["input_ids"], encode.eos_token_id][:16]]))
        for hook in hooks:
            hook.remove()
        counted = [(torch.cat(ids) == 3).double().mean().item() for ids in chosen]
        assert shares == pytest.approx(counted, abs=1e-9)
        assert sum(shares) > 0 or domain == "sums"


def test_an_expert_that_will_get_nothing_is_warned_of():
    assert Preview("new", [1.0], [0.1], {"new": [0.02, 0.01], "old": [0.0, 0.0]}).warning is None
    starved = Preview("new", [0.3], [0.8], {"new": [0.004, 0.0], "old": [0.5, 0.5]})
    assert "new gets 0.20% of its own domain's tokens" in starved.render()
    assert "moe.balance_coef above 0" in starved.render()


def test_what_cannot_be_extended(made, tmp_path):
    folder, files = made()
    dense_folder("mistral", tmp_path / "mistral", vocab_size=TOKENS)
    dense_folder("llama", tmp_path / "narrow", vocab_size=TOKENS, dtype=torch.bfloat16)
    dense_folder("llama", tmp_path / "wider", vocab_size=TOKENS, intermediate_size=56)
    embed(_config(files, ("code", "new"), folder)).write(tmp_path / "elsewhere.safetensors")
    seed_folder("llama", tmp_path / "seed", seed=7)
    other = _config(files, ("code", "new"), folder)
    other.nexus.seed = str(tmp_path / "seed")
    embed(other).write(tmp_path / "other.safetensors")
    for said, nexus in (
        ("nexus.model is not set", {"model": None}),
        ("not a Nexus model", {"model": str(folder / "new")}),
        ("name the one new expert", {"experts": {}}),
        ("has an expert code already", {"experts": {"code": str(folder / "new")}}),
        ("it is a mistral, not a llama", {"experts": {"new": str(tmp_path / "mistral")}}),
        ("is bfloat16", {"experts": {"new": str(tmp_path / "narrow")}}),
        ("different configurations: intermediate_size", {"experts": {"new": str(tmp_path / "wider")}}),
        ("nexus.domains is not set", {"domains": None}),
        ("has no domain new", {"domains": str(folder / "old.safetensors")}),
        ("a centre", {"domains": str(tmp_path / "elsewhere.safetensors")}),
        ("another embedder", {"domains": str(tmp_path / "other.safetensors")}),
    ):
        with pytest.raises(UserError, match=said):
            extend(_extension(folder, **nexus), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    # A linear router remembers no space; what cannot be a row of it is refused all the same.
    linear, _ = made(router="linear")
    seed_folder("llama", tmp_path / "wide", hidden_size=64)
    other.nexus.seed = str(tmp_path / "wide")
    embed(other).write(tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"has prototypes \[2, 2, 64\], but the model has 2 layers of 32 dimensions"):
        extend(_extension(linear, linear_extend="centroid", domains=str(tmp_path / "wide.safetensors")), tmp_path / "o")
    assert not (tmp_path / "o").exists()
    with pytest.raises(UserError, match="has no expert 'law'; it has code, prose, sums"):
        remove(folder / "model", "law", tmp_path / "out")
