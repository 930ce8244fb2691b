"""What the router of a `base_last_hidden` mixture reads, kept on disk: in training the rows come again every epoch, and
the base model, which does not change, need not read them again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe_dist.errors import UserError


class BaseStates:
    """Last hidden states of the base model by the row that they belong to, a file each.

    folder: of one base in one dtype; ranks may share it. Files appear whole, and what cannot be read is made again.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"model.base_states: {folder} cannot be made: {error.strerror}") from None

    def get(self, kwargs: dict, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`[B, L, H]` for a call of the decoder with `kwargs`: from the files, or by `compute`, which fills them."""
        names = _row_names(kwargs)
        if names is None:
            return compute()
        device = kwargs["input_ids"].device
        found = [self._read(name, kwargs["input_ids"].shape[1]) for name in names]
        if all(row is not None for row in found):
            return torch.stack(found).to(device)
        states_BLH = compute()
        for name, row, states_LH in zip(names, found, states_BLH, strict=True):
            if row is None:
                self._write(name, states_LH)
        return states_BLH

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, name: str, length: int) -> torch.Tensor | None:
        try:
            states_LH = load_file(self._path(name))["states"]
        except (OSError, SafetensorError, KeyError):
            return None
        return states_LH if len(states_LH) == length else None

    def _write(self, name: str, states_LH: torch.Tensor) -> None:
        path = self._path(name)
        partial = path.with_name(f".{name}-{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file({"states": states_LH.cpu().contiguous()}, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise UserError(f"model.base_states: {path} cannot be written: {error}") from None


def _row_names(kwargs: dict) -> list[str] | None:
    """A name for each row by all that its states depend on; None for calls that are not plain rows of tokens."""
    ids, mask, positions = (kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    plain = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)
    if ids is None or not plain or kwargs.get("past_key_values") is not None:
        return None
    parts = [ids, *(tensor.expand(ids.shape) for tensor in (mask, positions) if tensor is not None)]
    kinds = f"{mask is not None}{positions is not None}".encode()
    rows = torch.stack([part.long().cpu() for part in parts], dim=1).contiguous()
    return [hashlib.sha256(kinds + row.numpy().tobytes()).hexdigest() for row in rows]
