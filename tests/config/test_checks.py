import pytest

from moe_dist.config.checks import accumulation, check_layout, is_local
from moe_dist.config.load import build
from moe_dist.errors import UserError


def made(*overrides):
    return build({"model": {"config": {"model_type": "qwen3_moe"}}}, overrides)


def test_expert_ranks_have_to_fit_the_world():
    with pytest.raises(UserError, match=r"parallel.expert=4 needs at least 4 ranks, but this run has 2"):
        check_layout(made("parallel.expert=4"), 2)
    with pytest.raises(UserError, match=r"does not divide the 3 ranks.*1, 3"):
        check_layout(made("parallel.expert=2"), 3)
    check_layout(made("parallel.expert=2"), 4)


@pytest.mark.parametrize("axis", ["tensor", "sequence", "pipeline"])
def test_other_axes_are_refused_above_one(axis):
    with pytest.raises(UserError, match=f"parallel.{axis}=2"):
        check_layout(made(f"parallel.{axis}=2"), 2)


def test_accumulation():
    assert accumulation(made(), 4) == 1
    assert accumulation(made("train.global_batch_size=24", "train.micro_batch_size=3"), 2) == 4
    with pytest.raises(UserError, match=r"set it to 6 or 12"):
        accumulation(made("train.global_batch_size=8", "train.micro_batch_size=3"), 2)
    with pytest.raises(UserError, match=r"set it to 6,"):
        accumulation(made("train.global_batch_size=4", "train.micro_batch_size=3"), 2)


@pytest.mark.parametrize(
    ("name", "local"), [("org/name", False), ("name", False), ("./x", True), ("/x", True), ("a/b/c", True)]
)
def test_local_names(name, local):
    assert is_local(name) is local
