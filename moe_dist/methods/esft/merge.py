"""Merging: a base model's folder with the weights of adapters in it, which plain transformers loads.

The bytes of the selected experts are written over those of the base, one tensor at a time: see `models.patched`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_dist.errors import UserError
from moe_dist.methods.esft.adapter_folder import Adapter, Base, open_adapter
from moe_dist.methods.esft.adapter_load import check_overlap
from moe_dist.methods.esft.adapter_names import AdapterNames
from moe_dist.models.conversion import ReadPlan, plan_reading
from moe_dist.models.folder import open_weights
from moe_dist.models.patched import Patch, check_new, write_patched
from moe_dist.models.skeleton import read_config


def merge_adapters(
    adapters: Sequence[str | Path], out: str | Path, *, base: str | Path, overlap: str = "error"
) -> Path:
    """Write `base` with the experts of `adapters` in it as a Hugging Face folder. One process.

    out: new or empty. Weights have the base's dtypes; configuration, generation configuration and tokenizer are the
    base's. overlap: for adapters that hold the same expert, "error" or "last" (the later one in the list wins).
    Raises UserError where an adapter is damaged, does not fit, or was made for another base; nothing is left then.
    """
    base, out = Path(base), Path(out)
    check_new(out)
    config, files = read_config(base), open_weights(base)
    files.check()
    names = AdapterNames(config, files.main_dtype())
    plan = plan_reading(names.skeleton, {key: info.shape for key, info in files.tensors.items()}, names.counts)
    opened = [open_adapter(adapter, names) for adapter in adapters]
    of = Base(base)
    for adapter in opened:
        adapter.check_base(of)
    check_overlap(opened, overlap)

    def patches() -> Iterator[Patch]:
        for adapter in opened:
            with adapter.files:
                yield from _patches(adapter, plan)

    return write_patched(base, files, out, patches())


def _patches(adapter: Adapter, plan: ReadPlan) -> Iterator[Patch]:
    """What an adapter changes in the base's files, as those files keep it."""
    for tensor in adapter.experts:
        layout = plan.experts[tensor.name]
        row = tensor.expert if layout.stacked else None
        for key, part in zip(layout.keys[tensor.expert], layout.split(adapter.expert(tensor)), strict=True):
            yield key, part, row
    homes = {group.first_target: group for group in plan.dense}
    for name, value in adapter.others() if adapter.dense else ():
        group = homes.get(name)
        if group is None or group.converter is not None:
            raise UserError(
                f"{adapter.folder}: {name} is not stored by itself in the base, and cannot be replaced there"
            )
        yield group.names()[0], value, None
