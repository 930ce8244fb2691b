"""A recipe: a list of stages that `moe-dist run` goes through, each of them resumable.

dir: runs/mine
stages:
  - {name: train, verb: train, config: train.yaml, overrides: [run.dir=${dir}/train], launch: deepspeed, ranks: 2}
  - {name: export, verb: export, args: ["${dir}/train", "${dir}/model"]}
  - {name: sample, script: sample.py, args: ["${dir}/model"]}
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_dist.config.keys import check_known
from moe_dist.config.load import read_mapping
from moe_dist.config.references import resolve
from moe_dist.config.schema import key
from moe_dist.errors import UserError


@dataclass
class Stage:
    name: str | None = key(None, "Name of the stage; unique in the recipe.")
    verb: str | None = key(None, "A verb of moe-dist, as train or esft score; or give module or script.")
    module: str | None = key(None, "A Python module to run (python -m).")
    script: str | None = key(None, "A Python file to run.")
    config: str | None = key(None, "First argument of the verb: a config file, relative to the recipe.")
    overrides: list[str] = key([], "key=value overrides of that config.")
    args: list[str] = key([], "Further arguments.")
    launch: str = key("none", "Who starts the ranks.", choices=("none", "deepspeed", "torchrun"))
    env: dict[str, str] = key({}, "Environment variables of the stage.")
    ranks: int = key(1, "Ranks that the launcher starts on this machine.", low=1)


@dataclass
class Recipe:
    dir: str | None = key(None, "Folder of the recipe's logs and markers; runs/<file's stem> when absent.")
    stages: list[Stage] = key([], "Stages, in order.")


def load_recipe(path: str | os.PathLike) -> Recipe:
    """Read and check a recipe. Raises UserError that names the file, the stage, and what to do."""
    origin, folder = os.fspath(path), Path(path).parent
    tree = read_mapping(path)
    if "stages" not in tree:
        raise UserError(f"{origin}: a recipe needs stages; a training configuration runs with `moe-dist train`")
    check_known(tree, origin=origin, schema=Recipe)
    tree = resolve({"dir": f"runs/{Path(path).stem}", **tree}, origin=origin)
    recipe = Recipe(str(tree["dir"]), [_stage(index, item, origin) for index, item in enumerate(tree["stages"] or [])])
    if not recipe.stages:
        raise UserError(f"{origin}: stages is empty; a recipe needs at least one")
    names = [stage.name for stage in recipe.stages]
    for index, stage in enumerate(recipe.stages):
        place = f"{origin}: stage {stage.name or index}"
        if not stage.name or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", stage.name):
            raise UserError(f"{place}: needs a name of letters, digits, _ and -")
        if names.count(stage.name) > 1:
            raise UserError(f"{place}: two stages have this name")
        kinds = [kind for kind in ("verb", "module", "script") if getattr(stage, kind) is not None]
        if len(kinds) != 1:
            raise UserError(f"{place}: set exactly one of verb, module and script")
        if stage.verb == "run":
            raise UserError(f"{place}: a recipe cannot run a recipe")
        if stage.overrides and not stage.config:
            raise UserError(f"{place}: overrides need a config")
        if stage.launch not in ("none", "deepspeed", "torchrun"):
            raise UserError(f"{place}: launch={stage.launch} has to be one of none, deepspeed, torchrun")
        if stage.ranks < 1 or (stage.ranks > 1 and stage.launch == "none"):
            raise UserError(f"{place}: ranks={stage.ranks} needs launch: deepspeed or torchrun")
        for kind in ("config", "script"):
            if getattr(stage, kind) is not None:
                file = folder / getattr(stage, kind)
                if not file.is_file():
                    raise UserError(f"{place}: {kind} {file}: no such file")
                setattr(stage, kind, str(file))
    return recipe


def _stage(index: int, item: dict, origin: str) -> Stage:
    lists = {"overrides", "args"}
    for name, value in item.items():
        wanted = list if name in lists else {"ranks": int, "env": dict}.get(name, str)
        if not isinstance(value, wanted):
            kind = {list: "a list", dict: "a mapping", int: "a whole number", str: "text"}[wanted]
            raise UserError(f"{origin}: stages.{index}.{name}={value!r}: has to be {kind}")
    stage = Stage(**{name: [str(part) for part in value] if name in lists else value for name, value in item.items()})
    stage.env = {name: str(value) for name, value in stage.env.items()}
    return stage


def stage_hashes(recipe: Recipe) -> list[str]:
    """One sha256 a stage: over what it runs, the files that it names, and the stages before it."""
    hashes, before = [], ""
    for stage in recipe.stages:
        digest = hashlib.sha256(before.encode())
        digest.update(json.dumps(asdict(stage), sort_keys=True).encode())
        for file in (stage.config, stage.script):
            digest.update(Path(file).read_bytes() if file else b"")
        before = digest.hexdigest()
        hashes.append(before)
    return hashes
