"""The choice of copies on a GPU: that of the CPU, and nothing waits for the device."""

from __future__ import annotations

import pytest
import torch

from moe_dist.moe.placement import balance, from_lists


@pytest.mark.parametrize("spare", [0, 2])
def test_places_are_those_of_the_cpu(spare):
    generator = torch.Generator().manual_seed(0)
    load_E = torch.rand(64, generator=generator)
    lists = balance(load_E, ranks=8, trainable=[3, 17], spare=spare)
    placement = from_lists(lists, num_experts=64, trainable=[3, 17], load_E=load_E)
    ids = torch.randint(-1, 64, (1031, 6), generator=generator, dtype=torch.int32)
    for rank in (0, 5):
        copies = placement.copies(rank)
        on_device = ids.cuda()
        copies.places(on_device)  # the tables travel once
        torch.cuda.set_sync_debug_mode("error")
        try:
            places = copies.places(on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(places.cpu(), copies.places(ids))
        assert torch.equal(copies.experts_on(on_device.device).cpu(), copies.experts_of_places)
