"""Checks of a whole configuration. Every message names the key, its value, and what to do."""

import dataclasses
import math
import os
import re
from typing import Any

from moe_dist.config.keys import fields_of
from moe_dist.config.schema import RunConfig, Source, TrainableSection
from moe_dist.errors import UserError
from moe_dist.parallel.sizes import check_sizes


def validate(config: RunConfig) -> None:
    """Check bounds, choices and what relates several keys. Touches no network, weights, data or GPU."""
    _bounds(config, "")
    _run(config)
    _model(config)
    _data(config)
    _train(config)
    _parallel(config)
    _trainable(config)
    _lora(config)


def check_paths(config: RunConfig) -> None:
    """Check that every local path that the config names is there; hub names are not looked up."""
    for name in ("path", "tokenizer"):
        value = getattr(config.model, name)
        if value is not None and is_local(value) and not os.path.isdir(value):
            raise UserError(f"model.{name}={value}: no such folder")
    scores = config.parallel.placement_scores
    if scores is not None and not os.path.isfile(scores):
        raise UserError(f"parallel.placement_scores={scores}: no such file")
    for group in ("train", "eval"):
        for index, source in enumerate(getattr(config.data, group)):
            if source.path is not None and not os.path.exists(source.path):
                raise UserError(f"data.{group}.{index}.path={source.path}: no such file or folder")


def check_layout(config: RunConfig, world_size: int) -> None:
    """Check what depends on the number of ranks; `world_size` is the one that the launcher gave."""
    parallel, length = config.parallel, config.data.seq_len
    axes = axes_of(config)
    needed = smallest_world(config)
    if needed > world_size:
        asked = " and ".join(f"parallel.{name}={size}" for name, size in axes.items() if size > 1)
        raise UserError(
            f"{asked} need{'s' * (asked.count('=') == 1)} at least {needed} ranks, but this run has {world_size}: "
            f"start more ranks (for instance `deepspeed --num_gpus {needed} --module moe_dist train ...`) "
            "or take smaller sizes"
        )
    check_sizes(world_size, **axes)
    slices = parallel.sequence * parallel.tensor
    if length % slices:
        raise UserError(
            f"data.seq_len={length}: a row is cut into parallel.sequence x parallel.tensor = {slices} slices of equal "
            f"length; set it to {-(-length // slices) * slices}, or take other sizes"
        )
    if parallel.sequence > 1 and config.model.attention not in (None, "eager", "sdpa"):
        raise UserError(
            f"model.attention={config.model.attention}: not available with parallel.sequence={parallel.sequence}; take "
            "eager or sdpa, or set parallel.sequence=1"
        )
    accumulation(config, world_size)


def check_experts_only(config: RunConfig, verb: str) -> None:
    """Refuse the axes that only training serves, for a verb that spreads nothing but experts and rows."""
    for name in ("pipeline", "sequence", "tensor"):
        size = getattr(config.parallel, name)
        if size != 1:
            raise UserError(f"parallel.{name}={size}: `{verb}` runs on expert-parallel ranks only; set it to 1 here")


def axes_of(config: RunConfig) -> dict[str, int]:
    """The sizes that cut the ranks into groups, as `parallel.grid` takes them."""
    return {name: getattr(config.parallel, name) for name in ("expert", "pipeline", "sequence", "tensor")}


def smallest_world(config: RunConfig) -> int:
    """The fewest ranks on which the sizes of `parallel` fit: experts fold the ranks of a pipeline stage."""
    parallel = config.parallel
    return parallel.pipeline * math.lcm(parallel.expert, parallel.sequence * parallel.tensor)


def check_world(config: RunConfig, world_size: int) -> None:
    """Refuse another number of ranks than the run is meant for, as a mistyped hostfile gives: it means one machine."""
    expected = config.parallel.world_size
    if expected is not None and expected != world_size:
        raise UserError(
            f"parallel.world_size={expected}, but the launcher started {world_size} rank(s): a host is missing in the "
            "hostfile, the hostfile was not found, or the number of nodes or ranks of a node is another one"
        )


def accumulation(config: RunConfig, world_size: int) -> int:
    """Micro-batches per rank in one optimizer step."""
    parallel = config.parallel
    data = world_size // (parallel.pipeline * parallel.sequence * parallel.tensor)
    per_pass = config.train.micro_batch_size * data
    total = config.train.global_batch_size or per_pass
    if total % per_pass:
        below, above = total // per_pass * per_pass, -(-total // per_pass) * per_pass
        options = " or ".join(str(value) for value in (below, above) if value)
        raise UserError(
            f"train.global_batch_size={total} is no multiple of train.micro_batch_size "
            f"({config.train.micro_batch_size}) x {data} ranks that read rows; set it to {options}, or change the "
            "micro-batch"
        )
    return total // per_pass


def check_bounds(config: Any) -> None:
    """Check the bounds and choices that stand beside the keys of any dataclass of sections."""
    _bounds(config, "")


def is_local(path: str) -> bool:
    """Whether a model or tokenizer name means a folder here and not a hub repository.

    It does when it exists, starts with '/', '.' or '~', or has more than one '/' (hub names are `owner/name`).
    """
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or os.path.exists(path)


def _bounds(section: Any, place: str) -> None:
    for name, (_, field) in fields_of(type(section)).items():
        value, rule = getattr(section, name), field.metadata
        full = f"{place}{name}"
        if dataclasses.is_dataclass(value):
            _bounds(value, f"{full}.")
            continue
        if isinstance(value, list):
            for index, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    _bounds(item, f"{full}.{index}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{full}={value}: has to be a finite number")
        if rule["choices"] is not None and value not in rule["choices"]:
            shown = ", ".join("null" if item is None else str(item) for item in rule["choices"])
            raise UserError(f"{full}={value}: has to be one of {shown}")
        if value is None or isinstance(value, (str, bool, list, dict)):
            continue
        if rule["low"] is not None and value < rule["low"]:
            raise UserError(f"{full}={value}: has to be at least {rule['low']}")
        if rule["above"] is not None and value <= rule["above"]:
            raise UserError(f"{full}={value}: has to be above {rule['above']}")
        if rule["high"] is not None and value > rule["high"]:
            raise UserError(f"{full}={value}: has to be at most {rule['high']}")


def _run(config: RunConfig) -> None:
    name = config.run.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,127}", name or ""):
        raise UserError(
            f"run.name={name!r}: use letters, digits and ._+=- (at most 128), starting with a letter or a digit"
        )
    if ".." in config.run.dir.replace("\\", "/").split("/"):
        raise UserError(f"run.dir={config.run.dir}: must not climb with '..'; give an absolute path instead")


def _model(config: RunConfig) -> None:
    model = config.model
    if (model.path is None) == (model.config is None):
        raise UserError(
            "model: set model.path (a Hugging Face folder or hub name) or model.config (an inline architecture), "
            f"{'not both' if model.path is not None else 'one of them'}"
        )
    if model.config is not None and not isinstance(model.config.get("model_type"), str):
        raise UserError("model.config: model_type is missing (for instance model_type: qwen3_moe)")
    if model.trust_remote_code:
        if model.path is None or is_local(model.path):
            raise UserError("model.trust_remote_code=true: only for a hub repository given by model.path")
        if model.revision is None or not re.fullmatch(r"[0-9a-f]{40}", model.revision):
            raise UserError(
                "model.trust_remote_code=true: runs code that its owner may change at any time; read it, then pin it "
                "by setting model.revision to the 40 digits of the commit that you read"
            )


def _data(config: RunConfig) -> None:
    for group in ("train", "eval"):
        names = []
        for index, source in enumerate(getattr(config.data, group)):
            _source(source, f"data.{group}.{index}")
            names.append(source.name)
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise UserError(f"data.{group}: two sources are called {doubled!r}; give them different names")
    if config.data.eval and config.data.eval_fraction:
        raise UserError("data.eval_fraction: only without data.eval; remove one of them")


def _source(source: Source, place: str) -> None:
    given = [name for name in ("path", "hub", "corpus") if getattr(source, name) is not None]
    if len(given) != 1:
        raise UserError(f"{place}: set exactly one of path, hub and corpus, not {' and '.join(given) or 'none'}")
    if source.streaming and source.corpus is not None:
        raise UserError(f"{place}.streaming=true: an offline corpus is small; remove it")


def _train(config: RunConfig) -> None:
    train = config.train
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise UserError(f"train.betas={train.betas}: has to be two numbers from 0 to below 1")
    if train.warmup_steps > train.steps:
        raise UserError(f"train.warmup_steps={train.warmup_steps}: is more than train.steps={train.steps}")
    if train.decay_steps is not None:
        if train.schedule != "wsd":
            raise UserError(f"train.decay_steps={train.decay_steps}: only for train.schedule=wsd; remove it")
        if train.decay_steps + train.warmup_steps > train.steps:
            raise UserError(
                f"train.decay_steps={train.decay_steps}: with train.warmup_steps={train.warmup_steps} it is more "
                f"than train.steps={train.steps}"
            )
    if config.checkpoint.keep_best and not (train.eval_every and (config.data.eval or config.data.eval_fraction)):
        raise UserError(
            "checkpoint.keep_best=true: needs held-out text and how often to look at it; set train.eval_every, and "
            "data.eval or data.eval_fraction"
        )
    if train.stop_at is not None and train.stop_at > train.steps:
        raise UserError(f"train.stop_at={train.stop_at}: is more than train.steps={train.steps}")


def _parallel(config: RunConfig) -> None:
    parallel = config.parallel
    if parallel.placement_scores is not None and parallel.placement != "balanced":
        raise UserError("parallel.placement_scores: only with parallel.placement=balanced; set that, or remove it")
    if parallel.spare_experts and parallel.placement != "balanced":
        raise UserError(
            f"parallel.spare_experts={parallel.spare_experts}: only with parallel.placement=balanced; set that, or "
            "leave it at 0"
        )
    # ZeRO 3 gathers a module's parameters when the block calls it, which is not where it would run then.
    if config.moe.overlap and parallel.zero_stage == 3:
        raise UserError("moe.overlap=true needs parallel.zero_stage 0, 1 or 2; leave it out, or set it to false")


def _trainable(config: RunConfig) -> None:
    trainable = config.trainable
    if trainable.experts_file is not None and trainable.experts:  # {} names none, and leaves them to the file
        raise UserError("trainable: experts and experts_file both say which experts train; remove one of them")
    if not trainable.include and trainable.experts is None:
        raise UserError("trainable.include=[]: nothing would train; give at least one pattern, '*' for all")
    for layer, ids in (trainable.experts or {}).items():
        if not layer.isdecimal():
            raise UserError(f"trainable.experts.{layer}: has to be the index of a layer, as in 3: [0, 7]")
        if any(expert < 0 for expert in ids) or len(set(ids)) != len(ids):
            raise UserError(f"trainable.experts.{layer}={ids}: expert ids count from 0 and appear once")


def _lora(config: RunConfig) -> None:
    lora = config.lora
    if not lora.rank:
        return
    if config.model.path is None:
        raise UserError(f"lora.rank={lora.rank}: an adapter belongs to a stored model; set model.path to its folder")
    if config.trainable != TrainableSection():
        raise UserError(
            f"lora.rank={lora.rank}: with LoRA nothing of the model itself trains; leave out the section trainable, "
            "and choose layers by lora.targets"
        )
    if not lora.targets or (len(lora.targets) > 1 and "all-linear" in lora.targets):
        raise UserError(f"lora.targets={lora.targets}: name linear layers, or all-linear alone")
