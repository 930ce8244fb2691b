"""The experts' back end of a run, `moe.experts_backend`: named, the usual one, or the one measured to be the fastest.

What is measured is measured once, before the first step, and kept in the run folder: another back end rounds otherwise,
so that a run which goes on takes the same one and takes the same course to the bit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from torch import nn

from moe_dist.config.schema import RunConfig
from moe_dist.config.strict_json import read_json, write_json
from moe_dist.errors import UserError
from moe_dist.models.surgery import moe_layers
from moe_dist.moe.fastest import Shape, measure, serving, shape_of
from moe_dist.parallel.grid import Grid
from moe_dist.train.engine import DTYPES
from moe_dist.train.run_folder import EXPERTS_BACKEND
from moe_dist.train.start import on_rank_zero

AUTO, MEASURED = "auto", "measured"
TOP_K = ("num_experts_per_tok", "moe_topk", "top_k_experts")  # what transformers' families call it


def check_backend(config: RunConfig, model: nn.Module) -> None:
    """Raise UserError where the back end named in the configuration cannot compute a layer of the model, which may be
    on the meta device, or where nothing says how many rows there are to measure with."""
    name = config.moe.experts_backend
    if name == MEASURED:
        _shapes(config, model)
    if name in (AUTO, MEASURED):
        return
    for path, shape in _shapes(config, model, rows=1).items():
        serve = serving(model.get_submodule(path), shape)
        if name not in serve:
            experts = ("SwiGLU" if shape.swiglu else "no plain SwiGLU") + (" with biases" if shape.bias else "")
            raise UserError(
                f"moe.experts_backend={name} does not compute the experts of {path} here ({experts}, {shape.dtype}, "
                f"hidden {shape.hidden}, width {shape.width}, on {shape.device}); these do: "
                f"{', '.join([AUTO, MEASURED, *serve])}"
            )


def choose_backends(config: RunConfig, model: nn.Module, grid: Grid) -> str | None:
    """Give each layer of the built model the back end measured to be the fastest, if that is asked for; the line that
    says which. The first rank of each pipeline stage measures its layers, or all take what an earlier start of the run
    has recorded, where it still fits. Collective.

    Raises UserError for a record that is damaged.
    """
    if config.moe.experts_backend != MEASURED:
        return None
    file, shapes = Path(config.run.dir) / EXPERTS_BACKEND, _shapes(config, model, slices=grid.slices)
    everywhere = _of_stages(lambda: shapes, grid)
    if not everywhere:
        return None
    record = on_rank_zero(lambda: _read(file))
    fits = _of_stages(lambda: {grid.pipeline_rank: _fits(record, model, shapes)}, grid)
    if all(fits.values()):
        chosen = {path: record[path][0] for path in everywhere}
        line = f"experts' back end: {_listed(chosen)}, as measured before the first step"
    else:
        start = time.perf_counter()
        times = _of_stages(lambda: measure({shape: model.get_submodule(path) for path, shape in shapes.items()}), grid)
        seconds = time.perf_counter() - start
        fastest = {shape: min(found, key=found.get, default=AUTO) for shape, found in times.items()}
        chosen = {path: fastest[shape] for path, shape in everywhere.items()}
        on_rank_zero(lambda: _write(file, chosen, everywhere, times))
        figures = "; ".join(
            ", ".join(f"{name} {value:.3g} ms" for name, value in sorted(found.items(), key=lambda item: item[1]))
            for found in times.values()
        )
        line = f"experts' back end: {_listed(chosen)}, measured in {seconds:.1f} s ({figures})"
    for path, layer in moe_layers(model):
        layer.backend = chosen[path]
    return line


def _of_stages(make: Callable[[], dict], grid: Grid) -> dict:
    """What the first rank of each pipeline stage makes, taken together. Collective."""
    mine = make() if grid.stage_rank == 0 else {}
    told = [mine]
    if grid.world > 1:
        told = [mine] * grid.world
        dist.all_gather_object(told, mine)
    return {key: value for one in told for key, value in one.items()}


def _shapes(config: RunConfig, model: nn.Module, *, rows: int | None = None, slices: int = 1) -> dict[str, Shape]:
    """Path of each layer -> its shape on this rank, with the rows of a forward when experts are chosen alike often.

    slices: how many ranks share a row of tokens."""
    layers = moe_layers(model)
    if rows is None and layers:
        text = model.config.get_text_config()
        top_k = next((getattr(text, name) for name in TOP_K if getattr(text, name, None)), None)
        if top_k is None:
            raise UserError(
                f"moe.experts_backend={MEASURED}: the configuration of {text.model_type} does not say how many experts "
                f"a token has; take {AUTO}, or name a back end"
            )
        # As many tokens come from the other ranks of the expert group as leave for them.
        rows = config.train.micro_batch_size * config.data.seq_len // slices * top_k // config.moe.chunks
    return {path: shape_of(layer, dtype=DTYPES[config.train.precision], rows=rows) for path, layer in layers}


def _read(file: Path) -> dict[str, tuple[str, Shape]] | None:
    """What an earlier start has recorded, by path; None where there is nothing."""
    if not file.exists():
        return None
    try:
        layers = read_json(file).get("layers")
        return {path: (str(entry["backend"]), Shape(**entry["shape"])) for path, entry in layers.items()}
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{file}: no record of back ends; remove it, and they are measured anew") from None


def _fits(record: dict[str, tuple[str, Shape]] | None, model: nn.Module, shapes: dict[str, Shape]) -> bool:
    """Whether it was recorded for these shapes, and serves them here."""
    if record is None or any(path not in record or record[path][1] != shape for path, shape in shapes.items()):
        return False
    serve = {shape: (AUTO, *serving(model.get_submodule(path), shape)) for path, shape in shapes.items()}
    return all(record[path][0] in serve[shape] for path, shape in shapes.items())


def _write(file: Path, chosen: dict[str, str], shapes: dict[str, Shape], times: dict[Shape, dict]) -> None:
    layers = {path: {"backend": chosen[path], "shape": asdict(shape)} for path, shape in shapes.items()}
    measured = [
        {"shape": asdict(shape), "milliseconds": {name: round(value, 4) for name, value in found.items()}}
        for shape, found in times.items()
    ]
    write_json(file, {"layers": layers, "measured": measured})


def _listed(chosen: dict[str, str]) -> str:
    return ", ".join(f"{name} ({count} layers)" for name, count in Counter(chosen.values()).most_common())
