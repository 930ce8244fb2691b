"""The adapter of a run with LoRA, straight from its checkpoint: no model in memory."""

from __future__ import annotations

from pathlib import Path

from moe_dist import __version__
from moe_dist.checkpoint import Checkpoint, fingerprint
from moe_dist.config.save import to_dict
from moe_dist.config.schema import RunConfig
from moe_dist.models.adapter import write_lora
from moe_dist.models.lora import injected_config
from moe_dist.train.build import ModelPlan


def write_adapter(opened: Checkpoint, config: RunConfig, plan: ModelPlan, out: str | Path) -> Path:
    """Write what a run with LoRA has trained as an adapter of PEFT. One process.

    opened: a checkpoint of the run, whose float32 masters become the adapter as they are. `out`: new or empty. The
    manifest has the base model's name as in `model.path` and its fingerprint, the run's name, step and data.
    Raises UserError where the base model is no longer the one that the run was trained on.
    """
    assert plan.folder is not None
    opened.check_base(plan.folder)
    known = opened.frozen.fingerprint if opened.frozen is not None else fingerprint(plan.folder)
    manifest = {
        "base": {
            "model": config.model.path,
            "model_type": plan.skeleton.config.model_type,
            "fingerprint": known,
        },
        "run": config.run.name,
        "step": opened.step,
        "tokens": opened.trainer_state["tokens"],
        "data": {source.name: source.path or source.hub or source.corpus for source in config.data.train},
        "train": to_dict(config)["train"],
        "moe_dist": __version__,
    }
    tensors = {name: opened.tensor("weights", name) for name in sorted(plan.selection.names)}
    return write_lora(out, injected_config(plan.skeleton), tensors, manifest)
