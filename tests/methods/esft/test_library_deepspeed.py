"""The library form through a Trainer's DeepSpeed integration, on two data parallel ranks at every ZeRO stage."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from transformers import Trainer

from moe_dist.errors import UserError
from moe_dist.methods import esft
from moe_dist.parallel.grid import build_grid
from moe_dist.train.deepspeed_seam import import_deepspeed
from tests.methods.esft.adapters import logits
from tests.methods.esft.test_library import arguments, choice, losses, plain, rows
from tests.models.compare import distance, file_tensors


def _zero(stage: int, *, bf16: bool) -> dict:
    return {
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 3000,
            "allgather_bucket_size": 3000,
            "stage3_param_persistence_threshold": 500,  # elements: norms stay whole, as they do by default
            "stage3_gather_16bit_weights_on_model_save": True,
            "leaf_module": {"classes": [], "names": [], "name_suffixes": []},
        },
        "bf16": {"enabled": bf16},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


def _train(folder, out, stage: int, bf16: bool, resume: bool, without: tuple = ()) -> tuple:
    """On each rank: the losses, and the names of what trains. without: settings that are left out."""
    import_deepspeed(build_grid())
    from accelerate.state import AcceleratorState, PartialState

    kept = dict(os.environ)
    try:
        dtype = torch.bfloat16 if bf16 else torch.float32
        model = plain(folder, dtype=dtype)
        settings = {"bf16": bf16, "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 2}
        zero = _zero(stage, bf16=bf16)
        for key in without:
            del zero["zero_optimization"][key]
        options = arguments(out / "run", deepspeed=zero, weight_decay=0.0, **settings)
        esft.apply_selection(model, choice(model))
        if stage == 3:
            # Loaded now, the ranks would share it out while they read it.
            with pytest.raises(UserError, match=r"before the TrainingArguments with ZeRO 3 are made"):
                esft.apply_selection(plain(folder), {0: [1]})
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        trainer = Trainer(model, options, train_dataset=rows())
        trainer.train(resume_from_checkpoint=str(out / "run" / "checkpoint-2") if resume else None)
        trainer.save_model(str(out / ("resumed" if resume else "adapter")))
        return losses(trainer), trains
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        os.environ.clear()
        os.environ |= kept
        gc.collect()


CASES = [(1, False), (2, False), (2, True), (3, False), (3, True)]


@pytest.mark.parametrize(("stage", "bf16"), CASES)
def test_two_ranks_are_one(ranks, tiny, tmp_path, stage, bf16):
    family = "qwen3_moe"
    folder = tiny(family, dtype=torch.bfloat16) if bf16 else tiny(family)
    alone = plain(folder)
    config = choice(alone)
    esft.apply_selection(alone, config)
    reference = Trainer(alone, arguments(tmp_path / "alone", weight_decay=0.0), train_dataset=rows())
    reference.train()
    reference.save_model(str(tmp_path / "reference"))

    results = ranks(2, _train, folder, tmp_path, stage, bf16, False, timeout=120)
    close = 2e-2 if bf16 else 5e-6
    for seen, trains in results:
        assert seen == pytest.approx(losses(reference), rel=close)
        assert trains
        assert all(".experts.trainable." in name for name in trains)
    got, want = file_tensors(tmp_path / "adapter"), file_tensors(tmp_path / "reference")
    assert got.keys() == want.keys()
    if not bf16:
        for name, tensor in got.items():
            assert distance(tensor, want[name]) < 1e-5, name
    fresh, trained = plain(folder), plain(folder)
    esft.load_adapter(fresh, tmp_path / "adapter")
    esft.load_adapter(trained, tmp_path / "reference")
    assert distance(logits(fresh), logits(trained)) < (2e-2 if bf16 else 1e-5)
    if not bf16 and stage > 1:
        again = ranks(2, _train, folder, tmp_path, stage, bf16, True, timeout=120)
        assert [seen for seen, _ in again] == [seen for seen, _ in results]
        for name, tensor in file_tensors(tmp_path / "resumed").items():
            assert torch.equal(tensor, got[name]), name


def _train_without(folder, out, setting: str) -> str:
    try:
        _train(folder, out, 3, False, False, (setting,))
    except UserError as error:
        return str(error)
    return ""


def test_what_zero_3_needs_is_said(ranks, tiny, tmp_path):
    for said in ranks(2, _train_without, tiny("qwen3_moe"), tmp_path, "leaf_module", timeout=120):
        assert 'Set "zero_optimization": {"leaf_module": {"classes": []}' in said
    # Without gathering there is no adapter, and training goes on.
    setting = "stage3_gather_16bit_weights_on_model_save"
    assert ranks(2, _train_without, tiny("qwen3_moe"), tmp_path, setting, timeout=120) == ["", ""]
    assert not (tmp_path / "adapter" / "expert_cfg.json").exists()


def _apply_another(folder) -> str:
    model = plain(folder)
    rank = build_grid().rank
    try:
        esft.apply_selection(model, {0: [1 + rank]})
    except UserError as error:
        return str(error)
    return ""


def test_processes_that_disagree_are_told_so(ranks, tiny):
    for said in ranks(2, _apply_another, tiny("qwen3_moe")):
        assert "process(es) [1] apply another selection than process 0" in said
