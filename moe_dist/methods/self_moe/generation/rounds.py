"""One skill on its way to its records: what to generate next, and what becomes of what was generated.

Everything here follows from the configuration and from what the model wrote, in the order of ids. So it comes out the
same on any number of ranks, and again when a run that was killed reads what it had.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_dist.methods.self_moe.generation import instructions, responses
from moe_dist.methods.self_moe.generation.backend import Backend, Completion, Sampling
from moe_dist.methods.self_moe.generation.batches import Batch, cut
from moe_dist.methods.self_moe.generation.config import GenerateSection
from moe_dist.methods.self_moe.generation.filters_base import INSTRUCTION, RESPONSE, Draft, Filter, look
from moe_dist.methods.self_moe.generation.parts import Part
from moe_dist.methods.self_moe.generation.prompts import Prompts
from moe_dist.methods.self_moe.generation.seeds import Seed

HOPELESS = 64  # brainstorming prompts without a single record, after which a skill is given up
TOO_LONG = "instruction_over_context"
Results = Sequence[tuple[Batch, Part]]


@dataclass
class _Waiting:
    draft: Draft
    origin: dict[str, Any]  # of the instruction


class SkillRun:
    """records: kept so far, in order. counts: prompts, instructions, answered. reasons: why drafts were left out."""

    def __init__(
        self,
        skill: str,
        seeds: Sequence[Seed],
        prompts: Prompts,
        filters: Sequence[Filter],
        section: GenerateSection,
        backend: Backend,
        *,
        samples: int = 0,
    ):
        self.skill, self.seeds, self.prompts, self.filters = skill, seeds, prompts, filters
        self.section, self.backend, self.samples = section, backend, samples
        self.records: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter(prompts=0, instructions=0, answered=0)
        self.reasons: Counter[str] = Counter()
        self._pool: list[_Waiting] = []
        self._asked: dict[str, _Waiting] = {}
        self._batches: Counter[str] = Counter()
        draws = {"temperature": section.temperature, "top_p": section.top_p}
        self._by_phase = {
            instructions.PHASE: Sampling(
                **draws, max_tokens=section.instruction_tokens, stop=(prompts.instruction_stop,)
            ),
            responses.PHASE: Sampling(0.0, 1.0, section.response_tokens, stop=(prompts.response_stop,)),
        }
        self._sample_by = replace(self._by_phase[responses.PHASE], **draws) if samples else None

    @property
    def missing(self) -> int:
        """Records still to come."""
        return max(0, self.section.count - len(self.records))

    def brainstorm(self) -> list[Batch]:
        """The next brainstorming batches; none where enough instructions wait, or nothing more is to be tried."""
        used, most = self.counts["prompts"], self.section.most_prompts
        lacking = self._wanted() - len(self._pool)
        hopeless = used >= HOPELESS and not self.records
        if lacking <= 0 or used >= most or hopeless:
            return []
        # The first prompts show how many instructions one gives; after that the number at most doubles at a time.
        gave = self._passed / used if used else self.prompts.tasks - instructions.FIRST + 1
        count = math.ceil(lacking / gave) if gave else used
        count = min(count, most - used, used or count)
        items = [
            instructions.instruction_item(
                self.prompts, self.seeds, run_seed=self.section.seed, skill=self.skill, number=number
            )
            for number in range(used, used + count)
        ]
        self.counts["prompts"] += count
        return self._cut(items, instructions.PHASE)

    def take_instructions(self, results: Results) -> None:
        """Look through what was brainstormed: instructions that pass wait for their answers."""
        found: dict[str, _Waiting] = {}
        for batch, item, done, _, versions in _by_id(results):
            origin = self._origin(batch, item.seeds, done, versions)
            tasks = self.prompts.tasks
            for draft in instructions.to_drafts(self.skill, item.id, done.text, finished=done.finished, tasks=tasks):
                found[draft.id] = _Waiting(draft, origin)
        self.counts["instructions"] += len(found)
        kept = self._filtered([waiting.draft for waiting in found.values()], INSTRUCTION)
        self._pool += [found[draft.id] for draft in kept]

    def answer(self) -> list[Batch]:
        """Batches that answer as many of the waiting instructions as the missing records should take."""
        chosen, self._pool = self._pool[: self._wanted()], self._pool[self._wanted() :]
        items = [
            responses.response_item(
                self.prompts,
                self.seeds,
                run_seed=self.section.seed,
                skill=self.skill,
                draft_id=waiting.draft.id,
                instruction=waiting.draft.instruction,
            )
            for waiting in chosen
        ]
        lengths = self.backend.count([item.prompt for item in items]) if items else []
        if self.backend.context is not None and lengths is not None:
            room = self.backend.context - self.section.response_tokens
            fitting = [item for item, length in zip(items, lengths, strict=True) if length <= room]
            if len(fitting) < len(items):
                self.reasons[TOO_LONG] += len(items) - len(fitting)
            items = fitting
        self._asked = {waiting.draft.id: waiting for waiting in chosen}
        return self._cut(items, responses.PHASE, samples=self.samples, sample_by=self._sample_by)

    def take_responses(self, results: Results) -> None:
        """Make records of the answered instructions that pass."""
        drafts, origins = [], {}
        for batch, item, done, more, versions in _by_id(results):
            draft = self._asked[item.id].draft
            drafts.append(replace(draft, response=done.text.strip(), finished=done.finished, samples=more))
            origins[item.id] = self._origin(batch, item.seeds, done, versions)
        self.counts["answered"] += len(drafts)
        for draft in self._filtered(drafts, RESPONSE):
            self.records.append(self._record(draft, self._asked[draft.id], origins[draft.id]))

    @property
    def _passed(self) -> int:
        """Instructions that passed so far."""
        return self.counts["answered"] + len(self._pool) + self.reasons[TOO_LONG]

    def _wanted(self) -> int:
        """Instructions to be answered for the missing records, at the share that was kept so far."""
        return math.ceil(self.missing * (self.counts["answered"] + 1) / (len(self.records) + 1))

    def _filtered(self, drafts: list[Draft], stage: str) -> list[Draft]:
        """The drafts that pass every filter of a stage; each filter sees those that the ones before it have kept."""
        for test in self.filters:
            if test.stage == stage:
                reasons = look(test, drafts)
                self.reasons.update(reason for reason in reasons if reason is not None)
                drafts = [draft for draft, reason in zip(drafts, reasons, strict=True) if reason is None]
        return drafts

    def _cut(self, items, phase: str, **more) -> list[Batch]:
        batches = cut(
            items,
            first=self._batches[phase],
            size=self.section.batch_size,
            skill=self.skill,
            phase=phase,
            sampling=self._by_phase[phase],
            run_seed=self.section.seed,
            **more,
        )
        self._batches[phase] += len(batches)
        return batches

    def _origin(self, batch: Batch, seeds: tuple[str, ...], done: Completion, versions: dict) -> dict[str, Any]:
        return {
            "batch": batch.name,
            "seeds": list(seeds),
            "sampling": batch.sampling.as_dict(),
            "tokens": done.tokens,
            "versions": versions,
        }

    def _record(self, draft: Draft, waiting: _Waiting, response: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": draft.id,
            "messages": [
                {"role": "user", "content": draft.instruction},
                {"role": "assistant", "content": draft.response},
            ],
            "skill": self.skill,
            "provenance": {
                "base": self.backend.identity,
                "prompts": self.prompts.hash,
                "seed": self.section.seed,
                "instruction": waiting.origin,
                "response": response,
                "passed": list(dict.fromkeys(test.name for test in self.filters)),
            },
        }


def _by_id(results: Results):
    """(batch, item, completion, samples, versions) of all results, in the order of the items' ids."""
    rows = [
        (batch, item, done, more, part.versions)
        for batch, part in results
        for item, done, more in zip(batch.items, part.completions, part.samples, strict=True)
    ]
    return sorted(rows, key=lambda row: row[1].id)
