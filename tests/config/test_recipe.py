import pytest

from moe_dist.config.recipe import load_recipe, stage_hashes
from moe_dist.errors import UserError


def written(tmp_path, text):
    (tmp_path / "c.yaml").write_text("a: 1")
    (tmp_path / "r.yaml").write_text(text)
    return tmp_path / "r.yaml"


def test_defaults_references_and_relative_files(tmp_path):
    recipe = load_recipe(
        written(tmp_path, "stages:\n- {name: a, verb: train, config: c.yaml, overrides: ['run.dir=${dir}/a']}")
    )
    assert recipe.dir == "runs/r"
    assert recipe.stages[0].config == str(tmp_path / "c.yaml")
    assert recipe.stages[0].overrides == ["run.dir=runs/r/a"]
    assert (recipe.stages[0].launch, recipe.stages[0].ranks) == ("none", 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {}", "moe-dist train"),
        ("stages: []", "at least one"),
        ("stages: [{name: a, verbs: train}]", "did you mean stages.0.verb?"),
        ("stages: [{verb: train}]", "needs a name"),
        ("stages: [{name: a/b, verb: train}]", "needs a name"),
        ("stages: [{name: a, verb: train}, {name: a, verb: eval}]", "two stages"),
        ("stages: [{name: a}]", "exactly one of"),
        ("stages: [{name: a, verb: run}]", "cannot run a recipe"),
        ("stages: [{name: a, verb: train, config: no.yaml}]", "no.yaml: no such file"),
        ("stages: [{name: a, verb: train, overrides: [x=1]}]", "need a config"),
        ("stages: [{name: a, verb: train, ranks: 2}]", "needs launch"),
        ("stages: [{name: a, verb: train, launch: mpi}]", "one of none, deepspeed, torchrun"),
        ("stages: [{name: a, verb: train, ranks: two}]", "has to be a whole number"),
        ("stages: [{name: a, module: '${oc.env:HOME}'}]", "environment"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=r"r\.yaml") as caught:
        load_recipe(written(tmp_path, text))
    assert message in str(caught.value)


def test_hashes_follow_contents_and_what_came_before(tmp_path):
    text = "stages:\n- {name: a, module: x}\n- {name: b, verb: train, config: c.yaml}\n- {name: c, module: y}"
    before = stage_hashes(load_recipe(written(tmp_path, text)))
    assert len(set(before)) == 3
    (tmp_path / "c.yaml").write_text("a: 2")
    after = stage_hashes(load_recipe(tmp_path / "r.yaml"))
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, False]
