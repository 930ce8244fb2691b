"""Balance losses of the router, by name, and the z-loss: what each means, as a formula, and what one rank computes.

Every function here returns *this rank's share*: a scalar with gradient such that the sum of the shares over the ranks
that see different tokens is the loss of one single process that sees all those tokens in one micro-batch. The gradient
of that sum is the single process's gradient, to rounding: an expert's load is a constant to the gradient, so loads are
integers summed over ranks without autograd, while probabilities stay where their tokens are and are never gathered. The
loss of an optimizer step is the mean over its micro-batches: the caller divides each share by their number.

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
from torch.nn import functional as F

from moe_dist.errors import UserError
from moe_dist.parallel.collectives import sum_over
from moe_dist.parallel.grid import Grid


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

    real_T bool; sequence_T int64, 0 <= value < num_sequences (also for padding); total and total_sequences are
    float64 scalars over the ranks of the data group, sequences of padding alone not counted.
    """

    real_T: torch.Tensor
    sequence_T: torch.Tensor
    num_sequences: int
    total: torch.Tensor
    total_sequences: torch.Tensor

    @staticmethod
    def count(mask_BL: torch.Tensor, grid: Grid, *, position_ids_BL: torch.Tensor | None = None) -> RealTokens:
        """From the mask of a batch (nonzero = real token). Collective over the data group.

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
        real_T, sequence_T = real_BL.flatten(), starts_BL.flatten().cumsum(0) - 1
        tokens_S = _tokens_of_sequences(real_T, sequence_T, num_sequences)
        totals = sum_over(torch.stack([tokens_S.sum(), (tokens_S > 0).sum()]), grid.data_group).double()
        return RealTokens(real_T, sequence_T, num_sequences, totals[0], totals[1])

    def tokens_S(self) -> torch.Tensor:
        """Real tokens of each of this rank's sequences, int64."""
        return _tokens_of_sequences(self.real_T, self.sequence_T, self.num_sequences)


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
    assert len({layer.num_experts for layer in layers}) == 1, "hf concatenates layers: all need the same experts"
    probs = [_probabilities(layer.logits_TE, "softmax", tokens.real_T) for layer in layers]
    local_E = sum(
        _load(probs_TE.topk(layer.ids_TK.shape[1]).indices, tokens.real_T, layer.num_experts)
        for layer, probs_TE in zip(layers, probs, strict=True)
    )
    load_E = sum_over(local_E, grid.data_group)
    mass_E = sum(probs_TE.sum(0) for probs_TE in probs)
    rows = len(layers) * tokens.total
    return len(load_E) * _weighted(mass_E, rows, load_E, rows)


def layer_micro(layers: list[RouterOutput], tokens: RealTokens, grid: Grid) -> torch.Tensor:
    """Share of Switch Transformer's loss (eqs. 4 to 6) per layer, with each rank's micro-batch by itself.

    No exchange. The loss is the mean over *all* ranks: one without a real token counts, with loss zero. It depends on
    how the batch is dealt: the smaller the micro-batch, the more evenly every little part of it has to be spread.
    """
    own = tokens.real_T.sum()
    share = 0.0
    for layer in layers:
        probs_TE = _layer_probabilities(layer, tokens)
        load_E = _load(layer.ids_TK, tokens.real_T, layer.num_experts)
        slots = layer.ids_TK.shape[1] * own
        share = share + layer.num_experts * _weighted(probs_TE.sum(0), own, load_E, slots)
    return share / grid.data


def layer_sequence(layers: list[RouterOutput], tokens: RealTokens, grid: Grid) -> torch.Tensor:
    """Share of the sequence-wise loss of DeepSeek-V2 and V3 per layer: the mean over the sequences of all ranks.

    Every sequence with at least one real token weighs the same, whatever its length.
    """
    tokens_S1 = tokens.tokens_S().unsqueeze(1)
    share = 0.0
    for layer in layers:
        experts, top_k = layer.num_experts, layer.ids_TK.shape[1]
        probs_TE = _layer_probabilities(layer, tokens)
        mass_SE = probs_TE.new_zeros(len(tokens_S1), experts).index_add(0, tokens.sequence_T, probs_TE)
        cell_TK = tokens.sequence_T.unsqueeze(1) * experts + layer.ids_TK
        cell_TK = torch.where(layer.ids_TK < 0, -1, cell_TK)
        load_SE = _load(cell_TK, tokens.real_T, len(tokens_S1) * experts).view(-1, experts)
        share = share + experts * _weighted(mass_SE, tokens_S1, load_SE, top_k * tokens_S1)
    return share / _at_least_one(tokens.total_sequences, share.dtype)


def layer_global(layers: list[RouterOutput], tokens: RealTokens, grid: Grid, step: StepLoad) -> torch.Tensor:
    """Share of the loss per layer over the batch of all ranks (global-batch balancing). Collective.

    The load is that of the optimizer step so far, this micro-batch included, so that late micro-batches are judged by
    the whole batch; `step`, fresh at each step, is updated. The probabilities are this micro-batch's.
    """
    local = [_load(layer.ids_TK, tokens.real_T, layer.num_experts) for layer in layers]
    load_LE = sum_over(torch.cat(local), grid.data_group).split([len(load_E) for load_E in local])
    step.add(list(load_LE), tokens.total)
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


def _tokens_of_sequences(real_T: torch.Tensor, sequence_T: torch.Tensor, num_sequences: int) -> torch.Tensor:
    tokens_S = torch.zeros(num_sequences, dtype=torch.int64, device=real_T.device)
    return tokens_S.index_add_(0, sequence_T, real_T.long())


def _weighted(mass: torch.Tensor, tokens: torch.Tensor, load: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Σ (mass / tokens) · (load / slots). The load is a constant to the gradient; its ratio is taken in float64."""
    fraction = load / _at_least_one(slots, torch.float64)
    return (mass / _at_least_one(tokens, mass.dtype) * fraction.to(mass.dtype)).sum()


def _at_least_one(count: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A count as a divisor. Where it is zero so is what it divides, and the result is an exact zero."""
    return count.to(dtype).clamp(min=1)
