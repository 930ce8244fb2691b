"""Published data of one task, where it lies beside the checkout: real routing, its scores, its expert config."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[4] / "shared" / "data" / "esft"
needed = pytest.mark.skipif(
    not (FOLDER / "intent_routing.npz").is_file(), reason=f"the published routing of the intent task is not in {FOLDER}"
)


def routing() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids int64 `[26,T,6]`, weights float64 `[26,T,6]` (rounded to 4 decimals), tokens of each document `[127]`."""
    with np.load(FOLDER / "intent_routing.npz") as file:
        return file["expert_ids"].astype(np.int64), file["gate_1e4"] / 1e4, file["doc_lengths"].astype(np.int64)
