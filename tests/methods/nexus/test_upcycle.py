"""N2, N3: where every tensor of an upcycled model comes from, what it equals, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moe_dist.data.corpora import train_tokenizer
from moe_dist.errors import UserError
from moe_dist.methods.nexus import receipt as receipt_module
from moe_dist.methods.nexus.config import NexusConfig, NexusSection
from moe_dist.methods.nexus.domain_file import Domains, RouterInputs
from moe_dist.methods.nexus.extend import extend
from moe_dist.methods.nexus.parts import mean
from moe_dist.methods.nexus.upcycle import upcycle
from moe_dist.models import export_model, load_model, moe_layers
from tests.methods.nexus.tiny import DENSE, dense_folder
from tests.models.compare import distance, file_tensors, same_bits
from tests.models.tiny import batch

NAMES = ("code", "prose", "sums")
METHODS = ("nexus", "linear", "btx", "sparse_upcycling", "dense_merging")


def _domains(embedder: str = "given:test", names=("sums", "prose", "other", "code"), layers: int = 2) -> Domains:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Domains(
        names,
        dict.fromkeys(names, 5),
        embedder,
        random(len(names), 7),
        random(7),
        random(layers, len(names), 32),
        RouterInputs(random(layers, 32), random(layers).abs() + 4),
    )


def config_of(folder, family: str = "llama", *, dtype=torch.float32, same: bool = False, **nexus) -> NexusConfig:
    """Folders of a seed and three experts, and a domain file; `same`: all four models are equal."""
    for number, name in enumerate(("seed", *NAMES)):
        if not (folder / name).exists():
            dense_folder(family, folder / name, seed=0 if same else number, dtype=dtype)
    _domains().write(folder / "domains.safetensors")
    experts = {} if nexus.get("method") == "sparse_upcycling" else {name: str(folder / name) for name in NAMES}
    section = {"seed": str(folder / "seed"), "experts": experts, "domains": str(folder / "domains.safetensors")}
    return NexusConfig(nexus=NexusSection(**{**section, **nexus}))


def _dense(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(batch()).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", DENSE)
def test_n3_every_tensor_comes_from_where_it_must(tmp_path, family, dtype):
    upcycle(config_of(tmp_path, family, dtype=dtype), tmp_path / "out", shard_bytes=40_000)
    seed, *experts = (file_tensors(tmp_path / name) for name in ("seed", *NAMES))
    domains, found = _domains(), file_tensors(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    expected = {}
    for key, tensor in seed.items():
        path, mlp, rest = key.partition(".mlp.")
        if not mlp:
            stacked = torch.stack([expert[key].float() for expert in experts])
            expected[key] = (stacked.sum(0) / 3).to(dtype)
            continue
        expected[f"{path}.mlp.shared_expert.{rest}"] = tensor
        for number, expert in enumerate(experts):
            expected[f"{path}.mlp.experts.{number}.{rest}"] = expert[key]
    rows = [domains.names.index(name) for name in NAMES]
    for layer in range(2):
        gate = f"model.layers.{layer}.mlp.gate"
        expected[f"{gate}.domain_embeddings"] = domains.prototypes_LNH[layer, rows]
        expected[f"{gate}.input_mean"] = domains.inputs.mean_LH[layer]
        expected[f"{gate}.input_length"] = domains.inputs.length_L[layer : layer + 1]
        expected[f"{gate}.temperature"] = torch.tensor([8.0], dtype=dtype)
        for name in ("w1", "w2"):
            random = found[f"{gate}.{name}"]
            assert random.dtype == dtype
            assert random.float().std() == pytest.approx(0.02, rel=0.1)
            expected[f"{gate}.{name}"] = random
    same_bits(found, expected)
    model = load_model(tmp_path / "out")
    same_bits(file_tensors(export_model(model, tmp_path / "again")), found)
    assert model.config.expert_names == list(NAMES)
    assert model.config.domain_space == domains.space
    assert len(moe_layers(model)) == 2


@pytest.mark.parametrize("family", DENSE)
def test_n2_promises_hold_for_the_whole_model(tmp_path, family):
    """Equal models become the dense one where weights sum to 1; where the seed is shared, with a gate on top."""
    dense = _logits(_dense(dense_folder(family, tmp_path / "seed")))
    for method, tops in (("btx", (1, 2, 3, 4)), ("sparse_upcycling", (1, 2, 4))):
        for top_k in tops:
            out = tmp_path / f"{method}{top_k}"
            upcycle(config_of(tmp_path, family, same=True, method=method, top_k=top_k), out)
            model = load_model(out)
            assert model.config.num_experts == 4
            assert distance(_logits(model), dense) < 1e-6
    upcycle(config_of(tmp_path, family, same=True), tmp_path / "nexus")
    model = load_model(tmp_path / "nexus")
    x = torch.randn(2, 9, 32)
    for ours, theirs in zip(model.model.layers, _dense(tmp_path / "seed").model.layers, strict=True):
        with torch.no_grad():
            gate = ours.mlp.gate(x)[1].view(2, 9, 1)
            assert distance(ours.mlp(x), (1 + gate) * theirs.mlp(x)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_methods_and_their_receipts(tmp_path, method):
    config = config_of(tmp_path, method=method)
    receipt = upcycle(config, tmp_path / "out")
    assert receipt.to_dict() == json.loads((tmp_path / "out" / "nexus_receipt.json").read_text())
    found = file_tensors(tmp_path / "out")
    assert sorted(receipt.tensors) == sorted(found)
    assert all(check.error <= check.bound <= 1e-6 for check in receipt.checks)
    assert len(receipt.checks) == {"dense_merging": 1, "sparse_upcycling": 4}.get(method, 5)
    text = receipt.render()
    assert "measured:" in text
    seed, *experts = (file_tensors(tmp_path / name) for name in ("seed", *NAMES))
    norm = "model.norm.weight"
    everyone = torch.stack([t[norm] for t in (seed, *experts)])
    wanted = {"nexus": everyone[1:].mean(0), "linear": everyone[1:].mean(0), "sparse_upcycling": seed[norm]}
    assert torch.allclose(found[norm], wanted.get(method, everyone.mean(0)), atol=1e-7)
    up = "model.layers.1.mlp.up_proj.weight"
    if method == "dense_merging":
        assert torch.allclose(found[up], torch.stack([t[up] for t in (seed, *experts)]).mean(0), atol=1e-7)
        assert _logits(_dense(tmp_path / "out")).isfinite().all()
        return
    model = load_model(tmp_path / "out")
    routed = {"btx": (seed, *experts), "sparse_upcycling": (seed,) * 4}.get(method, experts)
    for number, source in enumerate(routed):
        assert torch.equal(found[up.replace("mlp.", f"mlp.experts.{number}.")], source[up])
    shared = method in ("nexus", "linear")
    assert model.config.use_shared_expert == shared
    assert model.config.norm_topk_prob != shared
    assert model.config.num_experts_per_tok == (1 if shared else 2)
    assert model.config.router == ("prototype" if method == "nexus" else "linear")
    assert _logits(model).isfinite().all()


def test_paper_routers_rows_begin_as_long_as_a_linear_ones(tmp_path):
    rows = {}
    for name, options in {"paper": {"router": "paper"}, "linear": {"method": "linear"}}.items():
        lengths = []
        for seed in range(4):
            upcycle(config_of(tmp_path, init_seed=seed, **options), tmp_path / f"{name}{seed}")
            model = load_model(tmp_path / f"{name}{seed}")
            lengths += [layer.mlp.gate.rows().norm(dim=1).mean() for layer in model.model.layers]
        rows[name] = torch.stack(lengths).mean().item()
    assert rows["paper"] == pytest.approx(rows["linear"], rel=0.2)


def test_paper_router_takes_the_embeddings(tmp_path):
    upcycle(config_of(tmp_path, router="paper"), tmp_path / "out")
    model = load_model(tmp_path / "out")
    domains = _domains()
    rows = [domains.names.index(name) for name in NAMES]
    for layer in model.model.layers:
        found = layer.mlp.gate.domain_embeddings
        assert torch.allclose(
            found * domains.embeddings_NM[rows].norm(dim=1, keepdim=True), domains.embeddings_NM[rows]
        )
        assert torch.allclose(found.norm(dim=1), torch.ones(3))
        assert layer.mlp.gate.w1.shape == (64, 7)


def test_the_same_command_gives_the_same_bits(tmp_path):
    for name, init_seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle(config_of(tmp_path, init_seed=init_seed), tmp_path / name)
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert first == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert first != (tmp_path / "c" / "model.safetensors").read_bytes()


def test_mean_is_taken_in_float32(monkeypatch):
    from moe_dist.methods.nexus import parts as module

    monkeypatch.setattr(module, "CHUNK", 100)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(13, 29, generator=generator).bfloat16() for _ in range(4)]
    expected = torch.stack([tensor.float() for tensor in tensors]).sum(0) / 4
    assert torch.equal(mean(tensors), expected.bfloat16())
    rounded = tensors[0] + tensors[1] + tensors[2] + tensors[3]
    assert not torch.equal(mean(tensors), rounded / 4)


def test_a_measurement_that_fails_leaves_nothing(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    monkeypatch.setitem(receipt_module.BOUNDS, torch.float32, -1.0)
    with pytest.raises(RuntimeError, match="what was written is wrong"):
        upcycle(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".building*"))


def _change(folder, name: str, **values) -> None:
    path = folder / name / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _rewrite(folder, name: str, change) -> None:
    path = folder / name / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_does_not_fit_together_is_refused_before_anything_is_written(tmp_path):
    pristine = tmp_path / "pristine"
    pristine.mkdir()
    config_of(pristine)
    up, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    faults = {
        "different vocabularies": lambda f: _change(f, "code", vocab_size=97),
        "different configurations: rms_norm_eps": lambda f: _change(f, "prose", rms_norm_eps=1e-3),
        "of different families": lambda f: _change(f, "sums", model_type="mistral"),
        "is a mixtral, not a dense model": lambda f: _change(f, "sums", model_type="mixtral"),
        "mlp_bias": lambda f: _change(f, "seed", mlp_bias=True),
        "lacks model.layers.0.mlp.up_proj": lambda f: _rewrite(f, "code", lambda t: t.pop(up)),
        "alone has strange": lambda f: _rewrite(f, "code", lambda t: t.update(strange=torch.ones(1))),
        "different shapes": lambda f: _rewrite(f, "code", lambda t: t.update({norm: torch.ones(31)})),
        "different dtypes": lambda f: _rewrite(f, "code", lambda t: t.update({norm: t[norm].bfloat16()})),
        "truncated": lambda f: (f / "code" / "model.safetensors").write_bytes(b"\x10" * 100),
        "no config.json": lambda f: (f / "code" / "config.json").unlink(),
        "no domain prose": lambda f: _domains(names=("code", "sums")).write(f / "domains.safetensors"),
        "another seed model": lambda f: _domains("seed:other").write(f / "domains.safetensors"),
        "has prototypes": lambda f: _domains(layers=3).write(f / "domains.safetensors"),
    }
    for number, (said, fault) in enumerate(faults.items()):
        folder = shutil.copytree(pristine, tmp_path / str(number))
        config = config_of(folder)
        fault(folder)
        with pytest.raises(UserError, match=said):
            upcycle(config, folder / "out")
        assert not (folder / "out").exists(), said
        assert not list(folder.glob(".*")), said


def test_as_many_tokens_are_not_the_same_tokens(tmp_path):
    """A tokenizer beside an expert, with the same number of tokens as the seed's, of which two are exchanged."""
    config = config_of(tmp_path)
    train_tokenizer(["one two three"] * 3, vocab_size=270).save_pretrained(tmp_path / "seed")
    shutil.copy(tmp_path / "seed" / "tokenizer.json", tmp_path / "code" / "tokenizer.json")
    upcycle(config, tmp_path / "out")
    tokens = json.loads((tmp_path / "seed" / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "prose" / "tokenizer.json").write_text(json.dumps(tokens))
    said = (
        r"expert prose .* and seed .* different vocabularies: 2 tokens differ, such as \d+, which is '[ab]' and '[ab]'"
    )
    with pytest.raises(UserError, match=said):
        upcycle(config, tmp_path / "other")
    model = {"model": str(tmp_path / "out"), "experts": {"other": str(tmp_path / "prose")}}
    with pytest.raises(UserError, match=r"expert other .* and the model .* different vocabularies: 2 tokens differ"):
        extend(config_of(tmp_path, **model), tmp_path / "other")
    (tmp_path / "prose" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"prose/tokenizer.json: cannot be read"):
        upcycle(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    # Another file with the same tokens is the same vocabulary.
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "prose" / "tokenizer.json").write_text(json.dumps(tokens, indent=3))
    upcycle(config, tmp_path / "other")


def test_settings_that_contradict_each_other(tmp_path):
    for said, nexus in (
        ("nexus.domains is not set", {"domains": None}),
        ("nexus.experts is empty", {"experts": {}}),
        ("num_experts_per_tok=9: of 3 experts", {"top_k": 9}),
    ):
        with pytest.raises(UserError, match=said):
            upcycle(config_of(tmp_path, **nexus), tmp_path / "out")
    config = config_of(tmp_path)
    config.nexus.method = "sparse_upcycling"
    with pytest.raises(UserError, match=r"remove nexus.experts"):
        upcycle(config, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        upcycle(config_of(tmp_path), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
