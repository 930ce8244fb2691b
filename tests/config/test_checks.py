import pytest

from moe_dist.config.checks import accumulation, check_experts_only, check_layout, is_local, smallest_world
from moe_dist.config.load import build
from moe_dist.errors import UserError


def made(*overrides):
    return build({"model": {"config": {"model_type": "qwen3_moe"}}}, overrides)


def test_expert_ranks_have_to_fit_the_world():
    with pytest.raises(UserError, match=r"parallel.expert=4 needs at least 4 ranks, but this run has 2"):
        check_layout(made("parallel.expert=4"), 2)
    with pytest.raises(UserError, match=r"does not fit 3 rank.*1, 3"):
        check_layout(made("parallel.expert=2"), 3)
    check_layout(made("parallel.expert=2"), 4)


def test_every_product_of_axes_that_fits_is_allowed():
    folded = made("parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence=2", "parallel.expert=8")
    assert smallest_world(folded) == 16
    check_layout(folded, 16)
    with pytest.raises(UserError, match=r"need at least 16 ranks, but this run has 8"):
        check_layout(folded, 8)
    with pytest.raises(UserError, match=r"must divide the number of ranks"):
        check_layout(folded, 20)
    with pytest.raises(UserError, match=r"data.seq_len=100: .* 8 slices.*set it to 104"):
        check_layout(made("parallel.tensor=8", "data.seq_len=100"), 8)
    with pytest.raises(UserError, match=r"model.attention=flex_attention: .*parallel.sequence=2; take eager or sdpa"):
        check_layout(made("parallel.sequence=2", "model.attention=flex_attention"), 2)


def test_only_ranks_that_read_rows_count_for_the_batch():
    made_so = made("parallel.tensor=2", "train.micro_batch_size=2", "train.global_batch_size=8")
    assert accumulation(made_so, 4) == 2


def test_verbs_that_serve_experts_only():
    check_experts_only(made("parallel.expert=2"), "esft score")
    with pytest.raises(UserError, match=r"parallel.sequence=2: `esft score` runs on expert-parallel ranks only"):
        check_experts_only(made("parallel.sequence=2"), "esft score")


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
