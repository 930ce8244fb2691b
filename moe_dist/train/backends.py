"""The experts' back end of a run, `moe.experts_backend`: named, the usual one, or the one measured to be the fastest.

What is measured is measured once, before the first step, and kept in the run folder: another back end rounds otherwise,
so that a run which goes on takes the same one and takes the same course to the bit.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from torch import nn

from moe_dist.config.schema import RunConfig
from moe_dist.config.strict_json import read_json, write_json
from moe_dist.errors import UserError
from moe_dist.models.surgery import moe_layers
from moe_dist.moe.fastest import Shape, measure, serving, shape_of
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


def choose_backends(config: RunConfig, model: nn.Module) -> str | None:
    """Give each layer of the built model the back end measured to be the fastest, if that is asked for; the line that
    says which. Rank 0 measures, or reads what an earlier start of the run has recorded. Collective.

    Raises UserError for a record that is damaged.
    """
    if config.moe.experts_backend != MEASURED or not moe_layers(model):
        return None
    shapes = _shapes(config, model)
    chosen, line = on_rank_zero(lambda: _recorded_or_measured(model, shapes, Path(config.run.dir) / EXPERTS_BACKEND))
    for path, layer in moe_layers(model):
        layer.backend = chosen[path]
    return line


def _shapes(config: RunConfig, model: nn.Module, rows: int | None = None) -> dict[str, Shape]:
    """Path of each layer -> its shape on this rank, with the rows of a forward when experts are chosen alike often."""
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
        rows = config.train.micro_batch_size * config.data.seq_len * top_k // config.moe.chunks
    return {path: shape_of(layer, dtype=DTYPES[config.train.precision], rows=rows) for path, layer in layers}


def _recorded_or_measured(model: nn.Module, shapes: dict[str, Shape], file: Path) -> tuple[dict[str, str], str]:
    """(the back end of each layer, what to say of it)."""
    recorded = _recorded(model, shapes, file) if file.exists() else None
    if recorded is not None:
        return recorded, f"experts' back end: {_listed(recorded)}, as measured before the first step"
    start = time.perf_counter()
    times = measure({shape: model.get_submodule(path) for path, shape in shapes.items()})
    seconds = time.perf_counter() - start
    fastest = {shape: min(found, key=found.get, default=AUTO) for shape, found in times.items()}
    chosen = {path: fastest[shape] for path, shape in shapes.items()}
    layers = {path: {"backend": chosen[path], "shape": asdict(shape)} for path, shape in shapes.items()}
    measured = [
        {"shape": asdict(shape), "milliseconds": {name: round(value, 4) for name, value in found.items()}}
        for shape, found in times.items()
    ]
    write_json(file, {"layers": layers, "measured": measured})
    figures = "; ".join(
        ", ".join(f"{name} {value:.3g} ms" for name, value in sorted(found.items(), key=lambda item: item[1]))
        for found in times.values()
    )
    return chosen, f"experts' back end: {_listed(chosen)}, measured in {seconds:.1f} s ({figures})"


def _recorded(model: nn.Module, shapes: dict[str, Shape], file: Path) -> dict[str, str] | None:
    """What was recorded, if it was for these shapes and serves here; None otherwise."""
    layers = read_json(file).get("layers")
    try:
        found = {path: (str(entry["backend"]), Shape(**entry["shape"])) for path, entry in layers.items()}
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{file}: no record of back ends; remove it, and they are measured anew") from None
    if {path: shape for path, (_, shape) in found.items()} != shapes:
        return None
    chosen = {path: backend for path, (backend, _) in found.items()}
    serve = {shape: (AUTO, *serving(model.get_submodule(path), shape)) for path, shape in shapes.items()}
    return chosen if all(chosen[path] in serve[shape] for path, shape in shapes.items()) else None


def _listed(chosen: dict[str, str]) -> str:
    return ", ".join(f"{name} ({count} layers)" for name, count in Counter(chosen.values()).most_common())
