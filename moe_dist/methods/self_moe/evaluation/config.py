"""The configuration of `moe-dist self-moe evaluate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.config.checks import is_local
from moe_dist.config.load import load_schema
from moe_dist.config.schema import key
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.generation.config import SKILL
from moe_dist.methods.self_moe.judging.answers import LAST_NUMBER, check_pattern

EXACT_MATCH, PASS_AT_1 = "exact_match", "pass_at_1"


@dataclass
class HeldOut:
    """One set of held-out items."""

    name: str | None = key(None, "Name of the skill or benchmark.")
    path: str | None = key(
        None, "JSONL file: instruction, perhaps input, and output (a string or a list) or, for pass_at_1, test."
    )
    metric: str = key(
        EXACT_MATCH,
        "exact_match: the answer in the response is one of output. pass_at_1: the response is a program, and runs to "
        "the end with `test` after it.",
        choices=(EXACT_MATCH, PASS_AT_1),
    )
    answer: str = key(
        LAST_NUMBER,
        "exact_match: regular expression that finds the answer: its last match, group 1 where there is one; '' takes "
        "all of the response.",
    )
    continues: bool = key(False, "pass_at_1: the response goes on with the code in the instruction.")
    max_tokens: int = key(512, "Most tokens of a response.", low=1)
    stop: list[str] = key([], "Strings that end a response.")
    limit: int | None = key(None, "Use the first so many items.", low=1)


@dataclass
class EvaluateSection:
    model: str | None = key(None, "Hugging Face folder or hub name, or the folder of a mixture (MiXSE).")
    adapter: str | None = key(None, "Folder of a LoRA adapter (PEFT) that is put on the model.")
    tokenizer: str | None = key(None, "Folder or hub name of the tokenizer; beside the model when absent.")
    dtype: str | None = key(
        None, "Dtype in which the model is loaded; as stored when absent.", choices=(None, "float32", "bfloat16")
    )
    prompt: str = key(
        "chat", "What the model reads: the instruction in its chat template, or as it is.", choices=("chat", "plain")
    )
    chat_template: str | None = key(
        None, "Jinja template, or a file of one, in place of the tokenizer's own chat template: that of training."
    )
    sets: list[HeldOut] = key([], "Held-out sets.")
    batch_size: int = key(16, "Items that are answered together.", low=1)
    seen: list[str] = key(
        [],
        "JSONL files of what the model has learned from, seeds and training data; overlap with the sets is reported.",
    )
    max_contamination: float = key(
        1.0, "Stop before anything is generated where more of a set overlaps with `seen`.", low=0, high=1
    )
    ngram: int = key(13, "A run of so many words in common is overlap.", low=1)
    similarity: float = key(0.7, "Instructions this alike overlap (Jaccard, runs of 3 words).", above=0, high=1)
    cpu_seconds: int = key(5, "pass_at_1: computing time of a program.", low=1)
    memory_mb: int = key(512, "pass_at_1: memory of a program.", low=64)


@dataclass
class HarnessSection:
    tasks: list[str] = key([], "Tasks of lm-evaluation-harness; none = it is not called.")
    include: str | None = key(None, "Folder with tasks of your own.")
    shots: int | None = key(None, "Examples in context; as each task says when absent.", low=0)
    limit: int | None = key(None, "Items of each task; all when absent.", low=1)
    batch_size: int = key(8, "Requests that are run together.", low=1)
    run_code: bool = key(
        False, "Consent that tasks such as humaneval run the model's programs here, without being locked down."
    )
    chat: bool = key(False, "Ask in the model's chat template.")


@dataclass
class EvaluateConfig:
    evaluate: EvaluateSection = key(EvaluateSection, "Model and held-out sets.")
    harness: HarnessSection = key(HarnessSection, "Benchmarks of lm-evaluation-harness.")


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> EvaluateConfig:
    """Read and check the YAML. Raises UserError that names the key and what to do; items are not read."""
    config = load_schema(path, overrides, EvaluateConfig)
    section = config.evaluate
    if section.model is None:
        raise UserError("evaluate.model is not set: name a Hugging Face folder or a hub name")
    for name in ("model", "adapter", "tokenizer"):
        folder = getattr(section, name)
        if folder is not None and is_local(folder) and not os.path.isdir(os.path.expanduser(folder)):
            raise UserError(f"evaluate.{name}={folder}: no such folder")
    if not section.sets and not config.harness.tasks:
        raise UserError("evaluate.sets and harness.tasks are empty: there is nothing to evaluate on")
    _check_sets(section.sets)
    for index, file in enumerate(section.seen):
        if not os.path.isfile(os.path.expanduser(file)):
            raise UserError(f"evaluate.seen.{index}={file}: no such file")
    include = config.harness.include
    if include is not None and not os.path.isdir(os.path.expanduser(include)):
        raise UserError(f"harness.include={include}: no such folder")
    return config


def _check_sets(sets: Sequence[HeldOut]) -> None:
    names = [held_out.name for held_out in sets]
    for index, held_out in enumerate(sets):
        place = f"evaluate.sets.{index}"
        if not held_out.name or not SKILL.fullmatch(held_out.name):
            raise UserError(f"{place}.name={held_out.name}: names a file; use letters, digits and ._- (at most 64)")
        if names.count(held_out.name) > 1:
            raise UserError(f"{place}.name={held_out.name}: two sets have this name")
        if held_out.path is None or not os.path.isfile(os.path.expanduser(held_out.path)):
            raise UserError(f"{place}.path={held_out.path}: no such file")
        check_pattern(held_out.answer, f"{place}.answer")
        if held_out.continues and held_out.metric != PASS_AT_1:
            raise UserError(f"{place}.continues=true: only for metric pass_at_1; remove it")
