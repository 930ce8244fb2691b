"""`moe-dist self-moe evaluate`: a model's answers to held-out items, scored by exact match or by running them.

Every rank has a whole model and takes every P-th batch. Batches are cut the same for any number of ranks, and nothing
is communicated before all are done, so the figures do not depend on how many there are, and no rank waits within one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.checkpoint.fingerprint import fingerprint
from moe_dist.data.chat import resolve_template
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.evaluation.config import EvaluateConfig, EvaluateSection, HeldOut
from moe_dist.methods.self_moe.evaluation.items import Item, read_items
from moe_dist.methods.self_moe.generation.backend import Sampling
from moe_dist.methods.self_moe.generation.local_model import LocalModel
from moe_dist.methods.self_moe.judging.checker import Limits
from moe_dist.methods.self_moe.judging.contamination import Contamination, Overlaps, overlaps_of, refuse_above
from moe_dist.methods.self_moe.judging.scoring import check_items, score
from moe_dist.models.adapter import open_lora
from moe_dist.models.mixse.recorder import RoutingRecorder
from moe_dist.models.mixse.spec import read_spec
from moe_dist.train.start import on_rank_zero

Say = Callable[[str], None]


@dataclass
class SetResult:
    """What came out of one set. rows: one for each item, in the order of the file. routing: block -> `[3, n]`, the
    counts of `RoutingRecorder` over the tokens of all prompts and responses; empty for models without a router."""

    rows: list[dict[str, Any]]
    routing: dict[int, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Evaluation:
    """Results by set, on every rank. experts: names in the order of routing. identity: of the model."""

    sets: dict[str, SetResult]
    overlaps: list[Overlaps]
    experts: tuple[str, ...]
    identity: dict[str, Any]


def evaluate(config: EvaluateConfig, model: LocalModel, *, say: Say | None = None) -> Evaluation:
    """Answer and score the items of every set of `config`. Collective over the running process group, if there is one.

    say: hears of progress (give it on rank 0). Raises UserError for bad items and items too long for the model, and
    PolicyStop for too much contamination, all before anything is generated.
    """
    section = config.evaluate
    sets = {held_out.name: _read(held_out) for held_out in section.sets}
    overlaps = on_rank_zero(lambda: contamination(section, sets))
    if say:
        for report in overlaps:
            say(report.render())
    refuse_above(overlaps, section.max_contamination)
    asked = {name: _prompts(items, section, model) for name, items in sets.items()}
    for held_out in section.sets:
        _check_context(sets[held_out.name], asked[held_out.name], held_out, model)
    results = {}
    for held_out in section.sets:
        start = time.monotonic()
        result = _together(lambda h=held_out: _share(h, sets[h.name], asked[h.name], section, model))
        result.seconds = time.monotonic() - start
        results[held_out.name] = result
        if say:
            tokens = sum(row["tokens"] for row in result.rows)
            pace = f"{tokens / max(result.seconds, 1e-9):,.0f} tokens/s"
            say(f"{held_out.name}: {len(result.rows):,} items in {result.seconds:.1f} s, {pace}")
    spec = read_spec(model.model.config)
    return Evaluation(results, overlaps, spec.experts if spec else (), model.identity)


def open_model(section: EvaluateSection, device: torch.device) -> LocalModel:
    """The model of a configuration, its adapter on it. Raises UserError where an adapter is for another model."""
    model = LocalModel(
        section.model, tokenizer=section.tokenizer, dtype=section.dtype, device=device, marks=section.prompt == "plain"
    )
    if section.adapter is not None:
        folder = Path(section.adapter).expanduser()
        adapter = open_lora(folder)
        adapter.check_base(section.model, model.identity["model"])
        parts = model.model.named_modules()
        adapter.check_shapes({name: tuple(p.weight.shape) for name, p in parts if isinstance(p, torch.nn.Linear)})
        try:
            model.model.load_adapter(str(folder))
        except ImportError:
            raise UserError("evaluate.adapter: PEFT is not installed; pip install 'moe_dist[lora]'") from None
        model.model.eval()
        model.identity["adapter"] = fingerprint(folder)
    return model


def contamination(section: EvaluateSection, sets: dict[str, list[Item]]) -> list[Overlaps]:
    """How much of each set overlaps with the files of `seen`; [] where there are none."""
    if not section.seen:
        return []
    known = Contamination.of_files(section.seen, ngram=section.ngram, similarity=section.similarity)
    return [
        overlaps_of(name, ((item.question, "\n".join(item.answers), item.origin) for item in items), known)
        for name, items in sets.items()
    ]


def _read(held_out: HeldOut) -> list[Item]:
    items = read_items(held_out.path)[: held_out.limit]
    check_items(held_out, items)
    return items


def _prompts(items: Sequence[Item], section: EvaluateSection, model: LocalModel) -> list[str]:
    if section.prompt == "plain":
        return [item.question for item in items]
    template = resolve_template(model.tokenizer, section.chat_template)
    if template is None:
        raise UserError(
            "the tokenizer has no chat template: give the one of training as evaluate.chat_template (a file of ours is "
            "configs/self_moe/alpaca.jinja), or set evaluate.prompt=plain"
        )
    render = model.tokenizer.apply_chat_template
    try:
        return [
            render(
                [{"role": "user", "content": item.question.strip()}],
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
            )
            for item in items
        ]
    except Exception as error:  # Jinja errors, and what templates raise
        raise UserError(f"evaluate.chat_template refuses an instruction: {error}") from None


def _check_context(items: Sequence[Item], prompts: Sequence[str], held_out: HeldOut, model: LocalModel) -> None:
    if model.context is None:
        return
    for item, count in zip(items, model.count(prompts), strict=True):
        if count + held_out.max_tokens > model.context:
            raise UserError(
                f"{item.origin}: {count:,} tokens and max_tokens={held_out.max_tokens:,} for the response are more "
                f"than the model's context of {model.context:,}; lower max_tokens of {held_out.name} or remove the item"
            )


def _batches(prompts: Sequence[str], size: int) -> Iterator[list[int]]:
    """Places of the prompts that go together: of like length, which saves padding."""
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    yield from (order[start : start + size] for start in range(0, len(order), size))


def _share(
    held_out: HeldOut, items: Sequence[Item], prompts: Sequence[str], section: EvaluateSection, model: LocalModel
) -> tuple[list[tuple[int, dict]], dict[int, torch.Tensor]]:
    """This rank's part of a set: (place, row) of its items, and its counts of routing."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=held_out.max_tokens, stop=tuple(held_out.stop))
    mine = [places for number, places in enumerate(_batches(prompts, section.batch_size)) if number % world == rank]
    answered, routing = [], {}
    for places in mine:
        asked = [prompts[place] for place in places]
        done = model.complete(asked, sampling, seed=0)
        answered += zip(places, done, strict=True)
        if read_spec(model.model.config) is not None:
            for block, counts in _routing(model, [p + c.text for p, c in zip(asked, done, strict=True)]).items():
                routing[block] = routing.get(block, 0) + counts
    scores = score(
        held_out,
        [items[place] for place, _ in answered],
        [completion.text for _, completion in answered],
        limits=Limits(cpu_seconds=section.cpu_seconds, memory_mb=section.memory_mb),
        workers=max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world))),
    )
    rows = []
    for (place, completion), found in zip(answered, scores, strict=True):
        item = items[place]
        row = {"id": item.id, "instruction": item.question, "response": completion.text, "right": found.right}
        row |= {"answer": found.answer, "expected": list(item.answers), "detail": found.detail}
        rows.append((place, row | {"finished": completion.finished, "tokens": completion.tokens}))
    return rows, routing


@torch.no_grad()
def _routing(model: LocalModel, texts: Sequence[str]) -> dict[int, torch.Tensor]:
    """Counts of routing over whole texts, in a pass of their own: while they are generated, rows that have ended go on
    beside those that have not, and their tokens must not count."""
    rows = model.encode(texts)
    longest = max(map(len, rows))
    ids_BL = torch.tensor([row + [model.pad] * (longest - len(row)) for row in rows])
    mask_BL = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with RoutingRecorder(model.model) as recorder:
        device = model.model.device
        model.model(input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device), use_cache=False)
    return recorder.counts()


def _together(work: Callable[[], tuple[list[tuple[int, dict]], dict[int, torch.Tensor]]]) -> SetResult:
    """Collective: the parts of all ranks in one; a UserError of any rank is raised on all."""
    try:
        mine = (*work(), None)
    except UserError as error:
        mine = ([], {}, str(error))
    parts = [mine]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    if failed := [error for _, _, error in parts if error]:
        raise UserError(failed[0])
    routing: dict[int, torch.Tensor] = {}
    for _, counts, _ in parts:
        for block, sums in counts.items():
            routing[block] = routing.get(block, 0) + sums
    rows = sorted((row for rows, _, _ in parts for row in rows), key=lambda row: row[0])
    return SetResult([row for _, row in rows], dict(sorted(routing.items())))
