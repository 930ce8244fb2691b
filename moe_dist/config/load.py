"""From YAML and `key=value` overrides to a checked `RunConfig`, and back to a file without secrets."""

import copy
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from moe_dist.config.checks import check_bounds, check_paths, validate
from moe_dist.config.expert_files import read_expert_config
from moe_dist.config.keys import check_known
from moe_dist.config.plain_yaml import MAX_BYTES, parse
from moe_dist.config.references import resolve
from moe_dist.config.schema import RunConfig, TrainableSection
from moe_dist.errors import UserError

Schema = TypeVar("Schema")


def load(path: str | os.PathLike, overrides: Sequence[str] = (), *, paths: bool = True) -> RunConfig:
    """Read a YAML file, apply overrides such as 'train.lr=1e-4' in order, and check the result.

    paths: also require that local paths exist, and read trainable.experts_file (not so for a stage whose input an
    earlier stage makes).
    Raises UserError that names the file or the override, the key, and what to do.
    """
    tree, name = read_mapping(path), _safe_name(Path(path).stem)
    config = build(tree, overrides, origin=os.fspath(path), name=name, files=paths)
    if paths:
        check_paths(config)
    return config


def read_mapping(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file; {} for an empty file. Raises UserError naming the file (and the line)."""
    origin = os.fspath(path)
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise UserError(f"{origin}: larger than {MAX_BYTES:,} bytes; this is no configuration")
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{origin}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{origin}: {error.strerror}") from None
    tree = parse(text, origin=origin)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{origin}: has to be a mapping of sections (model:, data:, train:, ...)")
    return tree


def build(
    tree: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    origin: str = "configuration",
    name: str = "run",
    files: bool = True,
) -> RunConfig:
    """A checked RunConfig from nested plain values. `name` is what the run is called when run.name is absent.

    files: replace trainable.experts_file by what is in it, so that a run goes on with the same experts whatever
    becomes of the file.
    """
    if "stages" in tree:
        raise UserError(f"{origin}: this is a recipe of stages; run it with `moe-dist run`")
    tree = copy.deepcopy(tree)
    _normalise(tree)
    check_known(tree, origin=origin)
    whole = _over(asdict(RunConfig()), tree)
    for override in overrides:
        _apply(whole, override)
        _normalise(whole)
        check_known(whole, origin=f"override {override!r}")
    whole["run"]["name"] = name if whole["run"]["name"] is None else whole["run"]["name"]
    if whole["run"]["dir"] is None:
        whole["run"]["dir"] = f"runs/{whole['run']['name']}"
    config = _typed(resolve(whole, origin=origin), origin)
    _finish(config)
    validate(config)
    if files and config.trainable.experts_file is not None:
        _take_experts(config.trainable)
    return config


def load_schema(path: str | os.PathLike, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """A configuration of another kind than a run's: a dataclass of sections, which may use those of a run.

    Types, unknown keys, references and bounds are checked; what relates keys to each other is the caller's.
    """
    origin = os.fspath(path)
    tree = read_mapping(path)
    _normalise(tree)
    check_known(tree, origin=origin, schema=schema)
    whole = _over(asdict(schema()), tree)
    for override in overrides:
        _apply(whole, override)
        _normalise(whole)
        check_known(whole, origin=f"override {override!r}", schema=schema)
    config = _typed(resolve(whole, origin=origin), origin, schema)
    check_bounds(config)
    return config


def _take_experts(section: TrainableSection) -> None:
    found = read_expert_config(section.experts_file)
    section.experts, section.experts_file = found.experts, None
    section.shared_experts, section.non_expert_modules = found.shared_experts, found.non_expert_modules


def _typed(tree: dict[str, Any], origin: str, schema: type[Schema] = RunConfig) -> Schema:
    """Convert plain values to the types of the schema ("3" for an int is 3; "x" for an int is an error)."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), tree))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        raise UserError(f"{origin}: {key + ': ' if key else ''}{reason}") from None
    assert isinstance(config, schema)
    return config


def _normalise(tree: dict[str, Any]) -> None:
    """Write short forms out: of data sources 'file', one mapping of a source, {name: source}; of LoRA one target."""
    lora = tree.get("lora")
    if isinstance(lora, dict) and isinstance(lora.get("targets"), str):
        lora["targets"] = [lora["targets"]]
    data = tree.get("data")
    if not isinstance(data, dict):
        return
    for group in ("train", "eval"):
        if group not in data:
            continue
        value = data[group]
        if value is None:
            value = []
        elif isinstance(value, str):
            value = [value]
        elif isinstance(value, dict):
            single = any(isinstance(value.get(kind), str) for kind in ("path", "hub", "corpus"))
            named = [{"name": name, **_source(source)} for name, source in value.items()] if not single else []
            value = [value] if single else named
        if isinstance(value, list):
            data[group] = [_source(source) for source in value]


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _finish(config: RunConfig) -> None:
    """Fill in what follows from other keys: '~' in paths, and a name of its own for every source."""
    config.run.dir = os.path.expanduser(config.run.dir)
    for section, name in (
        (config.model, "path"),
        (config.model, "tokenizer"),
        (config.data, "cache_dir"),
        (config.parallel, "placement_scores"),
        (config.trainable, "experts_file"),
    ):
        if getattr(section, name) is not None:
            setattr(section, name, os.path.expanduser(getattr(section, name)))
    for sources in (config.data.train, config.data.eval):
        taken = {source.name for source in sources}
        for source in sources:
            source.path = source.path and os.path.expanduser(source.path)
            if source.name is None:
                stem = _safe_name(Path(source.corpus or source.hub or source.path or "").stem)
                names = [stem, *(f"{stem}-{number}" for number in range(2, len(sources) + 2))]
                source.name = next(name for name in names if name not in taken)
                taken.add(source.name)


def _safe_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+=-]", "-", text).lstrip("._+=-") or "run"


def _over(base: Any, top: Any) -> Any:
    """`top` laid over `base`: mappings are merged, everything else is replaced."""
    if isinstance(base, dict) and isinstance(top, dict):
        return {**base, **{name: _over(base.get(name), value) for name, value in top.items()}}
    return top


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one 'a.b.c=value' in place. A list item is meant by its index, or by its name where items have one."""
    path, equals, text = override.partition("=")
    steps = path.strip().split(".")
    if not equals or not all(steps):
        raise UserError(f"override {override!r}: has to be key=value, as in train.lr=1e-4")
    value = parse(text, origin=f"override {override!r}")
    node: Any = tree
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(node, list):
            index = _index(node, step, override)
            if last:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if last:
                node[step] = value
            elif node.get(step) is None:
                node[step] = {}
            node = node[step]
        else:
            raise UserError(f"override {override!r}: {'.'.join(steps[:depth])} is a single value and has no keys")


def _index(items: list, step: str, override: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if step in names:
        return names.index(step)
    if step.isdecimal() and int(step) < len(items):
        return int(step)
    known = ", ".join(filter(None, names)) or f"0 to {len(items) - 1}"
    raise UserError(f"override {override!r}: no item {step!r}; there is {known if items else 'none'}")
