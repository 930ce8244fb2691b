"""The state of every random number generator of this process as JSON values, and back, to the bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from moe_dist.checkpoint.errors import CheckpointError

_PYTHON_WORDS = "<u4"


def rng_state() -> dict[str, Any]:
    """Python's, numpy's (the global one), torch's on the CPU, and torch's on each CUDA device in use."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": {"version": version, "words": np.array(words, dtype=_PYTHON_WORDS).tobytes().hex(), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": keys.astype(_PYTHON_WORDS).tobytes().hex(),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": [_to_hex(state) for state in torch.cuda.get_rng_state_all()] if in_use else [],
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Set what `rng_state` gave. CUDA states are set as far as devices are there. CheckpointError if malformed."""
    try:
        python, numpy = state["python"], state["numpy"]
        words = np.frombuffer(bytes.fromhex(python["words"]), dtype=_PYTHON_WORDS)
        random.setstate((python["version"], tuple(int(word) for word in words), python["gauss"]))
        keys = np.frombuffer(bytes.fromhex(numpy["keys"]), dtype=_PYTHON_WORDS).astype(np.uint32)
        np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
        torch.set_rng_state(_from_hex(state["torch"]))
        for device, text in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_from_hex(text), device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the state of the random number generators is damaged: {error}") from error


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
