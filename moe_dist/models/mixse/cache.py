"""Keys and values of two passes: with `base_last_hidden` the base model reads every token too, and has its own past.

The second cache hangs on the first one and goes where that goes: reordered by beam search, cropped by assisted
decoding, copied with a prompt.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache as remembered

from torch import nn
from transformers import Cache, DynamicCache

from moe_dist.errors import UserError


class _Paired:
    """In front of a cache class: what is done to the cache as a whole is done to `twin` too."""

    def reset(self) -> None:
        super().reset()
        self.twin.reset()

    def reorder_cache(self, beam_idx) -> None:
        super().reorder_cache(beam_idx)
        self.twin.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.twin.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.twin.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices) -> None:
        super().batch_select_indices(indices)
        self.twin.batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self.twin.activate_past_recording()


@remembered
def _paired(kind: type) -> type:
    return type(f"Paired{kind.__name__}", (_Paired, kind), {})


def paired_cache(decoder: nn.Module, kwargs: dict) -> Cache | None:
    """The cache of a call of `decoder` with `kwargs`, with its twin; None where the call keeps nothing.

    A call that would have the decoder make a cache gets it here. UserError for a cache that others have filled.
    """
    kept = kwargs.get("past_key_values")
    if kept is None:
        wanted = kwargs.get("use_cache")
        if not (decoder.config.use_cache if wanted is None else wanted):
            return None
        kept = DynamicCache(config=decoder.config)
    if not isinstance(kept, _Paired):
        if kept.get_seq_length() > 0:
            raise UserError(
                "this cache was filled without the base model's keys and values, which router_input=base_last_hidden "
                "needs: begin with an empty cache"
            )
        twin = deepcopy(kept)
        kept.__class__ = _paired(type(kept))  # so that a copy of the cache is a pair again
        kept.twin = twin
    return kept


def twin_of(kept: Cache | None) -> Cache | None:
    """The cache for the base model's pass."""
    if kept is None:
        return None
    if kept.twin.get_seq_length() != kept.get_seq_length():
        raise UserError(
            f"the base model has read {kept.twin.get_seq_length()} tokens of a cache of {kept.get_seq_length()}: "
            "do not switch between given and routed experts within one text"
        )
    return kept.twin
