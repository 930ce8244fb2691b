"""Scores of a task's experts as a `Summary`: from a model at work, from router logs, or from counters of one's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_dist.config.expert_files import Summary
from moe_dist.errors import UserError
from moe_dist.methods.esft.counting import ExpertCounter, sum_over_ranks
from moe_dist.methods.esft.router_logs import find_router_logs, read_router_log
from moe_dist.models.families import find_experts, unknown_family
from moe_dist.models.surgery import moe_layers
from moe_dist.moe.layer import MoEExperts
from moe_dist.parallel.grid import Grid
from moe_dist.train.trainable import layer_index

COUNT_TOKENS = ("no_pad", "labels_only")


class RoutingScores:
    """Listens to the routing of a model, whether its experts are ours or transformers' own.

    with RoutingScores(model, grid) as listener:
        for batch in batches:
            listener.see(batch)
            model(...)
    summary = listener.summary()

    count_tokens: "no_pad" counts every real token; "labels_only" those that are labels, as the answers of a chat are.
    A sequence, where scores are averaged by sequence, is a row of a batch.
    """

    def __init__(self, model: nn.Module, grid: Grid | None = None, *, count_tokens: str = "no_pad"):
        if count_tokens not in COUNT_TOKENS:
            raise UserError(f"count_tokens={count_tokens!r}: has to be one of {', '.join(COUNT_TOKENS)}")
        self.grid, self.count_tokens = grid or Grid.single(), count_tokens
        self.counters: dict[str, ExpertCounter] = {}
        self._recorders = []
        self._mask_BL: torch.Tensor | None = None
        layers = moe_layers(model)
        for name, module in layers or find_experts(model):
            index = str(layer_index(name))
            if index in self.counters:
                raise UserError(
                    f"two MoE layers of this model have the index {index}; their scores cannot be told apart"
                )
            count = module.spec.num_experts if layers else module.num_experts
            counter = self.counters[index] = ExpertCounter(count, device=self.grid.device)
            self._recorders.append((module, self._recorder(counter)))
        if not self.counters:
            raise unknown_family(getattr(model.config, "model_type", None))
        self._hooks = []

    def __enter__(self) -> RoutingScores:
        for module, record in self._recorders:
            if isinstance(module, MoEExperts):
                module.recorders.append(record)
            else:
                self._hooks.append(module.register_forward_pre_hook(lambda _, given, record=record: record(*given[1:])))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module, record in self._recorders:
            if isinstance(module, MoEExperts):
                module.recorders.remove(record)

    def see(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Tell which tokens of the coming forward count: needs `attention_mask` `[B,L]`, or `labels` for them."""
        labels = self.count_tokens == "labels_only"
        self._mask_BL = batch["labels"] != -100 if labels else batch["attention_mask"].bool()

    def summary(self, *, score_norm: str = "per_token", extra: Mapping[str, Any] | None = None) -> Summary:
        """The scores over the tokens of all data ranks. Collective; once at the end, since the counts are added up."""
        sum_over_ranks(self.counters.values(), self.grid.data_group)
        return summarise(
            self.counters, score_norm=score_norm, extra={"count_tokens": self.count_tokens, **(extra or {})}
        )

    def _recorder(self, counter: ExpertCounter):
        def record(ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
            assert self._mask_BL is not None, "see(batch) comes before its forward"
            shape = (*self._mask_BL.shape, -1)
            counter.add(ids_TK.view(shape), weights_TK.reshape(shape), self._mask_BL)

        return record


def summarise(
    counters: Mapping[str, ExpertCounter], *, score_norm: str = "per_token", extra: Mapping[str, Any] | None = None
) -> Summary:
    """Scores of all layers, and what the official format lacks: tokens, counts, gate mass of each layer.

    Raises UserError where nothing was counted, and for an unknown `score_norm`.
    """
    first = next(iter(counters.values()))
    gate = {layer: counter.gate_scores(score_norm) for layer, counter in counters.items()}
    token = {layer: counter.token_scores(score_norm) for layer, counter in counters.items()}
    return Summary(
        {
            kind: {layer: s.tolist() for layer, s in scores.items()}
            for kind, scores in (("token", token), ("gate", gate))
        },
        {
            "score_norm": score_norm,
            "tokens": int(first.tokens),
            "sequences": int(first.sequences),
            "top_k": first.top_k,
            "gate_mass": {layer: math.fsum(scores) for layer, scores in gate.items()},
            "token_counts": {layer: counter.counts_E.tolist() for layer, counter in counters.items()},
            **(extra or {}),
        },
    )


def score_logs(folder: str | Path, *, top_k: int, num_experts: int, score_norm: str = "per_token") -> Summary:
    """Scores from the router logs below a folder, all ranks of a layer together. Each forward pass is a sequence.

    top_k: experts of a token; num_experts: of a layer; neither stands in the logs. Raises UserError for damaged logs,
    ids that do not exist, and layers that have seen different numbers of tokens.
    """
    counters: dict[str, ExpertCounter] = {}
    for layer, paths in find_router_logs(folder).items():
        counter = counters[layer] = ExpertCounter(num_experts)
        for path in paths:
            for number, (ids, weights) in enumerate(read_router_log(path, top_k=top_k).passes, start=1):
                if ids.max() >= num_experts:
                    raise UserError(f"{path}:{number}: expert {ids.max()} does not exist, there are {num_experts}")
                counter.add(torch.from_numpy(ids)[None], torch.from_numpy(weights)[None])
    seen = {layer: int(counter.tokens) for layer, counter in counters.items()}
    if len(set(seen.values())) > 1:
        (a, few), (b, many) = (pick(seen.items(), key=lambda item: item[1]) for pick in (min, max))
        raise UserError(f"{folder}: layer {a} has the routing of {few} tokens, layer {b} of {many}; is a log missing?")
    return summarise(counters, score_norm=score_norm, extra={"count_tokens": "all"})
