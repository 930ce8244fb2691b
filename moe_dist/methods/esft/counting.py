"""Token and gate scores of a layer's experts, counted over a sample of a task.

With the chosen experts and their weights of every token, the paper's equations 6 and 7:

  gate score   of an expert: its weight, zero where it was not chosen, as a mean over tokens
  token score  of an expert: the share of the tokens' choices that fell on it; over all experts they add up to 1

"per_token" takes the mean over all tokens at once, as the published scores do; "per_sequence" first over the tokens of
each sequence, then over sequences, as the paper writes it. The two agree where all sequences are equally long.
Sums are kept, never means, so that samples may be split over batches and ranks in any way.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from moe_dist.errors import UserError

SCORE_NORMS = ("per_token", "per_sequence")


class ExpertCounter:
    """Adds up the routing of one layer. Counts are int64, sums of weights float64.

    counts_E: choices of each expert. gate_E: sum of its weights. count_share_E, gate_share_E: the same with every
    token weighted by 1 / length of its sequence. tokens, sequences: scalars, real ones only.
    """

    def __init__(self, num_experts: int, *, device: torch.device | str = "cpu"):
        self.num_experts, self.top_k = num_experts, 0
        self.counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.gate_E, self.count_share_E, self.gate_share_E = torch.zeros(3, num_experts, dtype=torch.float64).to(device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.sequences = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, ids_BLK: torch.Tensor, weights_BLK: torch.Tensor, mask_BL: torch.Tensor | None = None) -> None:
        """Add B sequences: chosen experts and weights of each token.

        Tokens with negative ids (padding), or False in the bool `mask_BL`, count nowhere. A sequence without a token
        is none.
        """
        batch, _, top_k = ids_BLK.shape
        assert self.top_k in (0, top_k), "a layer gives each token one and the same number of experts"
        self.top_k = top_k
        real_BL = (ids_BLK >= 0).all(-1)
        if mask_BL is not None:
            real_BL &= mask_BL
        ids_BLK = ids_BLK.long()
        row_B = torch.arange(batch, device=ids_BLK.device)[:, None, None]
        # One bin for each sequence and expert, and a last one for what does not count.
        bin_N = torch.where(real_BL[..., None], row_B * self.num_experts + ids_BLK, batch * self.num_experts).flatten()
        counts = torch.zeros(batch * self.num_experts + 1, dtype=torch.int64, device=bin_N.device)
        counts_BE = counts.index_add_(0, bin_N, torch.ones_like(bin_N))[:-1].view(batch, -1)
        gates = torch.zeros(batch * self.num_experts + 1, dtype=torch.float64, device=bin_N.device)
        gate_BE = gates.index_add_(0, bin_N, weights_BLK.detach().double().flatten())[:-1].view(batch, -1)

        length_B = real_BL.sum(-1)
        share_B = 1.0 / length_B.clamp(min=1).double()
        self.counts_E += counts_BE.sum(0)
        self.gate_E += gate_BE.sum(0)
        self.count_share_E += (counts_BE * share_B[:, None]).sum(0)
        self.gate_share_E += (gate_BE * share_B[:, None]).sum(0)
        self.tokens += length_B.sum()
        self.sequences += (length_B > 0).sum()

    def token_scores(self, score_norm: str = "per_token") -> torch.Tensor:
        """float64 `[E]`; they add up to 1."""
        count_E, whole = self._parts(self.counts_E, self.count_share_E, score_norm)
        return count_E.double() / (whole * self.top_k)

    def gate_scores(self, score_norm: str = "per_token") -> torch.Tensor:
        """float64 `[E]`; they add up to the mean weight that a token gives to all its experts."""
        gate_E, whole = self._parts(self.gate_E, self.gate_share_E, score_norm)
        return gate_E / whole

    def _parts(self, total_E: torch.Tensor, share_E: torch.Tensor, score_norm: str) -> tuple[torch.Tensor, int]:
        if score_norm not in SCORE_NORMS:
            raise UserError(f"score_norm={score_norm!r}: has to be one of {', '.join(SCORE_NORMS)}")
        if not int(self.tokens):
            raise UserError("there is no token to score the experts by")
        return (total_E, int(self.tokens)) if score_norm == "per_token" else (share_E, int(self.sequences))


def sum_over_ranks(counters: Iterable[ExpertCounter], group: dist.ProcessGroup | None) -> None:
    """Add the counts of all ranks of `group` up, on every rank, in place. Collective; None is one rank.

    Every rank brings the same layers in the same order, and each of its tokens only once.
    """
    counters = list(counters)
    if group is None or not counters:
        return
    whole = torch.cat([t.reshape(-1) for c in counters for t in (c.counts_E, c.tokens, c.sequences)])
    sums = torch.cat([t for c in counters for t in (c.gate_E, c.count_share_E, c.gate_share_E)])
    top_k = torch.tensor([c.top_k for c in counters], device=whole.device)  # 0 where a rank has seen nothing
    dist.all_reduce(whole, group=group)
    dist.all_reduce(sums, group=group)
    dist.all_reduce(top_k, op=dist.ReduceOp.MAX, group=group)
    for counter, most in zip(counters, top_k.tolist(), strict=True):
        size = counter.num_experts
        counter.counts_E, ends, whole = whole[:size], whole[size : size + 2], whole[size + 2 :]
        counter.tokens, counter.sequences = ends
        counter.gate_E, counter.count_share_E, counter.gate_share_E = sums[: 3 * size].view(3, size)
        sums = sums[3 * size :]
        counter.top_k = most
