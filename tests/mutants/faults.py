"""The planted faults. Each patches one function of the package, on every rank, for the length of one training.

A fault names the cell of the parity matrix that has to catch it: the smallest one in which it makes a difference.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist

from moe_dist.parallel.collectives import start_exchange
from tests.mutants.axis_faults import AXIS_FAULTS
from tests.mutants.fault import BASE, Fault

ONE_RANK = replace(BASE, layout=(1, 1))
FOUR = replace(BASE, layout=(4, 2))
BALANCED = replace(BASE, balance="hf")
ESFT = replace(BASE, trainable="one rank")


# Gradients of experts


def expert_gradient_times_ep(original):
    return _changed_weight_gradients(original, lambda gradient, counts: gradient.mul_(2))


def expert_gradient_mean_over_ranks(original):
    return _changed_weight_gradients(original, lambda gradient, counts: gradient.div_(2))


def stale_experts_without_rows(original):
    """The gradient of an expert without tokens is left over memory in place of zeros."""

    def leave(gradient, counts):
        gradient[[seat for seat, count in enumerate(counts) if count == 0]] = 1e-3

    return _changed_weight_gradients(original, leave)


def first_token_without_gradient(original):
    def backward(ctx, grad):
        grads = original(ctx, grad)
        grads[0][:1] = 0
        return grads

    return backward


def _changed_weight_gradients(original, change):
    """`change(gradient [S,...], rows of each seat)` works in place on every weight gradient of the grouped MLP."""

    def backward(ctx, grad):
        grads = original(ctx, grad)
        for place, gradient in enumerate(grads[4:]):
            if gradient is not None:
                counts = torch.tensor(ctx.plan.parts[0].seat_counts).split(list(ctx.how.held))
                change(gradient, counts[place // 4].tolist())
        return grads

    return backward


# Router


def router_weights_detached(original):
    return lambda x, probs, *rest: original(x, probs.detach(), *rest)


def probabilities_in_the_wrong_order(original):
    return lambda ids, probs, *rest, **options: original(ids, probs.flip(1), *rest, **options)


def probability_gradients_in_the_wrong_order(original):
    return lambda self, flight: original(self, flight).flip(1)


def balance_loss_once_per_rank(original):
    return lambda self, batch: self.grid.world * original(self, batch)


def balance_loss_without_graph(original):
    return lambda self, batch: original(self, batch).detach()


def padding_in_the_balance_loss(original):
    def count(mask_BL, grid, *, position_ids_BL=None):
        return original(torch.ones_like(mask_BL), grid, position_ids_BL=position_ids_BL)

    return count


# The way of the rows


def rows_sent_to_the_neighbour(original):
    """Two experts' positions are exchanged in the plan, not in the weights."""

    def plan(ids_TK, *rest, **options):
        other = torch.where(ids_TK == 0, 1, torch.where(ids_TK == 1, 0, ids_TK))
        return original(other, *rest, **options)

    return plan


def way_back_not_reversed(original):
    def start_back(self, y_MH):
        return start_exchange(y_MH, self.send, self.receive, self.way.group, what="rows back")

    return start_back


def slots_that_share_a_row_lost(original):
    """Where two experts of a token live on one rank, only the first of them is told of it."""

    def send(slots, rows, destination_TK, *rest):
        return original(slots, rows, destination_TK.masked_fill(rows.row_of_slot_TK < 0, -1), *rest)

    return send


def last_slot_lost(original):
    def plan(ids_TK, *rest, **options):
        lost = ids_TK.clone()
        lost[-1:, -1:] = -1
        return original(lost, *rest, **options)

    return plan


def frozen_rank_leaves_the_graph(original):
    """A rank whose own experts are all frozen thinks that it has no part in the backward."""

    def forward(self, hidden_TH, ids_TK, weights_TK):
        out = original(self, hidden_TH, ids_TK, weights_TK)
        return out.detach() if self.trainable is not None and self.trainable.held == 0 else out

    return forward


# Loading


def last_expert_not_loaded(original):
    def read(layer, *args):
        original(layer, *args)
        for _, parameter, seats in layer.expert_parameters():
            parameter.data[[s for s, expert in enumerate(seats) if expert == layer.spec.num_experts - 1]] = 0

    return read


def every_rank_loads_the_first_experts(original):
    def read(layer, *args):
        seat_ids = [span.seat_ids for span in layer.spans()]
        for span in layer.spans():
            span.seat_ids = tuple(range(len(span.seat_ids)))
        original(layer, *args)
        for span, ids in zip(layer.spans(), seat_ids, strict=True):
            span.seat_ids = ids

    return read


def gate_and_up_exchanged(original):
    return lambda self, parts: original(self, list(reversed(parts)))


# Scale, norm, clipping, decay


def loss_is_a_mean(original):
    def mean(logits, targets, **options):
        from moe_dist.train.losses import IGNORE

        return original(logits, targets, **options) / max(int((targets != IGNORE).sum()), 1)

    return mean


def labels_not_moved(original):
    return lambda labels: labels


def gradients_averaged_over_ranks(original):
    return lambda self, loss, *, last: original(self, loss / self.grid.world, last=last)


def norm_is_the_mean_of_ranks(original):
    def norm(self):
        square = sum(float(piece.gradient().double().pow(2).sum()) for piece in self._owned)
        total = torch.tensor([math.sqrt(square)])
        dist.all_reduce(total)
        return total.item() / dist.get_world_size(), False

    return norm


def norm_of_this_rank_alone(original):
    def norm(self):
        return math.sqrt(sum(float(piece.gradient().double().pow(2).sum()) for piece in self._owned)), False

    return norm


def norm_without_experts(original):
    def norm(self):
        owned = self._owned
        self._owned = [piece for piece in owned if not getattr(piece.parameter, "is_expert", False)]
        try:
            return original(self)
        finally:
            self._owned = owned

    return norm


def never_clipped(original):
    return lambda self, norm: None


def everything_decays(original):
    def groups(model, *, weight_decay):
        return [{**group, "weight_decay": weight_decay} for group in original(model, weight_decay=weight_decay)]

    return groups


def frozen_experts_train(original):
    return lambda model, grid, **options: original(model, grid, **{**options, "trainable": None})


def experts_taken_for_dense(original):
    """Expert tensors are broadcast and reduced over ranks that hold other experts."""

    def init(self, *args, **options):
        original(self, *args, **options)
        for parameter in self.parameters():
            parameter.is_expert = False

    return init


def only_the_last_micro_batch(original):
    def backward(self, loss):
        early = self._micro_batches < self.accumulation_steps - 1
        original(self, loss * 0 if early else loss)

    return backward


MOE, TRAIN, MODELS = "moe_dist.moe", "moe_dist.train", "moe_dist.models"
BACKWARD = "moe_dist.moe.mixture:_Mixture.backward"
SEAM = f"{TRAIN}.deepspeed_seam"

FAULTS = {
    "expert gradient x EP": Fault(BACKWARD, expert_gradient_times_ep),
    "expert gradient averaged": Fault(BACKWARD, expert_gradient_mean_over_ranks),
    "expert without rows": Fault(BACKWARD, stale_experts_without_rows, FOUR),
    "token without gradient": Fault(BACKWARD, first_token_without_gradient, ONE_RANK),
    "router detached": Fault(f"{MOE}.layer:mixture", router_weights_detached, ONE_RANK),
    "probabilities flipped": Fault(f"{MOE}.layer:plan_dispatch", probabilities_in_the_wrong_order, ONE_RANK),
    "balance loss x ranks": Fault(f"{TRAIN}.routing:Routing.loss_share", balance_loss_once_per_rank, BALANCED),
    "balance loss detached": Fault(f"{TRAIN}.routing:Routing.loss_share", balance_loss_without_graph, BALANCED),
    "balance loss of padding": Fault(f"{MOE}.balance:RealTokens.count", padding_in_the_balance_loss, BALANCED),
    "rows to another expert": Fault(f"{MOE}.layer:plan_dispatch", rows_sent_to_the_neighbour),
    "way back not reversed": Fault(f"{MOE}.hop:Hop.start_back", way_back_not_reversed, stops=True),
    "shared row, one slot": Fault(f"{MOE}.hop:_send_slots", slots_that_share_a_row_lost, stops=True),
    "probability gradients flipped": Fault(f"{MOE}.hop:Hop.pick_back", probability_gradients_in_the_wrong_order),
    "slot lost": Fault(f"{MOE}.layer:plan_dispatch", last_slot_lost, ONE_RANK),
    "frozen rank leaves": Fault(f"{MOE}.layer:MoEExperts.forward", frozen_rank_leaves_the_graph, ESFT, stops=True),
    "expert not loaded": Fault(f"{MODELS}.loading:_read_experts", last_expert_not_loaded),
    "experts doubled": Fault(f"{MODELS}.loading:_read_experts", every_rank_loads_the_first_experts),
    "gate and up exchanged": Fault(f"{MODELS}.layout:Concat.join", gate_and_up_exchanged, ONE_RANK),
    "loss is a mean": Fault(f"{TRAIN}.passes:target_loss_sum", loss_is_a_mean, ONE_RANK),
    "labels not moved": Fault(f"{TRAIN}.rows:next_labels", labels_not_moved, ONE_RANK),
    "averaged over ranks": Fault(f"{SEAM}:DeepSpeedBackend.backward", gradients_averaged_over_ranks),
    "norm averaged": Fault(f"{TRAIN}.engine:Engine._norm_and_flag", norm_is_the_mean_of_ranks),
    "norm of one rank": Fault(f"{TRAIN}.engine:Engine._norm_and_flag", norm_of_this_rank_alone),
    "norm without experts": Fault(f"{TRAIN}.engine:Engine._norm_and_flag", norm_without_experts),
    "never clipped": Fault(f"{TRAIN}.engine:Engine._clip", never_clipped, ONE_RANK),
    "everything decays": Fault(f"{TRAIN}.engine:parameter_groups", everything_decays, ONE_RANK),
    "frozen experts train": Fault(f"{MODELS}.cut:swap", frozen_experts_train, ESFT),
    "experts taken for dense": Fault(f"{MOE}.experts:ExpertSpan.__init__", experts_taken_for_dense),
    "last micro-batch only": Fault(f"{TRAIN}.engine:Engine.backward", only_the_last_micro_batch, ONE_RANK),
    **AXIS_FAULTS,
}
