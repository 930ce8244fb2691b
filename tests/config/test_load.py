import pytest

from moe_dist.config.load import build, load
from moe_dist.errors import UserError

INLINE = {"config": {"model_type": "qwen3_moe"}}


def made(tree=None, *overrides):
    return build({"model": INLINE, **(tree or {})}, overrides)


def test_defaults_types_and_names():
    config = made({"train": {"steps": "7"}, "model": {**INLINE, "trust_remote_code": "no"}})
    assert config.train.steps == 7
    assert config.model.trust_remote_code is False
    assert (config.run.name, config.run.dir) == ("run", "runs/run")


@pytest.mark.parametrize(
    ("tree", "hint"),
    [
        ({"train": {"learning_rate": 1}}, "did you mean train.lr?"),
        ({"train": {"wamup_steps": 1}}, "did you mean train.warmup_steps?"),
        ({"lr": 1}, "did you mean train.lr?"),
        ({"train": {"zero_stage": 1}}, "did you mean parallel.zero_stage?"),
        ({"output_dir": "x"}, "did you mean run.dir?"),
        ({"data": {"train": [{"pth": "x"}]}}, "did you mean data.train.0.path?"),
        ({"qqq": 1}, "a configuration has run, model"),
    ],
)
def test_unknown_key_gets_a_hint(tree, hint):
    with pytest.raises(UserError, match="unknown key") as caught:
        made(tree)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=1", "did you mean train.lr?"),
        ("train.lr", "has to be key=value"),
        ("train.lr.x=1", "single value"),
        ("train.betas.5=1", "no item '5'"),
        ("train.steps=2.5", "train.steps: Value '2.5'"),
        ("train.lr=abc", "train.lr: Value 'abc'"),
        ("train=null", "train has to be a mapping"),
        ("data.train=3", "data.train has to be a list"),
        ("train.schedule=foo", "has to be one of cosine, constant, wsd"),
        ("train.lr=-1", "at least 0"),
        ("train.eps=0", "above 0"),
        ("train.lr=.nan", "finite"),
        ("run.name=a;b", "run.name='a;b'"),
        ("run.dir=../x", "must not climb"),
        ("train.betas=[0.9]", "two numbers"),
        ("train.warmup_steps=101", "more than train.steps=100"),
        ("train.decay_steps=5", "only for train.schedule=wsd"),
        ("train.stop_at=101", "more than train.steps=100"),
        ("trainable.experts={x: [1]}", "index of a layer"),
        ("trainable.experts={1: [1, 1]}", "appear once"),
        ("model.path=org/name", "not both"),
        ("model.config=null", "one of them"),
        ("data.train=[{path: a, hub: b}]", "path and hub"),
        ("model.config.model_type=null", "model_type is missing"),
    ],
)
def test_wrong_values_are_named(override, message):
    with pytest.raises(UserError) as caught:
        made({}, override)
    assert message in str(caught.value)
    assert override.split("=")[0].split(".")[0] in str(caught.value)


def test_overrides_reach_into_lists_and_mappings():
    config = made(
        {"data": {"train": {"code": {"corpus": "stdlib"}, "prose": "a.jsonl"}}},
        "train.betas.1=0.99",
        "data.train.prose.weight=3",
        "data.train.0.limit=5",
        "trainable.experts={3: [1, 2]}",
        "model.config.hidden_size=64",
    )
    assert config.train.betas == [0.9, 0.99]
    assert [(s.name, s.weight, s.limit) for s in config.data.train] == [("code", 1.0, 5), ("prose", 3.0, None)]
    assert config.trainable.experts == {"3": [1, 2]}
    assert config.model.config == {"model_type": "qwen3_moe", "hidden_size": 64}


def test_sources_get_names_of_their_own():
    config = made({"data": {"train": ["a/x.jsonl", "b/x.jsonl", {"hub": "org/x", "name": "x-2"}]}})
    assert [source.name for source in config.data.train] == ["x", "x-3", "x-2"]


def test_references_resolve_and_keep_their_type():
    config = made({"run": {"name": "n", "dir": "out/${run.name}"}}, "train.warmup_steps=${train.log_every}")
    assert config.run.dir == "out/n"
    assert config.train.warmup_steps == 10


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.dir=${oc.env:HOME}"], "environment"),
        (["run.dir=${env:SECRET}"], "environment"),
        (["run.dir=${run.name}", "run.name=${run.dir}"], "circle"),
        (["run.dir=${run.nope}"], "does not exist"),
        (["run.dir=${train}"], "whole section"),
        ([f"model.config.a{i}=${{model.config.a{i + 1}}}${{model.config.a{i + 1}}}" for i in range(25)]
         + ["model.config.a25=xxxxxxxx"], "longer than"),
    ],
)  # fmt: skip
def test_references_cannot_read_secrets_or_explode(overrides, message, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    with pytest.raises(UserError) as caught:
        made({}, *overrides)
    assert message in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_remote_code_needs_a_pinned_commit():
    with pytest.raises(UserError, match="pin it"):
        build({"model": {"path": "org/name", "trust_remote_code": True}})
    build({"model": {"path": "org/name", "trust_remote_code": True, "revision": "a" * 40}})


def test_local_paths_are_checked_only_when_asked(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {{path: {tmp_path}/nope}}")
    with pytest.raises(UserError, match=r"model\.path=.*no such folder"):
        load(file)
    assert load(file, paths=False).run.name == "recipe"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"- 1", "mapping of sections"), (b"\xff\xfe\x00", "UTF-8"), (b"train: 3", "mapping of keys"), (None, "no such")],
)
def test_unreadable_files_are_named(tmp_path, content, message):
    file = tmp_path / "c.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"c\.yaml") as caught:
        load(file)
    assert message in str(caught.value)
