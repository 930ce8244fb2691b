"""The tree of configuration keys: their types, their documentation, and a hint for a key that does not exist."""

import dataclasses
import difflib
import functools
import typing
from typing import Any

from moe_dist.config.schema import RunConfig
from moe_dist.errors import UserError

# Names that other trainers use for what is called otherwise here.
ALIASES = {
    "learning_rate": "train.lr",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "total_steps": "train.steps",
    "micro_batch": "train.micro_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "grad_accum": "train.global_batch_size",
    "max_grad_norm": "train.clip_norm",
    "grad_clip": "train.clip_norm",
    "clip_grad": "train.clip_norm",
    "gradient_clipping": "train.clip_norm",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "scheduler": "train.schedule",
    "warmup": "train.warmup_steps",
    "num_warmup_steps": "train.warmup_steps",
    "warmup_ratio": "train.warmup_steps",
    "min_lr": "train.min_lr_ratio",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "adam_epsilon": "train.eps",
    "wd": "train.weight_decay",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "mixed_precision": "train.precision",
    "gradient_checkpointing": "train.recompute",
    "activation_checkpointing": "train.recompute",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "eval_interval": "train.eval_every",
    "output_dir": "run.dir",
    "run_dir": "run.dir",
    "run_name": "run.name",
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "tokenizer_name": "model.tokenizer",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "eval_dataset": "data.eval",
    "validation": "data.eval",
    "max_seq_length": "data.seq_len",
    "max_length": "data.seq_len",
    "sequence_length": "data.seq_len",
    "cutoff_len": "data.seq_len",
    "block_size": "data.seq_len",
    "ep": "parallel.expert",
    "ep_size": "parallel.expert",
    "expert_parallel": "parallel.expert",
    "expert_parallel_size": "parallel.expert",
    "tp": "parallel.tensor",
    "pp": "parallel.pipeline",
    "sp": "parallel.sequence",
    "zero": "parallel.zero_stage",
    "stage": "parallel.zero_stage",
    "save_steps": "checkpoint.every",
    "save_every": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "report_to": "logging.wandb",
    "wandb_project": "logging.project",
    "router_aux_loss_coef": "moe.balance_coef",
    "aux_loss_coef": "moe.balance_coef",
    "router_z_loss_coef": "moe.z_loss_coef",
    "train_experts": "trainable.experts",
    "freeze": "trainable.exclude",
}


@functools.cache
def fields_of(section: type) -> dict[str, tuple[Any, dataclasses.Field]]:
    """{key: (type, field)} of a section class."""
    hints = typing.get_type_hints(section)
    return {item.name: (hints[item.name], item) for item in dataclasses.fields(section)}


@functools.cache
def all_keys() -> tuple[str, ...]:
    """Every key with its section, as in 'train.lr'."""
    return tuple(
        f"{name}.{inner}" for name, (section, _) in fields_of(RunConfig).items() for inner in fields_of(section)
    )


def check_known(tree: Any, *, origin: str, schema: type = RunConfig) -> None:
    """Raise UserError for the first key of `tree` (nested dicts and lists) that the schema does not have."""
    _walk(tree, schema, "", origin, schema is RunConfig)


def _walk(value: Any, kind: Any, place: str, origin: str, hints: bool) -> None:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{origin}: {place or 'a configuration'} has to be a mapping of keys, not {value!r}")
        known = fields_of(kind)
        for name, inner in value.items():
            if name not in known:
                raise UserError(f"{origin}: {unknown_key(name, kind, place, hints=hints)}")
            _walk(inner, known[name][0], f"{place}.{name}" if place else name, origin, hints)
    elif typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise UserError(f"{origin}: {place} has to be a list, not {value!r}")
        for index, inner in enumerate(value):
            _walk(inner, typing.get_args(kind)[0], f"{place}.{index}", origin, hints)


def unknown_key(name: str, section: type, place: str, *, hints: bool = True) -> str:
    """What to say about a key that `section` (at `place`, '' for the top) does not have.

    hints: also look for the name in the other sections of RunConfig and among the names of other trainers.
    """
    full = f"{place}.{name}" if place else name
    start = f"{place}." if place else ""
    elsewhere = [key for key in all_keys() if key.rsplit(".", 1)[1] == name]
    near = difflib.get_close_matches(name, list(fields_of(section)), n=1, cutoff=0.7)
    anywhere = difflib.get_close_matches(name, [key.split(".", 1)[1] for key in all_keys()], n=1, cutoff=0.75)
    if name in ALIASES and hints:
        guess = ALIASES[name]
    elif near:
        guess = start + near[0]
    elif elsewhere and hints:
        guess = elsewhere[0]
    elif anywhere and hints:
        guess = next(key for key in all_keys() if key.split(".", 1)[1] == anywhere[0])
    else:
        return f"unknown key {full}; {place or 'a configuration'} has {', '.join(fields_of(section))}"
    return f"unknown key {full}: did you mean {guess}?"


def describe_keys() -> str:
    """Every key with its default and its line of documentation, for `--help-keys`."""
    lines = []
    for name, (section, field) in fields_of(RunConfig).items():
        lines.append(f"{name}:  # {field.metadata['doc']}")
        lines += _describe(section, "  ")
    return "\n".join(lines)


def _describe(section: type, indent: str) -> list[str]:
    lines = []
    for name, (kind, field) in fields_of(section).items():
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        text = field.metadata["doc"]
        if field.metadata["choices"] and len(field.metadata["choices"]) < 6 and isinstance(default, str):
            text += f" ({' | '.join(map(str, field.metadata['choices']))})"
        lines.append(f"{indent}{name}: {_plain(default)}  # {text}")
        args = typing.get_args(kind)
        if typing.get_origin(kind) is list and dataclasses.is_dataclass(args[0]) and name == "train":
            lines.append(f"{indent}  # each source:")
            lines += [f"{indent}  # {line}" for line in _describe(args[0], "")]
    return lines


def _plain(value: Any) -> str:
    """A default as it is written in YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
