"""Everything here needs a GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
