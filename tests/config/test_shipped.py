"""The configurations that come with the project are right, and small enough for what they promise."""

from pathlib import Path

import pytest

from moe_dist.config.checks import accumulation, check_layout
from moe_dist.config.load import load
from moe_dist.config.recipe import load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("file", sorted((CONFIGS / "debug").glob("*.yaml")), ids=lambda file: file.stem)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_debug_configs_fit_one_to_four_ranks(file, world):
    config = load(file, [f"parallel.expert={world}"])
    check_layout(config, world)
    assert config.model.tokenizer == "offline"


def test_the_quickstart_goes_on_from_two_ranks_to_one():
    recipe = load_recipe(CONFIGS / "quickstart.yaml")
    first, second = (stage for stage in recipe.stages if stage.verb == "train")
    assert (first.launch, first.ranks, second.launch, second.ranks) == ("deepspeed", 2, "none", 1)
    before, after = (load(stage.config, stage.overrides, paths=False) for stage in (first, second))
    for config, ranks in ((before, 2), (after, 1)):
        check_layout(config, ranks)
    assert before.run.dir == after.run.dir
    assert before.train.stop_at < before.train.steps == after.train.steps
    assert after.train.stop_at is None
    assert accumulation(before, 2) * 2 == accumulation(after, 1)
    for stage in recipe.stages:
        if stage.config is not None:
            load(stage.config, stage.overrides, paths=False)
