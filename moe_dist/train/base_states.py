"""`model.base_states`: after the first epoch, a mixture's router reads its base's last hidden states from files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from moe_dist.checkpoint import fingerprint
from moe_dist.config.schema import RunConfig
from moe_dist.errors import UserError
from moe_dist.models.mixse.spec import read_spec
from moe_dist.models.mixse.states import BaseStates
from moe_dist.train.trainable import Selection


def check_base_states(config: RunConfig, skeleton: nn.Module, selection: Selection) -> None:
    """UserError where `model.base_states` is asked for and could not serve, or not be right."""
    if config.model.base_states is None:
        return
    spec = read_spec(skeleton.config)
    if spec is None or spec.router_input != "base_last_hidden" or spec.routing != "learned":
        raise UserError("model.base_states is for mixtures whose router reads base_last_hidden; leave it out")
    base = sorted(name for name in selection.names if not name.startswith("mixse_router.") and ".experts_" not in name)
    if base:
        raise UserError(
            f"model.base_states: the base would change under it, {base[0]} trains; narrow trainable.include"
        )
    if config.parallel.zero_stage == 3:
        raise UserError(
            "model.base_states: at ZeRO 3 all ranks have to make the base's pass together, so none can leave it out; "
            "take parallel.zero_stage below 3"
        )


def keep_base_states(config: RunConfig, model: nn.Module, folder: Path) -> None:
    """Give the mixture its files: those of this model, in the run's precision, by this attention."""
    made_by = (fingerprint(folder), config.train.precision, model.config._attn_implementation)
    name = hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]
    model.mixse.states = BaseStates(Path(config.model.base_states).expanduser() / name)
