"""Faults of the tensor, sequence and pipeline axes, each on two ranks of one axis."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F

from moe_dist.parallel.shard import Shard
from moe_dist.train.losses import next_labels
from tests.mutants.fault import BASE, Fault

TENSOR = replace(BASE, layout=(2, 1), axes=(1, 1, 2))
TENSOR_WITH_BIASES = replace(TENSOR, family="gpt_oss")
SEQUENCE = replace(BASE, layout=(2, 1), axes=(1, 2, 1))
PIPELINE = replace(BASE, layout=(2, 1), axes=(2, 1, 1))
BALANCED = replace(PIPELINE, balance="hf")

# Tensor


def output_bias_on_every_rank(original):
    return lambda module, grid, x: F.linear(x, module.weight, module.bias)


def whole_vectors_taken_for_cut(original):
    """The gradients of norms are not summed over the tensor group, as those of cut weights are not."""
    return lambda tensor: Shard(0, 0, 1) if tensor.dim() == 1 else original(tensor)


def row_slices_exchanged(original):
    """Each rank has the rows of an output layer that belong to the heads of another one."""

    def cut(self, whole):
        if self.dim != 1:
            return original(self, whole)
        return original(Shard(self.dim, self.parts - 1 - self.part, self.parts), whole)

    return cut


def vocabulary_off_by_one(original):
    """Ranks beyond the first find a token's row and logit one place off."""

    def own_ids(ids, part, size, parts):
        moved = (ids + 1).clamp(max=parts * size - 1) if part else ids
        return original(moved, part, size, parts)

    return own_ids


def own_partial_sum_alone(original):
    """At the end of a block a rank keeps its slice of what it has computed itself."""

    def summed(x, size, group):
        rank = torch.distributed.get_rank(group)
        return x.unflatten(-2, (size, -1)).select(-3, rank).contiguous()

    return summed


def gathered_tokens_without_the_others_gradient(original):
    def backward(ctx, grad):
        size, group = ctx.where
        rank = torch.distributed.get_rank(group)
        return grad.unflatten(-2, (size, -1)).select(-3, rank).contiguous(), None, None

    return backward


# Sequence


def positions_begin_in_each_block(original):
    def rank_rows(batch, grid):
        rows = original(batch, grid)
        places_BM = torch.arange(rows.position_ids_BM.shape[1]).expand_as(rows.position_ids_BM)
        return replace(rows, position_ids_BM=places_BM.contiguous())

    return rank_rows


def targets_cut_before_they_are_moved(original):
    """The last token of a block has nothing to predict."""

    def rank_rows(batch, grid):
        from moe_dist.parallel.sequence import own_block

        rows = original(batch, grid)
        return replace(rows, targets_BM=next_labels(own_block(batch["labels"], grid)))

    return rank_rows


def attention_within_the_block(original):
    """The mask is that of each block by itself: later blocks do not see earlier ones."""

    def model_inputs(rows, config, **options):
        inputs = original(rows, config, **options)
        mask = inputs["attention_mask"]
        length, block = mask.shape[-1], rows.input_ids_BM.shape[1]
        blocks_L = torch.arange(length) // block
        other_LL = blocks_L[:, None] != blocks_L[None, :]
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return {**inputs, "attention_mask": mask.masked_fill(other_LL, hidden)}

    return model_inputs


def heads_come_back_in_another_order(original):
    return lambda out_BLhD, group: original(out_BLhD, group).flip(2)


# Pipeline


def tied_gradients_not_summed(original):
    return lambda self: None


def balance_of_one_stage(original):
    """Each stage balances the experts' loads of its own layers."""
    return lambda self, load_E: original(self, self.load_E.double())


def last_micro_batch_lost(original):
    def backward(self, loss):
        last = self._micro_batches == self.accumulation_steps - 1
        original(self, loss * 0 if last else loss)

    return backward


def gradient_of_another_micro_batch(original):
    """What a stage gets back belongs to the micro-batch before: a buffer that was filled too late."""
    kept = {}

    def backward(self, number, *received):
        own = tuple(tensor.clone() for tensor in received)
        before = kept.get(id(self), own)
        kept[id(self)] = own
        return original(self, number, *before)

    return backward


PARALLEL, MODELS, TRAIN = "moe_dist.parallel", "moe_dist.models", "moe_dist.train"

AXIS_FAULTS = {
    "output bias twice": Fault(f"{MODELS}.tensor:_add_bias_once", output_bias_on_every_rank, TENSOR_WITH_BIASES),
    "norms not summed": Fault(f"{TRAIN}.family:shard_of", whole_vectors_taken_for_cut, TENSOR),
    "row slices exchanged": Fault(f"{PARALLEL}.shard:Shard.cut", row_slices_exchanged, TENSOR),
    "embedding off by one": Fault(f"{MODELS}.tensor:own_ids", vocabulary_off_by_one, TENSOR),
    "target off by one": Fault(f"{TRAIN}.losses:own_ids", vocabulary_off_by_one, TENSOR),
    "partial sums not summed": Fault(f"{PARALLEL}.tensor:_summed", own_partial_sum_alone, TENSOR),
    "gradients not scattered": Fault(
        f"{PARALLEL}.tensor:_Gather.backward", gathered_tokens_without_the_others_gradient, TENSOR
    ),
    "positions of the block": Fault(f"{TRAIN}.passes:rank_rows", positions_begin_in_each_block, SEQUENCE),
    "mask of the block": Fault(f"{TRAIN}.passes:model_inputs", attention_within_the_block, SEQUENCE),
    "targets of the block": Fault(f"{TRAIN}.passes:rank_rows", targets_cut_before_they_are_moved, SEQUENCE),
    "heads out of order": Fault(f"{MODELS}.ulysses:heads_of_tokens", heads_come_back_in_another_order, SEQUENCE),
    "tied gradient not summed": Fault(
        f"{TRAIN}.tied:TiedCopies.sum_gradients", tied_gradients_not_summed, PIPELINE, tied=True
    ),
    "balance loss of a stage": Fault("moe_dist.moe.balance:HfParts.share", balance_of_one_stage, BALANCED),
    "last micro-batch lost": Fault(f"{TRAIN}.engine:Engine.backward", last_micro_batch_lost, PIPELINE),
    "another's gradient": Fault(f"{TRAIN}.passes:_Step.backward", gradient_of_another_micro_batch, PIPELINE),
}
