"""Where α comes from in a pass: the hooks that give every block's linear layers their mixture."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from moe_dist.errors import UserError
from moe_dist.models.mixse.cache import paired_cache, twin_of
from moe_dist.models.mixse.linear import Mix
from moe_dist.models.mixse.random_routing import draw
from moe_dist.models.mixse.router import MixseRouter
from moe_dist.models.mixse.spec import MixseSpec
from moe_dist.models.mixse.states import BaseStates

OFF = "off"


class Mixer:
    """Sets the mixture before the layers that use it, whatever calls the model: training, `generate`, a plain forward.

    `mixes`: one a block with `block_input`, one and the same for all blocks with `base_last_hidden`. They are kept
    until the next pass, so recomputation in the backward finds what the forward used.
    `given`: α set by hand, or OFF; None where the routing decides. `listeners` are called as (block, α_BLN, mask),
    block None for a mixture of all blocks; mask `[B, L]` is what the model was told about padding, or None.
    """

    def __init__(self, spec: MixseSpec, router: MixseRouter, decoder: nn.Module, blocks: nn.ModuleList):
        self.spec, self.router = spec, router
        self.per_block = spec.router_input == "block_input"
        shared = Mix()
        self.mixes = [Mix() if self.per_block else shared for _ in blocks]
        self.given: torch.Tensor | str | None = None
        self.listeners: list[Callable] = []
        self.states: BaseStates | None = None
        self._on_device: dict[torch.device, torch.Tensor] = {}
        self._names = list(inspect.signature(decoder.forward).parameters)
        self._inside = False
        self._pass: dict = {}
        decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        if self.per_block:
            for index, block in enumerate(blocks):
                block.register_forward_pre_hook(partial(self._before_block, index), with_kwargs=True)

    def _before_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict):
        if self._inside:
            return None
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._pass = {name: kwargs.get(name) for name in ("input_ids", "attention_mask", "past_key_values")}
        if not self.per_block:
            hidden = None
            if self.given is None and self.spec.routing == "learned":
                kwargs["past_key_values"] = paired_cache(decoder, kwargs)
                hidden = self._base_hidden(decoder, kwargs)
            self._set(None, hidden, kwargs)
        return (), kwargs

    def _before_block(self, index: int, block: nn.Module, args: tuple, kwargs: dict) -> None:
        self._set(index, args[0] if args else kwargs["hidden_states"], kwargs)

    @torch.no_grad()
    def _base_hidden(self, decoder: nn.Module, kwargs: dict) -> torch.Tensor:
        """The last hidden state of the base model `[B, L, H]`: a pass of its own, with its own keys and values; or,
        where `states` are kept, what an earlier one has left."""
        if self.states is not None:
            return self.states.get(kwargs, lambda: self._pass_of_base(decoder, kwargs))
        return self._pass_of_base(decoder, kwargs)

    def _pass_of_base(self, decoder: nn.Module, kwargs: dict) -> torch.Tensor:
        self.mixes[0].weights_TN = None
        kwargs = {**kwargs, "past_key_values": twin_of(kwargs["past_key_values"])}
        for name in ("output_hidden_states", "output_attentions"):
            kwargs.pop(name, None)
        self._inside = True
        try:
            return decoder(**kwargs).last_hidden_state
        finally:
            self._inside = False

    def _set(self, block: int | None, hidden: torch.Tensor | None, kwargs: dict) -> None:
        mix = self.mixes[block or 0]
        if isinstance(self.given, str):
            mix.weights_TN = None
            return
        alpha_BLN = self._alpha(block, hidden, kwargs)
        mix.weights_TN = alpha_BLN.flatten(0, -2) * self._scales(alpha_BLN.device)
        mix.most = self.spec.top_k if self.given is None and self.spec.routing != "uniform" else None
        for listener in self.listeners:
            listener(block, alpha_BLN.detach(), self._pass.get("attention_mask"))

    def _alpha(self, block: int | None, hidden: torch.Tensor | None, kwargs: dict) -> torch.Tensor:
        spec, count = self.spec, len(self.spec.experts)
        if self.given is None and spec.routing == "learned":
            return self.router(hidden)
        seen = (hidden, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        source = next(tensor for tensor in seen if tensor is not None)
        shape, device = source.shape[:2], source.device
        if self.given is not None:
            return self.given.to(device).expand(*shape, count)
        if spec.routing == "uniform":
            return torch.full((*shape, count), 1 / count, device=device)
        tokens, positions = self._tokens_and_positions(shape, device, kwargs)
        return draw(tokens, positions, experts=count, top_k=spec.top_k, seed=spec.seed, block=block or 0)

    def _tokens_and_positions(self, shape, device, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, positions = self._pass["input_ids"], kwargs.get("position_ids")
        if tokens is None:
            raise UserError("random routing draws by token ids: call the model with input_ids, not inputs_embeds")
        if positions is None:
            cache = self._pass["past_key_values"]
            start = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(start, start + shape[1], device=device)[None]
        return tokens, positions.expand(shape)

    def _scales(self, device: torch.device) -> torch.Tensor:
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self.spec.scales, device=device)
        return self._on_device[device]


@contextlib.contextmanager
def given_alpha(model: nn.Module, alpha: torch.Tensor | list[float]) -> Iterator[None]:
    """While it lasts, α is what is given, for every block: `[n]`, or anything that expands to `[B, L, n]`.

    The router is not asked. A one-hot α is one expert alone, with weight 1; all ones are the sum of the experts.
    """
    alpha = torch.as_tensor(alpha, dtype=torch.float32)
    count = len(mixer_of(model).spec.experts)
    if alpha.dim() < 1 or alpha.shape[-1] != count:
        raise UserError(f"alpha has the shape {list(alpha.shape)}; expected [..., {count}], one weight an expert")
    with _given(model, alpha):
        yield


@contextlib.contextmanager
def experts_off(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model is its base: nothing of the experts is computed."""
    with _given(model, OFF):
        yield


@contextlib.contextmanager
def _given(model: nn.Module, value) -> Iterator[None]:
    mixer = mixer_of(model)
    before, mixer.given = mixer.given, value
    try:
        yield
    finally:
        mixer.given = before


def mixer_of(model: nn.Module) -> Mixer:
    """The mixer of a MiXSE model; UserError for any other."""
    mixer = getattr(model, "mixse", None)
    if mixer is None:
        raise UserError(f"{type(model).__name__} is not a MiXSE model: it has no experts to mix")
    return mixer
