"""N10: embeddings are means over documents, deterministic, centred, and know which space they belong to."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moe_dist.errors import UserError
from moe_dist.methods.nexus.config import NexusConfig, NexusSection
from moe_dist.methods.nexus.domain_file import join, read_domains
from moe_dist.methods.nexus.domains import embed, ridge
from moe_dist.methods.nexus.report import render_domains
from tests.methods.nexus.text import documents, seed_folder, tokenizer, write_text
from tests.reference import relative_error

LENGTH = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    seed_folder("llama", folder / "seed")
    return folder, write_text(folder)


def _config(place, names=("code", "prose", "sums"), **nexus) -> NexusConfig:
    from moe_dist.config.schema import DataSection, Source

    folder, files = place
    sources = [Source(path=files[name], name=name) for name in names]
    data = DataSection(train=sources, seq_len=LENGTH, cache_dir=str(folder / "cache"))
    return NexusConfig(data, NexusSection(**{"seed": str(folder / "seed"), **nexus}))


def _plain(folder, domain: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean last hidden state, mean MLP inputs and mean MLP input length over a domain's documents."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "seed").double()
    encode = transformers.AutoTokenizer.from_pretrained(folder / "seed")
    seen: list = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    last, inputs, lengths = [], [], []
    for text in documents(domain):
        ids = torch.tensor([[*encode(text)["input_ids"], encode.eos_token_id][:LENGTH]])
        seen.clear()
        with torch.no_grad():
            last.append(model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0))
        inputs.append(torch.stack([x.mean(0) for x in seen]))
        lengths.append(torch.stack([x.norm(dim=1).mean() for x in seen]))
    return tuple(torch.stack(values).mean(0) for values in (last, inputs, lengths))


def test_embeddings_and_prototypes_are_centred_means_over_documents(place):
    found = embed(_config(place))
    plain = {name: _plain(place[0], name) for name in found.names}
    last = torch.stack([plain[name][0] for name in found.names])
    inputs = torch.stack([plain[name][1] for name in found.names], dim=1)
    assert relative_error(found.centre_M, last.mean(0)) < 2e-6
    assert relative_error(found.embeddings_NM, last - last.mean(0)) < 2e-5
    assert relative_error(found.inputs.mean_LH, inputs.mean(1)) < 2e-6
    assert relative_error(found.prototypes_LNH, inputs - inputs.mean(1, keepdim=True)) < 2e-5
    assert relative_error(found.inputs.length_L, torch.stack([p[2] for p in plain.values()]).mean(0)) < 2e-6
    assert found.documents == dict.fromkeys(found.names, 12)
    assert found.embeddings_NM.sum(0).abs().max() < 1e-5
    assert embed(_config(place, documents=5)).documents["code"] == 5


def test_the_same_again_and_back_from_the_file(place, tmp_path):
    first, second = embed(_config(place)), embed(_config(place))
    for name, domains in (("a", first), ("b", second)):
        domains.write(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    back = read_domains(tmp_path / "a.safetensors")
    assert back.names == ("code", "prose", "sums")
    assert back.documents == first.documents
    assert torch.equal(back.prototypes_LNH, first.prototypes_LNH)
    assert back.space == first.space
    assert back.embedder.startswith("seed:sampled:")
    assert "code" in render_domains(back)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_new_domain_in_the_old_space(place, tmp_path):
    old = embed(_config(place))
    old.write(tmp_path / "old.safetensors")
    new = embed(_config(place, names=("new",), same_space_as=str(tmp_path / "old.safetensors")))
    last, inputs, _ = _plain(place[0], "new")
    assert relative_error(new.embeddings_NM[0], last - old.centre_M) < 2e-5
    assert relative_error(new.prototypes_LNH[:, 0], inputs - old.inputs.mean_LH) < 2e-5
    both = join(old, new, where="new")
    assert both.names == ("code", "prose", "sums", "new")
    assert torch.equal(both.embeddings_NM[:3], old.embeddings_NM)
    assert torch.equal(both.prototypes_LNH[:, :3], old.prototypes_LNH)
    with pytest.raises(UserError, match="already there"):
        join(old, old, where="new")
    with pytest.raises(UserError, match="a centre"):
        join(old, embed(_config(place, names=("code", "new"))), where="new")


def test_another_embedder_is_refused(place, tmp_path):
    embed(_config(place)).write(tmp_path / "old.safetensors")
    seed_folder("llama", tmp_path / "other", seed=5)
    changed = {"same_space_as": str(tmp_path / "old.safetensors"), "seed": str(tmp_path / "other")}
    with pytest.raises(UserError, match="another embedder"):
        embed(_config(place, names=("new",), **changed))


def _sentence_model(folder):
    config = transformers.BertConfig(
        vocab_size=320, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_sentence_embedder_is_mapped_to_router_space(place, tmp_path):
    embedder = str(_sentence_model(tmp_path / "sentence"))
    found = embed(_config(place, embedder=embedder))
    assert found.dim == 24
    assert found.embedder.startswith("sentence:sampled:")
    assert found.inputs.to_router_LHM.shape == (2, 32, 24)
    expected = torch.einsum("lhm,nm->lnh", found.inputs.to_router_LHM, found.embeddings_NM)
    assert relative_error(found.prototypes_LNH, expected) < 1e-5
    measured = embed(_config(place)).prototypes_LNH
    cosine = torch.nn.functional.cosine_similarity(found.prototypes_LNH, measured, dim=-1)
    assert cosine.min() > 0.5
    # One document by hand.
    encode = transformers.AutoTokenizer.from_pretrained(embedder)
    model = transformers.AutoModel.from_pretrained(embedder).eval()
    vectors = []
    for text in documents("sums"):
        inputs = encode(text, return_tensors="pt", truncation=True, max_length=40)
        vectors.append(torch.nn.functional.normalize(model(**inputs).last_hidden_state[0].mean(0), dim=0).detach())
    mean = torch.stack(vectors).mean(0)
    assert relative_error(found.embeddings_NM[2] + found.centre_M, mean) < 2e-6
    # A new domain needs the embedder alone: no seed model is read.
    found.write(tmp_path / "old.safetensors")
    options = {"embedder": embedder, "same_space_as": str(tmp_path / "old.safetensors"), "seed": "/nowhere"}
    new = embed(_config(place, names=("new",), **options))
    assert new.prototypes_LNH.shape == (2, 1, 32)


def test_ridge_against_the_normal_equations():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, dtype=torch.float64, generator=generator)
    y = torch.randn(30, 2, 5, dtype=torch.float64, generator=generator)
    found = ridge(x, y)
    strength = 0.1 * x.square().sum() / 6
    # Rows √λ·I below the data: the least-squares solution of the longer system is the ridge's.
    longer = torch.cat([x, strength.sqrt() * torch.eye(6, dtype=torch.float64)])
    target = torch.cat([y.flatten(1), torch.zeros(6, 10, dtype=torch.float64)])
    expected = torch.linalg.lstsq(longer, target).solution.T.reshape(2, 5, 6)
    assert relative_error(found, expected) < 1e-12


def test_given_vectors(place, tmp_path):
    vectors = {name: torch.randn(3, 7) for name in ("code", "prose", "sums")}
    vectors["new"] = torch.randn(7)
    save_file(vectors, tmp_path / "v.safetensors", metadata={"embedder": "mine-v1"})
    options = {"embedder": str(tmp_path / "v.safetensors")}
    found = embed(_config(place, **options))
    means = torch.stack([vectors[name].mean(0) for name in found.names])
    assert relative_error(found.embeddings_NM, means - means.mean(0)) < 1e-6
    assert found.embedder == "given:mine-v1"
    assert found.prototypes_LNH is None
    found.write(tmp_path / "old.safetensors")
    new = embed(_config(place, names=("new",), same_space_as=str(tmp_path / "old.safetensors"), **options))
    assert relative_error(new.embeddings_NM[0], vectors["new"] - means.mean(0)) < 1e-6
    with pytest.raises(UserError, match="another embedder"):
        embed(_config(place, names=("new",), same_space_as=str(tmp_path / "old.safetensors")))


def test_wrong_input(place, tmp_path):
    embed(_config(place)).write(tmp_path / "ok.safetensors")
    save_file(load_file(tmp_path / "ok.safetensors"), tmp_path / "bare.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "ok.safetensors").read_bytes()[:-5])
    save_file({"code": torch.ones(2)}, tmp_path / "vectors.safetensors")
    seed_folder("llama", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mixtral"}')
    for said, call in (
        ("no such file", lambda: read_domains(tmp_path / "none")),
        ("not a domain file", lambda: read_domains(tmp_path / "bare.safetensors")),
        ("damaged domain file", lambda: read_domains(tmp_path / "cut.safetensors")),
        ("at least two domains", lambda: embed(_config(place, names=("code",)))),
        ("no vectors for prose", lambda: embed(_config(place, embedder=str(tmp_path / "vectors.safetensors")))),
        ("no sentence-embedding model", lambda: embed(_config(place, embedder=str(place[0])))),
        ("mixtral; dense families", lambda: embed(_config(place, seed=str(tmp_path / "other")))),
    ):
        with pytest.raises(UserError, match=said):
            call()
