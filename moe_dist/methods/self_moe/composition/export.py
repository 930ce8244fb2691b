"""One expert out of a mixture: as an adapter of PEFT, or merged into its base."""

from __future__ import annotations

import shutil
from pathlib import Path

from moe_dist.data.atomic import new_folder
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.composition.merge import merge_adapter
from moe_dist.models.adapter import CONFIG, MANIFEST, WEIGHTS, open_lora
from moe_dist.models.loading import resolve_folder
from moe_dist.models.mixse.spec import KEY, read_spec
from moe_dist.models.patched import check_new
from moe_dist.models.skeleton import read_config


def export_expert(mixture: str | Path, expert: str, out: str | Path, *, form: str) -> Path:
    """Write `expert` of a MiXSE folder to `out`, new or empty. One process.

    form: "peft", the adapter, its bytes as they are; "merged", a dense Hugging Face model, W + scale · B A, each sum
    taken in float32 and rounded once. Raises UserError where the folder is no mixture or has no such expert.
    """
    folder, out = resolve_folder(mixture), Path(out).expanduser()
    spec = read_spec(read_config(folder))
    if spec is None:
        raise UserError(f"{folder} is no mixture: its config.json has no {KEY!r}")
    if expert not in spec.experts:
        raise UserError(f"{folder} has no expert {expert!r}; it has {', '.join(spec.experts)}")
    check_new(out)
    adapter = open_lora(folder / KEY / expert)
    if form == "merged":
        return merge_adapter(folder, adapter.folder, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out, marker=CONFIG) as partial:
            for name in (WEIGHTS, MANIFEST, CONFIG):
                if (adapter.folder / name).is_file():
                    shutil.copyfile(adapter.folder / name, partial / name)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    return out
