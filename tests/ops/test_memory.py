"""Memory that is used again: never while anything holds it, and never more than was in use at once."""

import threading

import pytest
import torch

from moe_dist.ops import memory, native

MB = 1 << 20

needs_kernels = pytest.mark.skipif(not native.has_cpu(), reason="the native library is not there")


def in_use_waiting_most() -> tuple[int, int, int]:
    return torch.ops.moe_dist.recycled_bytes()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_used_again_once_nothing_holds_it(dtype):
    like = torch.empty(0, dtype=dtype)
    tensor = memory.empty(like, 3000, 1024)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3000, 1024), dtype, True)
    where, view = tensor.data_ptr(), tensor[7]
    del tensor
    other = memory.empty(like, 3000, 1024)
    assert other.data_ptr() != where, "a view still holds it"
    view.fill_(3)
    del view
    assert memory.empty(like, 2900, 1024).data_ptr() == where, "a little smaller fits as well"


@needs_kernels
def test_a_much_larger_block_is_left_alone():
    like = torch.empty(0)
    whole = memory.empty(like, 64 * MB)
    where = whole.data_ptr()
    del whole
    small = memory.empty(like, 5 * MB)
    assert small.data_ptr() != where


@needs_kernels
def test_never_holds_more_than_was_in_use_at_once():
    like = torch.empty(0, dtype=torch.bfloat16)
    before = seen = in_use_waiting_most()[2]
    generator = torch.Generator().manual_seed(0)
    held = []
    for size in torch.randint(1 * MB, 9 * MB, (60,), generator=generator).tolist():
        held.append(memory.empty(like, size))
        used, waiting, most = in_use_waiting_most()
        seen = max(seen, used)
        assert used >= sum(tensor.nbytes for tensor in held)
        assert used + waiting <= most == seen
        held = held[-5:]
    assert most >= before


@needs_kernels
def test_threads_do_not_get_the_same_memory():
    like, wrong = torch.empty(0), []

    def work(number: int) -> None:
        for _ in range(50):
            tensor = memory.empty(like, 512, 1024).fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_kernels
def test_autograd_takes_it_as_any_other_tensor():
    tensor = memory.empty(torch.empty(0), 600, 1024).fill_(2).requires_grad_()
    (tensor * 1).mul_(3).sum().backward()
    assert bool((tensor.grad == 3).all())
    with torch.no_grad():
        inside = memory.empty(tensor, 600, 1024).fill_(1)
    inside.mul_(tensor)  # in place, with a gradient: refused for views that were made without
    assert inside.requires_grad


def test_small_tensors_and_other_devices_are_plain():
    assert memory.empty(torch.empty(0), 3, 4).shape == (3, 4)
    assert memory.empty(torch.empty(0), 0, 4096).shape == (0, 4096)
    assert memory.empty(torch.empty(0, device="meta"), 4096, 4096).device.type == "meta"
