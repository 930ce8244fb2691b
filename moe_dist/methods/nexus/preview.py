"""What a new expert will get before the first step: a top-1 expert without tokens has no language-model gradient.

From the router alone: how long its row is beside the others, and how close it points to one of them. From documents,
with the extended model: the share of tokens that it is sent, source by source.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from moe_dist.data.encode import Encoder
from moe_dist.data.loader import train_sources
from moe_dist.data.records import RecordLog
from moe_dist.errors import UserError
from moe_dist.methods.nexus.config import NexusConfig
from moe_dist.methods.nexus.embedders import tokenizer_of
from moe_dist.models import load_model, moe_layers

SCARCE = 0.01  # a share of its own domain below this leaves an expert to the load-balance loss


@dataclass(frozen=True)
class Preview:
    """name: of the new expert. norm_ratio, cosine: layer by layer, its row's length over the mean of the others, and
    its largest cosine with one of them. shares: source -> layer by layer, the share of tokens that go to it."""

    name: str
    norm_ratio: list[float]
    cosine: list[float]
    shares: dict[str, list[float]]

    @property
    def warning(self) -> str | None:
        """What to do where the new expert would get next to nothing of its own domain; None where it gets enough."""
        own = self.shares.get(self.name)
        if own is None or sum(own) / len(own) >= SCARCE:
            return None
        return (
            f"{self.name} gets {sum(own) / len(own):.2%} of its own domain's tokens: it cannot learn from them before "
            "the load-balance loss brings it some. Keep moe.balance_loss on with moe.balance_coef above 0"
        )

    def render(self) -> str:
        def over_layers(values: list[float], form: str) -> str:
            return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}} over layers)"

        lines = [
            f"router row of {self.name}: length over that of the others {over_layers(self.norm_ratio, '.2f')}, "
            f"largest cosine with one of them {over_layers(self.cosine, '+.2f')}"
        ]
        for source, shares in self.shares.items():
            whose = "its own" if source == self.name else "another"
            lines.append(f"share of {source} ({whose} domain) before any step: {over_layers(shares, '.1%')}")
        if self.name not in self.shares:
            lines.append(f"its share is not known: there is no source {self.name} in data.train")
        return "\n".join(lines + ([f"warning: {self.warning}"] if self.warning else []))


@torch.no_grad()
def preview(folder: str | Path, config: NexusConfig) -> Preview:
    """Look at the last expert of the Nexus model in `folder`: nexus.documents documents of each data.train source."""
    model = load_model(folder)
    ratios, cosines = [], []
    for layer in model.model.layers:
        *old, new_H = layer.mlp.gate.rows()
        old_EH = torch.stack(old)
        ratios.append((new_H.norm() / old_EH.norm(dim=1).mean()).item())
        cosines.append(F.cosine_similarity(old_EH, new_H[None]).max().item())
    names = model.config.expert_names
    return Preview(names[-1], ratios, cosines, _shares(model, folder, config))


def _shares(model, folder: str | Path, config: NexusConfig) -> dict[str, list[float]]:
    sources = train_sources(config.data)
    if not sources:
        return {}
    encoder = Encoder(tokenizer_of(config.nexus.tokenizer or folder))
    layers = [layer for _, layer in moe_layers(model)]
    shares = {}
    for source in sources:
        for layer in layers:
            layer.statistics.reset()
        book = RecordLog(on_bad=config.data.on_bad_record)
        documents = islice(source.records(book), config.nexus.documents)
        for ids, _ in encoder.encode(documents, book):
            tokens = torch.from_numpy(ids[: config.data.seq_len].astype(np.int64))[None]
            model.model(input_ids=tokens, use_cache=False)
        counts = [layer.statistics.total(None)[:-1].double() for layer in layers]
        if not counts[0].sum():
            raise UserError(f"data.train: the domain {source.name} has no document with a token")
        shares[source.name] = [(count_E[-1] / count_E.sum()).item() for count_E in counts]
    return shares
