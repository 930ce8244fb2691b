"""What both sides of a proof work on: rows of tokens that fill the layout, and the run configuration of the cut model.

A row holds documents as the data module packs them: tokens, then padding as one more document, position ids that start
anew in each, and no label on a document's first token. Documents have unequal lengths and unequal numbers of labels;
one row has a single label.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_dist.config.checks import accumulation
from moe_dist.config.schema import RunConfig, TrainableSection
from moe_dist.data.attention import PACKED_ATTENTION
from moe_dist.data.packing import IGNORE, assemble, collate
from moe_dist.parallel.grid import Grid

RATES = (1e-3, 2e-3, 5e-4)  # learning rates of the three steps
EPS = 1e-6  # AdamW's, at least: below it a gradient that is zero but for rounding would move weights
LEAST, MOST = 12, 128  # tokens of a row
MICRO_BATCH, ACCUMULATION = 2, 2  # at most so many rows in a pass, and passes in a step (more for a pipeline)


@dataclass(frozen=True)
class Problem:
    """config: that of the cut model's run. kept: the layers of the whole model that it has. vocabulary: ids of tokens.

    layers: how many the whole model has. rows: of a step over all data ranks, `micro_batches` times
    `config.train.micro_batch_size` for each. length: tokens of a row. packed: whether rows hold several documents.
    bf16: whether the run computes in it. work: the folder of the proof's files. notes: what is not as the user's config
    has it.
    """

    config: RunConfig
    kept: tuple[int, ...]
    layers: int
    layers_path: str
    vocabulary: int
    pad_id: int
    micro_batches: int
    rows: int
    length: int
    packed: bool
    bf16: bool
    work: Path
    notes: tuple[str, ...] = ()

    def documents(self, step: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Of each row of a step its documents: (input_ids, labels), int64 `[length]` without padding."""
        generator = torch.Generator().manual_seed(1000 + step)
        made = []
        for row in range(self.rows):
            length = self.length - (row * 5) % (self.length // 2)
            first = max(3, (2 + row) * length // 7 % length) if self.packed else length
            lengths = [first, length - first] if length - first >= 2 else [length]
            documents = []
            for place, count in enumerate(lengths):
                ids = torch.randint(0, self.vocabulary, (count,), generator=generator)
                ids[ids == self.pad_id] = (self.pad_id + 1) % self.vocabulary
                labels = ids.clone()
                labels[: 1 + (row * 3 + place) % (count - 1)] = IGNORE
                if row % 8 == 3:
                    labels[: count - (place == 0)] = IGNORE
                documents.append((ids, labels))
            made.append(documents)
        return made

    def batches(self, step: int, grid: Grid) -> tuple[list[dict[str, torch.Tensor]], list[list[int]]]:
        """This data rank's micro-batches of a step, as the data module makes them, and the numbers of their rows."""
        rows, size = self.documents(step), self.config.train.micro_batch_size
        batches, numbers = [], []
        for start in range(grid.data_rank * size, self.rows, grid.data * size):
            numbers.append(list(range(start, start + size)))
            made = [
                assemble([(ids.numpy(), (labels != IGNORE).numpy()) for ids, labels in rows[row]], self.length, 0)
                for row in numbers[-1]
            ]
            batches.append({name: tensor.to(grid.device) for name, tensor in collate(made).items()})
        return batches, numbers

    def labels(self, step: int) -> int:
        """Label tokens of a step over all rows."""
        return sum(int((labels[1:] != IGNORE).sum()) for row in self.documents(step) for _, labels in row)

    def original(self, name: str) -> str:
        """A name of the cut model as the whole model has it."""
        prefix = f"{self.layers_path}."
        if not name.startswith(prefix):
            return name
        number, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{self.kept[int(number)]}.{rest}"


def size_of_rows(config: RunConfig, grid: Grid, *, experts: int, top_k: int, longest: int) -> tuple[int, int, int]:
    """(rows of a micro-batch, micro-batches, tokens of a row): few, but enough for two slots an expert where MOST
    allows it, and divisible by the slices of the layout."""
    size = min(config.train.micro_batch_size, MICRO_BATCH)
    count = min(accumulation(config, grid.world), max(ACCUMULATION, grid.pipeline))
    rows = size * count * grid.data
    wanted = max(LEAST, min(MOST, -(-2 * experts // (max(top_k, 1) * rows))), 2 * grid.slices)
    return size, count, min(-(-wanted // grid.slices) * grid.slices, longest // grid.slices * grid.slices)


def run_config(
    config: RunConfig, trainable: TrainableSection, *, model: Path, work: Path, length: int
) -> tuple[RunConfig, list[str]]:
    """(the user's configuration turned to the cut model in float32, what of it is another one)."""
    made, notes = deepcopy(config), []
    made.run.dir, made.model.path, made.model.config = str(work), str(model), None
    made.model.base_states = made.data.chat_template = None
    made.model.dtype = "float32"
    if config.train.precision == "bf16":
        notes.append("both sides compute in float32, but for what is called bf16 below")
    made.train.precision = "fp32"
    if config.model.attention not in (None, *PACKED_ATTENTION):
        made.model.attention = None
        notes.append(f"attention '{config.model.attention}' does not know float32: transformers' default in its place")
    if config.moe.capacity_factor is not None:
        made.moe.capacity_factor = None
        notes.append("no capacity factor: which slots it drops depends on the layout, and a plain process drops none")
    if config.moe.experts_backend == "measured":
        made.moe.experts_backend = "auto"
        notes.append("the experts' back end is chosen by rule and not measured")
    if config.parallel.placement_scores is not None:
        made.parallel.placement_scores = None
        notes.append("experts are placed by their number and not by measured load")
    if config.train.eps < EPS:
        made.train.eps = EPS
        notes.append(f"AdamW's eps is {EPS:g} in place of {config.train.eps:g}: else rounding alone would move weights")
    made.trainable, made.data.seq_len = trainable, length
    return made, notes
