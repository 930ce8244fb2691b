"""What needs a GPU: the modules of tests/gpu, which cannot be imported where there is none."""

import importlib

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU for the kernels of CUDA")


def test_fault_27_experts_without_tokens_on_a_gpu():
    importlib.import_module("tests.gpu.test_layer_cuda").test_layer(torch.float32, False, False)


def test_fault_28_offsets_beyond_32_bits_on_a_gpu():
    importlib.import_module("tests.gpu.test_permute_cuda").test_offsets_beyond_32_bits()
