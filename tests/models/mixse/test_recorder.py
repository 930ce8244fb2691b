"""Routing shares: what is counted, and what is not."""

from __future__ import annotations

import pytest
import torch

from moe_dist.errors import UserError
from moe_dist.models.mixse import RoutingRecorder, given_alpha
from tests.models.mixse.tiny import SKILLS, base_model, mixse_model
from tests.models.tiny import batch


@pytest.mark.parametrize(("router_input", "blocks"), [("block_input", [0, 1]), ("base_last_hidden", [0])])
def test_shares_add_up_and_leave_padding_out(tmp_path, router_input, blocks):
    model = mixse_model("llama", tmp_path, router_input=router_input, top_k=2)
    with torch.no_grad():
        model.mixse_router.weight.mul_(8)
    ids, seen = batch(rows=2, length=10), []
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    model.mixse.listeners.append(lambda block, alpha, mask: seen.append(alpha))
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(ids, attention_mask=mask)
    counts = recorder.counts()
    assert list(counts) == blocks
    for alpha, found in zip(seen, counts.values(), strict=True):
        kept = alpha[mask.bool()]
        assert torch.equal(found[0], torch.bincount(kept.argmax(dim=1), minlength=3).double())
        assert torch.equal(found[1], (kept > 0).sum(dim=0).double())
        assert torch.allclose(found[2], kept.double().sum(dim=0))
        assert found[0].sum() == 16
        assert found[1].sum() == 32
    shares = recorder.shares()
    assert list(shares) == list(SKILLS)
    assert sum(share["first"] for share in shares.values()) == pytest.approx(1)
    assert sum(share["chosen"] for share in shares.values()) == pytest.approx(2)
    # Nothing is counted outside; a mask that is set goes over that of the call, and generated tokens count too.
    with torch.no_grad():
        model(ids)
        assert recorder.counts()[0][0].sum() == 16
        with RoutingRecorder(model) as again, given_alpha(model, [0.0, 0.25, 0.0]):
            again.mask_BL = torch.zeros(2, 10)
            again.mask_BL[0, 3] = 1
            model(ids)
            assert again.counts()[0][:, 1].tolist() == [1, 1, 0.25]
            again.mask_BL = None
            model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert again.counts()[0][:, 1].tolist() == [1 + 16 + 6, 23, 5.75]
    assert RoutingRecorder(model).shares()["code"] == {"first": 0, "chosen": 0, "weight": 0}


def test_other_models_and_other_shapes_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a MiXSE model"):
        RoutingRecorder(base_model("llama"))
    model = mixse_model("llama", tmp_path)
    with pytest.raises(UserError, match=r"expected \[..., 3\]"), given_alpha(model, [1.0, 2.0]):
        pass
