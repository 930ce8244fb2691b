"""Small runs by the training loop itself, and what they leave on disk, as plain data to compare."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from moe_dist import checkpoint
from moe_dist.config.checks import axes_of
from moe_dist.config.load import build
from moe_dist.data.corpora import train_tokenizer
from moe_dist.parallel.grid import build_grid
from moe_dist.train import loop, state
from moe_dist.train.build import build_model, plan_model
from moe_dist.train.engine import build_engine
from moe_dist.train.replicas import check_replicas
from tests.models.tiny import make_folder

VOCAB = 300
LENGTH = 24
# What differs between two runs of the same thing.
CLOCK = ("time", "tokens_per_second")


def make_files(folder: Path, *families: str, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """`folder` with a text file and a tiny model of each family (`changes`: to its config), a tokenizer beside it."""
    texts = [f"expert {n} takes {n * 7 % 13} tokens" + " and gives them back" * (n % 4) for n in range(48)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB)
    for family in families:
        made = make_folder(family, folder / family, vocab_size=VOCAB, dtype=dtype, **changes)
        tokenizer.save_pretrained(made)
    return folder


def settings(files: Path, run: Path, family: str, **sections: dict) -> dict:
    """A configuration as a user would write it; `sections` (train={...}, moe={...}) go over it."""
    tree: dict = {
        "run": {"name": "tiny", "dir": str(run)},
        "model": {"path": str(files / family)},
        "data": {
            "train": str(files / "text.jsonl"),
            "seq_len": LENGTH,
            "cache_dir": str(files / "cache"),
        },
        "train": {
            "steps": 6,
            "global_batch_size": 4,
            "lr": 1e-2,
            "warmup_steps": 1,
            "min_lr_ratio": 0.1,
            "precision": "fp32",
            "log_every": 1,
        },
        "parallel": {"reduce_bucket_size": 4000},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return tree


def train(tree: dict, resume: str = "auto") -> int:
    """On each rank: the exit code of a run."""
    return loop.train(build(tree), resume=resume)


def stored(run: Path, step: int) -> dict[tuple[str, str, int], torch.Tensor]:
    """(kind, name, expert) -> tensor of all that the checkpoint of that step holds."""
    tensors = {}
    with checkpoint.open_checkpoint(run / "checkpoints" / f"step-{step}", verify="full") as opened:
        for name, info in opened.catalogue.items():
            for kind in info.kinds:
                for expert in (checkpoint.NOT_EXPERT,) if info.experts is None else info.experts:
                    tensors[kind, name, expert] = opened.tensor(kind, name, expert)
    return tensors


def trainer_state(run: Path, step: int) -> dict:
    """Step, optimizer step, position in the data: what a checkpoint holds besides tensors. Not the configuration."""
    with checkpoint.open_checkpoint(run / "checkpoints" / f"step-{step}") as opened:
        return {name: value for name, value in opened.trainer_state.items() if name != "config"}


def events(run: Path, *kinds: str) -> list[dict]:
    """The lines of metrics.jsonl of these kinds, without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in CLOCK} for line in lines if line["event"] in kinds
    ]


def assert_same_bits(ours: dict, theirs: dict) -> None:
    """Equal keys, dtypes, shapes and bits; −0 and 0 differ, and a NaN equals itself."""
    assert ours.keys() == theirs.keys(), f"only on one side: {sorted(map(str, ours.keys() ^ theirs.keys()))[:5]}"
    odd = [key for key in ours if not same_bits(ours[key], theirs[key])]
    assert not odd, f"{len(odd)} of {len(ours)} tensors differ, such as {odd[:5]}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and sha256(a) == sha256(b)


def sha256(tensor: torch.Tensor) -> str:
    """Of the tensor's bytes."""
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def carry_over(tree: dict, source: Path, root: Path) -> None:
    """On each rank: load the checkpoint into an engine of this layout, look whether replicas are alike, and save it
    again, without a step."""
    config = build(tree)
    grid = build_grid(**axes_of(config))
    plan = plan_model(config, grid)
    model = build_model(config, plan, grid)
    engine = build_engine(
        model,
        grid,
        zero_stage=config.parallel.zero_stage,
        precision=config.train.precision,
        reduce_bucket_size=config.parallel.reduce_bucket_size,
    )
    with checkpoint.open_checkpoint(source) as opened:
        state.restore(opened, engine, plan)
        check_replicas(model, config, grid, step=opened.step)
        kept = opened.trainer_state
        state.save(root, opened.step, config, engine, plan, grid, sampler=kept["sampler"], tokens=kept["tokens"])
    engine.close()
