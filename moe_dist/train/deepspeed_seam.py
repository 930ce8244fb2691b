"""DeepSpeed behind the `Backend` of `train.engine`. What leans on its internals (written against 0.19.8) is here, in
`deepspeed_groups` (which ranks share a parameter) and in `deepspeed_setup`.

What DeepSpeed does here: it partitions and reduces (ZeRO 1 to 3), or only reduces (stage 0). What it is kept from
doing: clipping and norms (its norms differ from stage to stage under expert parallelism), loss averaging, deciding
about skipped steps, counting micro-batches. Those are `Engine`'s, one way for all stages.

Which optimizer serves which stage:

    stage  fp32                          bf16
    0      MasterAdamW, reduced by the   the same; DeepSpeed does not know that the model is bf16
           engine's plain all-reduce
    1      DeepSpeedZeroOptimizer        BF16_Optimizer (0.19.8 has no other for fp32 accumulation at stage 1)
    2      DeepSpeedZeroOptimizer        DeepSpeedZeroOptimizer with fp32 partition buffers
    3      DeepSpeedZeroOptimizer_Stage3 the same
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from moe_dist.parallel.grid import Grid
from moe_dist.train.deepspeed_groups import (
    compare_within_stage,
    groups_announced,
    named_for_deepspeed,
    place_parameters,
    register_expert_parameters,
    within_stage,
)
from moe_dist.train.deepspeed_setup import import_deepspeed, settings
from moe_dist.train.family import family_of, replicas_of
from moe_dist.train.optim import MasterAdamW
from moe_dist.train.pieces import Piece, replicated_pieces


class DeepSpeedBackend:
    """A DeepSpeed engine at one ZeRO stage. Collective to build and to use."""

    def __init__(
        self,
        model: nn.Module,
        grid: Grid,
        groups: list[dict],
        hyper: dict,
        *,
        zero_stage: int,
        precision: str,
        reduce_bucket_size: int,
    ):
        self._deepspeed = deepspeed = import_deepspeed(grid)
        self.module, self.grid, self.stage = model, grid, zero_stage
        place_parameters(model, grid)
        compare_within_stage()
        groups = [named_for_deepspeed(group, grid) for group in groups]
        make = _ReducedMasterAdamW if zero_stage == 0 else torch.optim.AdamW
        self.optimizer = make(groups, **hyper)
        trained = sum(parameter.numel() for group in groups for parameter in group["params"])
        config = settings(zero_stage, precision, min(reduce_bucket_size, trained))
        with groups_announced(model, groups), within_stage(grid):
            logger = deepspeed.utils.logger
            logger.setLevel(logging.ERROR)  # it warns of settings that are meant
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=config, dist_init_required=False
            )
            logger.setLevel(logging.WARNING)
        if self._bf16_optimizer:
            self._spare_the_norm()
        if zero_stage == 3:
            register_expert_parameters(model)
        if zero_stage == 0:
            # Everything is replicated: a rank holds all of it, and owns its even slice.
            masters = self.optimizer.masters
            self.held = list(replicated_pieces(masters))
            self.owned = list(replicated_pieces(masters, lambda parameter: replicas_of(family_of(parameter), grid)))
        else:
            find = self._pieces_of_stage_3 if zero_stage == 3 else self._pieces_of_stage_1_and_2
            self.owned = self.held = list(find())

    # The three calls of a step

    def forward(self, **batch):
        return self.engine(**batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate; after the last micro-batch of a step, also reduce.

        Scale: DeepSpeed sums gradients over a parameter's replicas and divides by the number of its data-parallel
        ranks, which are the W ranks of the pipeline stage. It divides by W at every stage whatever the family: also
        where the replicas are only W / P of them, for experts (P expert-parallel ranks) and for what is cut over the
        tensor axis. Scaling the loss by W cancels that: what remains is the sum over the replicas, which is the
        gradient that `Engine` promises. The other stages of a pipeline do the same with their W, which is as large.
        `scale_wrt_gas=False` keeps it from dividing by the accumulation steps, so nothing is left to cancel there.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.grid.stage_size, scale_wrt_gas=False)

    def optimizer_step(self) -> None:
        self.engine.step()
        if self.stage == 3:
            # A parameter without gradient in some later step would otherwise add this step's once more.
            self.engine.optimizer.grad_partitions_flat_buffer.zero_()

    def drop_gradients(self) -> None:
        """Forget the accumulated gradients, as each of these optimizers does when it meets an overflow itself."""
        zero = self.engine.optimizer
        if self.stage == 3:
            zero._pre_step()
            zero._partition_all_parameters()
            zero._overflow_clean_up(1)
            zero.grad_partitions_flat_buffer.zero_()
        elif self.stage == 0:
            zero.zero_grad(set_to_none=True)
        elif self._bf16_optimizer:
            zero.clear_hp_grads()
            zero.clear_lp_grads()
        else:
            zero.zero_grad(set_to_none=True)
            zero.micro_step_id = -1
            for kept in (zero.averaged_gradients, zero.all_grad_tensors):
                kept.update(dict.fromkeys(kept))

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters, on all replicas."""
        zero = self.engine.optimizer
        if self.stage == 0:
            zero.publish()
        elif self.stage < 3:
            zero.update_lp_params()
        else:
            zero._partition_all_parameters()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def gathered(self, parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager:
        if self.stage < 3:
            return contextlib.nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(parameters))

    def close(self) -> None:
        self.engine.destroy()
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        if self.stage == 0:
            self.optimizer.close()
        if self.stage == 3:
            # DeepSpeed has put its own `linear` in the place of torch's, for good.
            from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

            torch.nn.functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk

    # Who owns what

    @property
    def _bf16_optimizer(self) -> bool:
        return hasattr(self.engine.optimizer, "clear_hp_grads")

    def _spare_the_norm(self) -> None:
        """BF16_Optimizer takes a norm of its own in each step. It fails where only experts train (the list of other
        gradients is empty), and where the sum of squares leaves fp32 the step is skipped without a word. `Engine` has
        judged the gradients by then: here the norm is that of one zero."""
        zero = torch.zeros(1, device=self.grid.device)
        self.engine.optimizer.get_grads_for_norm = lambda for_clipping=False: ([zero], {})

    def _pieces_of_stage_1_and_2(self) -> Iterator[Piece]:
        """Each group's parameters lie flattened one after the other; a rank owns one even part of that buffer, and
        DeepSpeed has noted on each parameter which of its elements fall into this rank's part, and where."""
        for parameter in self.module.parameters():
            mapping = getattr(parameter, "_hp_mapping", None) if parameter.requires_grad else None
            if mapping is not None:
                flat = self._flat_partitions()[mapping.param_group_index]
                inside, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Piece(
                    parameter, inside.start, inside.numel, flat, there.start, _mapped_gradient(parameter, mapping)
                )

    def _flat_partitions(self) -> list[torch.Tensor]:
        zero = self.engine.optimizer
        return zero.fp32_groups_flat_partition if self._bf16_optimizer else zero.single_partition_of_fp32_groups

    def _pieces_of_stage_3(self) -> Iterator[Piece]:
        """Each parameter is cut into equal parts, one a rank of its partition group, the last ones padded."""
        zero = self.engine.optimizer
        for parameter in (parameter for group in zero.fp16_groups for parameter in group):
            group, start, size = zero.grad_position[zero.get_param_id(parameter)]
            offset = size * zero._get_param_partition_rank(parameter)
            length = min(size, parameter.ds_numel - offset)
            if length > 0:
                flat = zero.fp32_partitioned_groups_flat[group]
                yield Piece(parameter, offset, length, flat, start, _partitioned_gradient(zero, parameter, length))


def _mapped_gradient(parameter: nn.Parameter, mapping) -> Callable[[], torch.Tensor | None]:
    inside = mapping.lp_fragment_address

    def gradient() -> torch.Tensor | None:
        group = mapping.gradient_dict.get(mapping.param_group_index)
        if group is None:
            return None
        tensor = group[parameter._index_in_param_group].view(-1)
        # BF16_Optimizer keeps the gradient of the whole parameter here, the other one only this rank's part.
        if tensor.numel() == inside.numel:
            return tensor
        return tensor[inside.start : inside.start + inside.numel]

    return gradient


def _partitioned_gradient(zero, parameter: nn.Parameter, length: int) -> Callable[[], torch.Tensor]:
    return lambda: zero._get_fp32_grad_state_partition(parameter, False)[0][:length]


class _ReducedMasterAdamW(MasterAdamW):
    """Stage 0: DeepSpeed's plain all-reduce asks the optimizer for the gradients, which are fp32 here."""

    def get_grads_for_reduction(self) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]:
        """(gradients of dense parameters, name of expert group -> gradients), zeros where no backward came by."""
        dense: list[torch.Tensor] = []
        experts: dict[str, list[torch.Tensor]] = {}
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
            found = experts.setdefault(group["name"], []) if group["moe"] else dense
            found.extend(master.grad for master in group["params"])
        return dense, experts
