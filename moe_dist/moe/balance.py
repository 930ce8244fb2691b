"""Balance losses of the router, by name, and the z-loss: what each means, as a formula, and what one rank computes.

Every function here returns *this rank's share*: a scalar with gradient such that the sum of the shares over the ranks
that see different tokens is the loss of one single process that sees all those tokens in one micro-batch. The gradient
of that sum is the single process's gradient, to rounding: an expert's load is a constant to the gradient, so loads are
integers summed over ranks without autograd, while probabilities stay where their tokens are and are never gathered. The
loss of an optimizer step is the mean over its micro-batches: the caller divides each share by their number.

Where the rows of a micro-batch are cut over several ranks, each of them has the probabilities of its slice of the
tokens, and the loads of a micro-batch or of a sequence are summed over those ranks first. "A rank" below is a data
rank: all those that share rows.

Notation: real tokens only (padding is in no sum, no count and no mean); c_i slots given to expert i; p_ti probability
of expert i for token t; n tokens, K slots each, E experts.

    form            the loss of a micro-batch                                                    balanced  over layers
    hf              E · Σ_i (Σ_layers c_i / R) (Σ_layers Σ_t p_ti / R),  R = layers · n           K         one value
    layer_micro     mean over ranks of  E · Σ_i (c_i / Kn) (Σ_t p_ti / n),  each rank's own       1         sum
    layer_sequence  mean over sequences of the same within each sequence                          1         sum
    layer_global    the same over all ranks, c_i and n of c_i also over the step so far           1         sum
    z_loss          mean over tokens of (log Σ_i exp logit_ti)²                                   -         sum

"Balanced" is the value at a uniform load, whatever the probabilities. A per-layer form weighs on each layer as its
paper has it (every layer adds its loss), so with L layers a coefficient acts L·/K times as strongly as in `hf`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F

from moe_dist.errors import UserError
from moe_dist.parallel.collectives import sum_over
from moe_dist.parallel.grid import Grid
from moe_dist.parallel.sequence import own_slice


@dataclass(frozen=True)
class RouterOutput:
    """What one layer's router said about the tokens of a micro-batch.

    logits_TE: with graph, any float dtype (computed with in float32 or wider). ids_TK: the experts it chose; a
    negative id is a dropped slot. score: "softmax" or "sigmoid", None where nobody knows.
    """

    logits_TE: torch.Tensor
    ids_TK: torch.Tensor
    score: str | None = "softmax"
    name: str = "router"

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[1]


@dataclass(frozen=True)
class RealTokens:
    """Which tokens of a micro-batch are real, which sequence each belongs to, and how many there are over all ranks.

    real_T, sequence_T: of each token of this rank's slice, whether it is real (bool) and its sequence (int64, also of
    padding). tokens_S: real tokens of each sequence of the whole rows, int64. total and total_sequences are float64
    scalars over all data ranks, sequences of padding alone not counted.
    """

    real_T: torch.Tensor
    sequence_T: torch.Tensor
    tokens_S: torch.Tensor
    total: torch.Tensor
    total_sequences: torch.Tensor

    @staticmethod
    def count(mask_BL: torch.Tensor, grid: Grid, *, position_ids_BL: torch.Tensor | None = None) -> RealTokens:
        """From the mask of a data rank's whole rows (nonzero = real token). Collective over the data group.

        A sequence is a row of the batch. With `position_ids_BL` (int, zero at each document's first token) it is a
        document, so that packing several of them into a row changes nothing.
        """
        real_BL = mask_BL.bool()
        starts_BL = torch.zeros_like(real_BL)
        starts_BL[:, :1] = True
        num_sequences = len(real_BL)
        if position_ids_BL is not None:
            starts_BL |= position_ids_BL == 0
            num_sequences = int(starts_BL.sum())
        sequence_BL = (starts_BL.flatten().cumsum(0) - 1).view_as(real_BL)
        tokens_S = torch.zeros(num_sequences, dtype=torch.int64, device=real_BL.device)
        tokens_S.index_add_(0, sequence_BL.flatten(), real_BL.flatten().long())
        # Ranks that share rows all know them whole: over the data group each is counted once.
        totals = sum_over(torch.stack([tokens_S.sum(), (tokens_S > 0).sum()]), grid.data_group).double()
        real_T, sequence_T = (own_slice(x_BL, grid).flatten() for x_BL in (real_BL, sequence_BL))
        return RealTokens(real_T, sequence_T, tokens_S, totals[0], totals[1])


@dataclass
class StepLoad:
    """Load of every layer over all ranks and the micro-batches of an optimizer step so far (for `layer_global`)."""

    counts_LE: list[torch.Tensor] | None = None
    tokens: torch.Tensor | float = 0.0

    def add(self, counts_LE: list[torch.Tensor], tokens: torch.Tensor) -> None:
        known = self.counts_LE or [torch.zeros_like(counts_E) for counts_E in counts_LE]
        self.counts_LE = [old_E + new_E for old_E, new_E in zip(known, counts_LE, strict=True)]
        self.tokens = self.tokens + tokens


def hf(layers: list[RouterOutput], tokens: RealTokens, grid: Grid) -> torch.Tensor:
    """Share of transformers' `load_balancing_loss_func` over all layers and the batch of all ranks. Collective.

    As transformers does: probabilities are a softmax of the logits, and the load is that of the K most probable
    experts, whatever score, bias or group limit the router chose by. All layers must have the same E.
    """
    parts = hf_parts(layers, tokens, grid, routers=len(layers))
    return parts.share(parts.load_E)


@dataclass(frozen=True)
class HfParts:
    """What the layers of one pipeline stage have to do with `hf`, whose product is taken of sums over all layers.

    mass_E: Σ_layers Σ_t p_ti over this rank's tokens, with gradient. load_E: Σ_layers c_i over the ranks of the stage,
    int64. rows: R = routers of all stages · n, a float64 scalar. A stage without routers has zeros.
    """

    mass_E: torch.Tensor
    load_E: torch.Tensor
    rows: torch.Tensor

    def weight_E(self, load_E: torch.Tensor) -> torch.Tensor:
        """The gradient of the loss at `mass_E`, E · c_i / R², from the load of all layers. The ratio is in float64."""
        rows = _at_least_one(self.rows, torch.float64)
        return (len(load_E) * (load_E / rows) / rows).to(self.mass_E.dtype)

    def share(self, load_E: torch.Tensor) -> torch.Tensor:
        """This rank's share of the loss, as far as its stage's layers go, from the load of all layers."""
        return (self.mass_E * self.weight_E(load_E)).sum()


def hf_parts(layers: list[RouterOutput], tokens: RealTokens, grid: Grid, *, routers: int) -> HfParts:
    """The sums of `hf` over these layers, of `routers` that the model has. Collective over the stage."""
    assert len({layer.num_experts for layer in layers}) == 1, "hf concatenates layers: all need the same experts"
    probs = [_probabilities(layer.logits_TE, "softmax", tokens.real_T) for layer in layers]
    local_E = sum(
        _load(probs_TE.topk(layer.ids_TK.shape[1]).indices, tokens.real_T, layer.num_experts)
        for layer, probs_TE in zip(layers, probs, strict=True)
    )
    mass_E = sum(probs_TE.sum(0) for probs_TE in probs)
    return HfParts(mass_E, sum_over(local_E, grid.stage_group), routers * tokens.total)


def layer_micro(layers: list[RouterOutput], tokens: RealTokens, grid: Grid) -> torch.Tensor:
    """Share of Switch Transformer's loss (eqs. 4 to 6) per layer, with each rank's micro-batch by itself.

    An exchange only between ranks that share rows. The loss is the mean over *all* ranks: one without a real token
    counts, with loss zero. It depends on how the batch is dealt: the smaller the micro-batch, the more evenly every
    little part of it has to be spread.
    """
    own = tokens.tokens_S.sum()
    local = [_load(layer.ids_TK, tokens.real_T, layer.num_experts) for layer in layers]
    share = 0.0
    for layer, load_E in zip(layers, _each_over(local, grid.slice_group), strict=True):
        probs_TE = _layer_probabilities(layer, tokens)
        slots = layer.ids_TK.shape[1] * own
        share = share + layer.num_experts * _weighted(probs_TE.sum(0), own, load_E, slots)
    return share / grid.data


def layer_sequence(layers: list[RouterOutput], tokens: RealTokens, grid: Grid) -> torch.Tensor:
    """Share of the sequence-wise loss of DeepSeek-V2 and V3 per layer: the mean over the sequences of all ranks.

    Every sequence with at least one real token weighs the same, whatever its length.
    """
    tokens_S1 = tokens.tokens_S.unsqueeze(1)
    local = []
    for layer in layers:
        cell_TK = tokens.sequence_T.unsqueeze(1) * layer.num_experts + layer.ids_TK
        cell_TK = torch.where(layer.ids_TK < 0, -1, cell_TK)
        local.append(_load(cell_TK, tokens.real_T, len(tokens_S1) * layer.num_experts))
    share = 0.0
    for layer, load_N in zip(layers, _each_over(local, grid.slice_group), strict=True):
        experts, top_k = layer.num_experts, layer.ids_TK.shape[1]
        probs_TE = _layer_probabilities(layer, tokens)
        mass_SE = probs_TE.new_zeros(len(tokens_S1), experts).index_add(0, tokens.sequence_T, probs_TE)
        share = share + experts * _weighted(mass_SE, tokens_S1, load_N.view(-1, experts), top_k * tokens_S1)
    return share / _at_least_one(tokens.total_sequences, share.dtype)


def layer_global(layers: list[RouterOutput], tokens: RealTokens, grid: Grid, step: StepLoad) -> torch.Tensor:
    """Share of the loss per layer over the batch of all ranks (global-batch balancing). Collective.

    The load is that of the optimizer step so far, this micro-batch included, so that late micro-batches are judged by
    the whole batch; `step`, fresh at each step, is updated. The probabilities are this micro-batch's.
    """
    local = [_load(layer.ids_TK, tokens.real_T, layer.num_experts) for layer in layers]
    step.add(_each_over(local, grid.stage_group), tokens.total)
    share = 0.0
    for layer, load_E in zip(layers, step.counts_LE, strict=True):
        mass_E, slots = _layer_probabilities(layer, tokens).sum(0), layer.ids_TK.shape[1] * step.tokens
        share = share + layer.num_experts * _weighted(mass_E, tokens.total, load_E, slots)
    return share


def z_loss(layers: list[RouterOutput], tokens: RealTokens) -> torch.Tensor:
    """Share of ST-MoE's router z-loss, summed over layers, the mean over the tokens of all ranks.

    It holds the logits near zero, where rounding is finest.
    """
    share = 0.0
    for layer in layers:
        logits_TE = _masked_logits(layer.logits_TE, tokens.real_T)
        share = share + logits_TE.logsumexp(1).masked_fill(~tokens.real_T, 0.0).square().sum()
    return share / _at_least_one(tokens.total, share.dtype)


def _layer_probabilities(layer: RouterOutput, tokens: RealTokens) -> torch.Tensor:
    if layer.score is None:
        raise UserError(
            f"{layer.name}: how this family scores its experts is not described, which per-layer balance losses need; "
            "use moe.balance_loss=hf or none, or say it in FAMILIES of moe_dist/models/families.py"
        )
    return _probabilities(layer.logits_TE, layer.score, tokens.real_T)


def _probabilities(logits_TE: torch.Tensor, score: str, real_T: torch.Tensor) -> torch.Tensor:
    """Scores that sum to 1 over the experts, `[T,E]`, float32 or wider; rows of padding are zero.

    A sigmoid router's scores are normalised in the logarithm: s_i / Σ s_j = softmax_i(log s). No epsilon is needed
    then, and a router cannot shrink the loss by driving all its scores towards zero.
    """
    logits_TE = _masked_logits(logits_TE, real_T)
    if score == "sigmoid":
        logits_TE = F.logsigmoid(logits_TE)
    else:
        assert score == "softmax", f"unknown score function {score!r}"
    return logits_TE.softmax(1).masked_fill(~real_T[:, None], 0.0)


def _masked_logits(logits_TE: torch.Tensor, real_T: torch.Tensor) -> torch.Tensor:
    """Logits in float32 or wider, zero for padding: attention without a key may have left NaN there, and NaN times a
    zero gradient is NaN, so padding is masked before anything is computed and not only after."""
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    return logits_TE.to(wide).masked_fill(~real_T[:, None], 0.0)


def count_slots(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Slots given to each expert, int64 `[E]`; negative ids are not counted. Does not wait for the device."""
    flat_N = ids.flatten().long()
    flat_N = torch.where(flat_N < 0, num_experts, flat_N)  # one more place, which is left out at the end
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, flat_N, torch.ones_like(flat_N))[:num_experts]


def _load(ids_TK: torch.Tensor, real_T: torch.Tensor, num_experts: int) -> torch.Tensor:
    return count_slots(ids_TK.masked_fill(~real_T[:, None], -1), num_experts)


def _each_over(loads: list[torch.Tensor], group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """The sum of each load over `group`, all in one exchange."""
    if group is None:
        return loads
    return list(sum_over(torch.cat(loads), group).split([len(load) for load in loads]))


def _weighted(mass: torch.Tensor, tokens: torch.Tensor, load: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Σ (mass / tokens) · (load / slots). The load is a constant to the gradient; its ratio is taken in float64."""
    fraction = load / _at_least_one(slots, torch.float64)
    return (mass / _at_least_one(tokens, mass.dtype) * fraction.to(mass.dtype)).sum()


def _at_least_one(count: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A count as a divisor. Where it is zero so is what it divides, and the result is an exact zero."""
    return count.to(dtype).clamp(min=1)
