"""Training a mixture over ranks against one plain process; and runs that end in a MiXSE folder again."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moe_dist.data.corpora import train_tokenizer
from moe_dist.errors import UserError
from moe_dist.models import export_model, load_model
from moe_dist.models.mixse import given_alpha
from moe_dist.models.mixse.mixing import Mixer
from moe_dist.parallel.grid import Grid
from moe_dist.train.finished import export_run
from tests.models.compare import file_tensors, same_bits
from tests.models.mixse import plain
from tests.models.mixse.tiny import SKILLS, mixture
from tests.models.tiny import batch
from tests.parity import distributed
from tests.parity.cells import Cell
from tests.parity.test_parity import compare
from tests.reference import relative_error
from tests.run.runs import VOCAB, assert_same_bits, events, make_files, settings, stored, train

ONE, LAST = "block_input", "base_last_hidden"
# A bias has as many numbers as there are experts, each a sum over tokens of which most may cancel, as in gemma's here,
# where the plain process itself is 9e-6 from float64.
# (family, router_input, top_k, bias), (ranks, expert-parallel size), ZeRO stage, what trains, bucket, recompute
CELLS = [
    (("llama", ONE, 1, False), 1, 0, "router", 50_000_000, False),
    (("llama", LAST, 1, True), 1, 1, "joint", 300, True),
    (("qwen2", ONE, 2, True), 2, 1, "joint", 300, False),
    (("qwen2", LAST, 1, False), 2, 3, "router", 300, True),
    (("gemma", ONE, 1, False), 2, 2, "router", 50_000_000, True),
    (("gemma2", LAST, 2, False), 2, 0, "joint", 300, False),
    (("gemma3_text", ONE, 3, False), 4, 2, "joint", 300, True),
    (("olmo2", ONE, 1, False), 4, 3, "joint", 300, True),
    (("mistral", LAST, 1, True), 4, 3, "joint", 50_000_000, False),
    (("qwen3", LAST, 2, False), 4, 1, "router", 300, False),
]


@pytest.mark.parametrize(("made", "world", "stage", "trainable", "bucket", "recompute"), CELLS, ids=str)
def test_parity_with_a_plain_process(ranks, tmp_path, made, world, stage, trainable, bucket, recompute):
    """Outputs, every gradient, clip norm and the weights after three steps."""
    family, router_input, top_k, bias = made
    folder = str(mixture(family, tmp_path, router_input=router_input, top_k=top_k, bias=bias))
    cell = Cell(family, (world, 1), stage, trainable, bucket, "none", recompute)
    compare(cell, ranks(world, distributed.train, cell, folder, timeout=120), plain.train(folder, trainable))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Text, and two mixtures with its tokenizer; one with a bfloat16 base, whose experts are stored in float32."""
    folder = tmp_path_factory.mktemp("files")
    made = make_files(folder)
    tokenizer = train_tokenizer([json.loads(line)["text"] for line in (made / "text.jsonl").open()], vocab_size=VOCAB)
    for name, dtype, router_input, top_k in (("one", torch.float32, ONE, 3), ("last", torch.bfloat16, LAST, 1)):
        options = {"changes": {"vocab_size": VOCAB}, "dtype": dtype, "router_input": router_input, "top_k": top_k}
        tokenizer.save_pretrained(mixture("llama", folder / name, **options))
    return folder


def run_settings(files, run, name: str, joint: bool, *, stage: int, **train_section) -> dict:
    return settings(
        files,
        run,
        f"{name}/mixse",
        parallel={"zero_stage": stage, "reduce_bucket_size": 300},
        train={"weight_decay": 0.0, **train_section},
        trainable={"include": ["mixse_router.*", *(["*.experts_*"] if joint else [])]},
    )


@pytest.mark.parametrize(
    ("name", "stage", "precision"), [("one", 2, "fp32"), ("last", 1, "bf16"), ("last", 3, "bf16")], ids=str
)
def test_a_run_of_the_router_changes_nothing_else(ranks, files, tmp_path, name, stage, precision):
    """M5: base and experts keep their bits, in files as well; n·H numbers train; the folder that comes out reloads."""
    source, tree = files / name / "mixse", run_settings(files, tmp_path / "run", name, False, stage=stage)
    tree["train"]["precision"] = precision
    assert ranks(2, train, tree, timeout=120) == [0, 0]
    kept = stored(tmp_path / "run", 6)
    assert {(key[1], tensor.numel()) for key, tensor in kept.items()} == {("mixse_router.weight", 3 * 32)}
    out, _ = export_run(tmp_path / "run", tmp_path / "out")
    assert (
        json.loads((out / "config.json").read_text())["mixse"]
        == json.loads((source / "config.json").read_text())["mixse"]
    )
    same_bits(file_tensors(out), file_tensors(source))
    for skill in SKILLS:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (out / "mixse" / skill / file).read_bytes() == (source / "mixse" / skill / file).read_bytes()
    before, after = (load_file(folder / "mixse" / "router.safetensors")["weight"] for folder in (source, out))
    assert torch.equal(after, kept["weights", "mixse_router.weight", -1].view_as(after))
    assert not torch.equal(after, before)
    model = load_model(out)
    assert torch.equal(model.mixse_router.weight, after)
    assert {file.name for file in out.iterdir()} >= {file.name for file in source.iterdir()}
    # A second trip changes nothing at all.
    again = export_model(model, tmp_path / "again", grid=Grid.single())
    for file in sorted(path.relative_to(out) for path in out.rglob("*.safetensors")):
        assert (again / file).read_bytes() == (out / file).read_bytes(), file


def test_a_run_of_router_and_experts_and_what_peft_makes_of_it(ranks, files, tmp_path):
    """Joint training: the base keeps its bits, experts change, stay apart in their files, and go on from a stop."""
    source = files / "one" / "mixse"
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert ranks(2, train, run_settings(files, whole, "one", True, stage=2), timeout=120) == [0, 0]
    for stop in (2, None):
        tree = run_settings(files, parted, "one", True, stage=2, stop_at=stop)
        assert ranks(2, train, tree, timeout=120) == [0, 0]
    assert_same_bits(stored(parted, 6), stored(whole, 6))
    out, _ = export_run(whole, tmp_path / "out")
    same_bits(file_tensors(out), file_tensors(source))
    model = load_model(out)
    masters = stored(whole, 6)
    for name, parameter in model.named_parameters():
        if "mixse_router" in name or "experts_" in name:
            assert torch.equal(parameter, masters["weights", name, -1].view_as(parameter)), name
    ids = batch()
    for place, skill in enumerate(SKILLS):
        old, new = (load_file(folder / "mixse" / skill / "adapter_model.safetensors") for folder in (source, out))
        assert old.keys() == new.keys()
        assert all(old[key].shape == new[key].shape and not torch.equal(old[key], new[key]) for key in old)
        plain_base = transformers.AutoModelForCausalLM.from_pretrained(out)
        alone = peft.PeftModel.from_pretrained(plain_base, out / "mixse" / skill)
        with torch.no_grad(), given_alpha(model, torch.eye(3)[place]):
            assert relative_error(model(ids).logits, alone(ids).logits) < 2e-6


@pytest.mark.parametrize(("name", "blocks"), [("one", ["0", "1"]), ("last", ["0"])])
def test_a_run_tells_what_each_domain_s_tokens_get(ranks, files, tmp_path, name, blocks):
    """As for any mixture of experts: over all ranks, padding left out, the same on one rank and on two."""
    tree = run_settings(files, tmp_path / "two", name, False, stage=1, steps=2)
    tree["data"]["eval"] = {"text": {"path": str(files / "text.jsonl"), "limit": 5}}
    assert ranks(2, train, tree, timeout=120) == [0, 0]
    assert train(tree | {"run": {"name": "tiny", "dir": str(tmp_path / "one")}}) == 0
    (two,), (one,) = (events(tmp_path / run, "eval") for run in ("two", "one"))
    figures = two["domains"]["text"]
    assert list(figures["experts"]) == blocks
    for slots in figures["experts"].values():
        tokens = sum(slots) // (3 if name == "one" else 1)
        assert figures["tokens"] < tokens <= figures["tokens"] + 5
    assert figures["experts"] == one["domains"]["text"]["experts"]


def test_experts_belong_to_the_base_of_a_checkpoint(files, tmp_path):
    """A frozen expert is kept by reference: another in its place is noticed."""
    folder = tmp_path / "files"
    shutil.copytree(files, folder)
    assert train(run_settings(folder, tmp_path / "run", "one", False, stage=1, stop_at=2)) == 0
    path = folder / "one" / "mixse" / "mixse" / "code" / "adapter_model.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="base"):
        train(run_settings(folder, tmp_path / "run", "one", False, stage=1))


def test_the_base_reads_each_row_once(files, tmp_path, monkeypatch):
    """With `model.base_states` a second epoch makes no pass of the base, and the run is the same to the bit."""
    passes = []
    plain_pass = Mixer._pass_of_base
    monkeypatch.setattr(Mixer, "_pass_of_base", lambda *args: (passes.append(1), plain_pass(*args))[1])

    def run(name: str, **model) -> tuple[dict, int]:
        tree = run_settings(files, tmp_path / name, "last", False, stage=1, precision="bf16", global_batch_size=2)
        tree["data"]["train"] = {"text": {"path": str(files / "text.jsonl"), "limit": 8}}
        tree["model"] |= model
        passes.clear()
        assert train(tree) == 0
        return stored(tmp_path / name, 6), len(passes)

    whole, every = run("plain")
    kept, some = run("kept", base_states=str(tmp_path / "states"))
    again, none = run("again", base_states=str(tmp_path / "states"))
    rows = len(list((tmp_path / "states").rglob("*.safetensors")))
    assert every == 12 > rows > 1
    assert some == rows
    assert none == 0
    assert_same_bits(kept, whole)
    assert_same_bits(again, whole)
    # A file that was cut short is made again.
    for path in list((tmp_path / "states").rglob("*.safetensors")):
        path.write_bytes(path.read_bytes()[:50])
    assert run("repaired", base_states=str(tmp_path / "states"))[1] == rows


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("one", {}, "whose router reads base_last_hidden"),
        ("last", {"parallel": {"zero_stage": 3}}, "at ZeRO 3"),
        ("last", {"trainable": {"include": ["*"]}}, "the base would change under it"),
    ],
)
def test_base_states_where_they_cannot_serve(files, tmp_path, name, changes, says):
    tree = run_settings(files, tmp_path / "run", name, False, stage=1)
    tree["model"]["base_states"] = str(tmp_path / "states")
    with pytest.raises(UserError, match=says):
        train({**tree, **changes})


def test_lora_goes_on_a_base_not_on_a_mixture(files, tmp_path):
    tree = run_settings(files, tmp_path / "run", "one", False, stage=1)
    with pytest.raises(UserError, match="this model is a mixture"):
        train({**tree, "lora": {"rank": 4}, "trainable": {}})
