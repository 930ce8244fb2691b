"""`moe-dist self-moe generate`: rounds of brainstorming and answering until every skill has its records.

Rank 0 knows how far the skills are and says which batches come next; all ranks take them, one at a time, from a common
board, each with a whole model of its own. What a batch gave lies on disk before its rank takes another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from moe_dist import __version__
from moe_dist.errors import EXIT_OK, EXIT_PREEMPTED, UserError
from moe_dist.methods.self_moe.generation.backend import Backend
from moe_dist.methods.self_moe.generation.batches import Batch, derive_seed
from moe_dist.methods.self_moe.generation.board import Board
from moe_dist.methods.self_moe.generation.config import GenerateConfig
from moe_dist.methods.self_moe.generation.context import check_context
from moe_dist.methods.self_moe.generation.filters import filters_of
from moe_dist.methods.self_moe.generation.output import Output
from moe_dist.methods.self_moe.generation.parts import Part, Parts
from moe_dist.methods.self_moe.generation.progress import TokenCount, describe_records, shown
from moe_dist.methods.self_moe.generation.prompts import RESPONSE_SHOTS, Prompts, read_prompts
from moe_dist.methods.self_moe.generation.rounds import SkillRun
from moe_dist.methods.self_moe.generation.seeds import Seed, read_seeds
from moe_dist.train.start import on_rank_zero
from moe_dist.train.stop import StopFlag

Say = Callable[[str], None]
FAILED = "failed"
PHASES = (
    ("instructions", SkillRun.brainstorm, SkillRun.take_instructions),
    ("responses", SkillRun.answer, SkillRun.take_responses),
)


def generate(
    config: GenerateConfig,
    out: str | Path,
    *,
    device: torch.device,
    overwrite: bool = False,
    say: Say = print,
    terminal: bool = False,
) -> int:
    """Write `out`/SKILL.jsonl for every skill. Collective over the running process group; returns the exit code.

    say: hears of progress, on rank 0; terminal: whether a line may be written over and over there. A run that ended
    early, by whatever signal, goes on when called again: at most the batches in flight are lost. Raises UserError for
    wrong input before anything is generated, and for a skill without a single record once all others are written.
    """
    say = say if not dist.is_initialized() or dist.get_rank() == 0 else None
    skills: list[SkillRun] = []  # on rank 0; the others need none
    inputs: dict[str, tuple[list[Seed], Prompts]] = {}
    on_rank_zero(lambda: inputs.update(read_inputs(config)))
    backend = make_backend(config, device)
    output = Output(Path(out).expanduser(), config, inputs, backend.identity)

    def begin() -> None:
        output.prepare(overwrite=overwrite)
        skills.extend(_skill_runs(config, inputs, backend))

    on_rank_zero(begin)
    start = time.monotonic()
    crew = _Crew(backend, Parts(output.parts, backend.identity), say, terminal)
    with StopFlag() as stop:
        worked = True
        while worked:
            worked = False
            for title, ask, take in PHASES:
                asked = on_rank_zero(lambda ask=ask: [ask(run) for run in skills])
                batches = [batch for of_skill in asked for batch in of_skill]
                if batches and not crew.generate(title, batches, stop):
                    if say:
                        say("stopped; the same command goes on from here")
                    return EXIT_PREEMPTED
                for run, of_skill in zip(skills, asked, strict=False):
                    take(run, [(batch, crew.parts.read(batch)) for batch in of_skill])
                worked = worked or bool(batches)
            if say and worked:
                say(describe_records(skills, seconds=time.monotonic() - start))
    on_rank_zero(lambda: output.finish(skills, say))
    return EXIT_OK


def read_inputs(config: GenerateConfig) -> dict[str, tuple[list[Seed], Prompts]]:
    """Seeds and prompts of every skill, checked. Raises UserError that names file, line and field."""
    section = config.generate
    return {
        skill: (
            read_seeds(path, skill=skill, least=RESPONSE_SHOTS),
            read_prompts(skill, section.prompts.get(skill)),
        )
        for skill, path in section.seeds.items()
    }


def make_backend(config: GenerateConfig, device: torch.device) -> Backend:
    """What `generate.backend` names."""
    section = config.generate
    if section.backend == "server":
        from moe_dist.methods.self_moe.generation.server import Server

        return Server(config.server)
    from moe_dist.methods.self_moe.generation.local_model import LocalModel

    return LocalModel(section.model, tokenizer=section.tokenizer, dtype=section.dtype, device=device)


def _skill_runs(config: GenerateConfig, inputs: dict[str, tuple[list[Seed], Prompts]], backend: Backend):
    for skill, (seeds, prompts) in inputs.items():
        check_context(skill, seeds, prompts, config.generate, backend)
        chosen = config.filters_for(skill)
        filters = filters_of(chosen, seeds, headings=[prompts.response_stop.strip()])
        yield SkillRun(skill, seeds, prompts, filters, config.generate, backend, samples=chosen.samples)


class _Crew:
    """All ranks at work on the batches of a phase."""

    def __init__(self, backend: Backend, parts: Parts, say: Say | None, terminal: bool):
        self.backend, self.parts, self.say, self.terminal = backend, parts, say, terminal
        self.board, self.phases = Board(), 0
        self.versions = {
            "moe_dist": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def generate(self, title: str, batches: Sequence[Batch], stop: StopFlag) -> bool:
        """Generate the batches that are not there yet. Collective; False where a rank was asked to stop first.

        Raises UserError on all ranks where the back end fails on one.
        """
        self.phases += 1
        taken, done = f"{self.phases}/taken", f"{self.phases}/done"
        todo = on_rank_zero(lambda: [place for place, batch in enumerate(batches) if not self.parts.has(batch)])
        total = sum(len(batches[place].items) for place in todo)
        count = TokenCount(self.board)
        failure = ""
        with shown(title, self.board, done=done, total=total, say=self.say, terminal=self.terminal):
            while not stop.requested and not self.board.read(FAILED) and (turn := self.board.add(taken)) <= len(todo):
                batch = batches[todo[turn - 1]]
                try:
                    self.parts.write(batch, self._complete(batch, count))
                except UserError as error:  # a server that is gone, say: all ranks end, each after its batch
                    failure = str(error)
                    self.board.add(FAILED)
                else:
                    self.board.add(done, len(batch.items))
                count.flush()
            ends = _of_all_ranks((failure, stop.requested))  # here all ranks have stored what they took
        for failure, _ in ends:
            if failure:
                raise UserError(failure)
        return not any(stopped for _, stopped in ends)

    def _complete(self, batch: Batch, count: TokenCount) -> Part:
        prompts = [item.prompt for item in batch.items]
        done = self.backend.complete(prompts, batch.sampling, seed=batch.seed, on_tokens=count)
        samples: list[tuple[str, ...]] = [() for _ in prompts]
        for number in range(batch.samples):
            seed = derive_seed(batch.seed, "sample", number)
            more = self.backend.complete(prompts, batch.sample_by, seed=seed, on_tokens=count)
            samples = [(*texts, new.text.strip()) for texts, new in zip(samples, more, strict=True)]
        return Part(done, samples, self.versions)


def _of_all_ranks(value: Any) -> list[Any]:
    """What every rank has, by rank. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
