"""What a forward and a backward of a model allocate, followed on the meta device: counted, not derived.

The family's own code runs, with autograd, on tensors that have a shape and no memory; so whatever its attention, norms
and router keep is what will be kept. Only what needs real tokens or a real kernel is played by shadows (`shadow`).

A trace comes in *segments* (the embedding, each kind of layer, the output layer with its loss; forward and backward),
and a segment in *stretches*, cut where the gradient of a parameter is ready: what becomes of that is the engine's
matter. `timeline` puts segments together again for any number of layers, micro-batches and any ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from moe_dist.models.surgery import moe_layers
from moe_dist.parallel.grid import Grid
from moe_dist.planner.live import LiveBytes
from moe_dist.planner.shadow import Loss, Rows, fused_attention, paper_groups, shadow_experts
from moe_dist.train.family import family_of


@dataclass(frozen=True)
class Ready:
    """A gradient that is ready: its elements, its bytes, and whose parameter it is: dense, tensor or expert."""

    elements: int
    bytes: int
    family: str


@dataclass(frozen=True)
class Stretch:
    """Bytes above what was alive when its segment began: the most there were in it, and those at its end.

    ready: the gradient that is ready at its end, which `end` no longer counts.
    """

    peak: int
    end: int
    ready: Ready | None = None


Segment = tuple[Stretch, ...]
EMPTY: Segment = ()


@dataclass(frozen=True)
class Trace:
    """Segments by name: embedding, before (what comes between it and the layers), head (from the last layer to the
    logits), loss, and the decoder layers that were followed, by index; of each, forward and backward.

    totals: by the same names, of both together: "flops", but those of the "expert flops"; "kernels" that the host
    starts; the bytes that this rank sends over the axes "tensor" and "sequence", and in how many exchanges ("tensor
    exchanges", "sequence exchanges").
    """

    forward: dict[str | int, Segment]
    backward: dict[str | int, Segment]
    totals: dict[str | int, dict[str, int]]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of the model's decoder layers."""
    count = model.config.get_text_config().num_hidden_layers
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)


def follow(
    model: nn.Module,
    grid: Grid,
    *,
    batch: int,
    length: int,
    rows_of: Callable[[nn.Module], Rows],
    layers: Iterable[int],
    masked: bool,
    device: str,
) -> Trace:
    """Run `model`, on the meta device, in training mode, with what trains marked; decoder layers but `layers` are
    passed over.

    grid: the layout that has cut the model. batch: rows of a micro-batch, of `length` tokens.
    rows_of: experts layer -> the rows that it computes. masked: whether attention gets a mask (packed documents).
    device: "cuda" or "cpu", where the model will run.
    """
    recorder = _Recorder()
    wanted = set(layers)
    with ExitStack() as stack:
        for _, experts in moe_layers(model):
            _patch(stack, experts, shadow_experts(experts, rows_of(experts), recorder.note))
        for index, layer in enumerate(decoder_layers(model)):
            if index in wanted:
                recorder.watch(stack, index, layer)
            else:
                _patch(stack, layer, _passed)
        embedding = model.get_input_embeddings()
        stack.enter_context(_hook(embedding.register_forward_hook(lambda *_: recorder.cut("forward", "embedding"))))
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.enter_context(_hook(parameter.register_post_accumulate_grad_hook(recorder.ready)))
        ids = torch.zeros(batch, length // grid.sequence, dtype=torch.int64, device="meta")
        inputs = {"input_ids": ids, "position_ids": ids.clone(), "attention_mask": _mask(model, batch, length)}
        stack.enter_context(recorder.live)
        stack.enter_context(paper_groups(model, grid, recorder.note))
        stack.enter_context(fused_attention(recorder.note, masked=masked, wide_heads=device == "cuda"))
        recorder.live.adopt([*model.parameters(), *model.buffers(), ids])
        recorder.begin()
        logits = model(**inputs, use_cache=False).logits
        recorder.cut("forward", "head")
        loss = Loss.apply(logits.flatten(0, 1), grid.tensor, recorder.note)
        recorder.cut("forward", "loss")
        del logits
        loss.backward()
        del loss
        recorder.cut("backward", "embedding")
    return Trace(recorder.segments["forward"], recorder.segments["backward"], recorder.totals)


class _Recorder:
    def __init__(self):
        self.live = LiveBytes("meta")
        self.segments: dict[str, dict[str | int, Segment]] = {"forward": {}, "backward": {}}
        self.stretches: list[Stretch] = []
        self.start = 0
        self.totals: dict[str | int, dict[str, int]] = {}
        self.noted: dict[str, int] = {}

    def begin(self) -> None:
        self.stretches, self.start = [], self.live.now
        self.live.restart()

    def cut(self, way: str, name: str | int) -> None:
        self.stretches.append(Stretch(self.live.peak - self.start, self.live.now - self.start))
        self.segments[way][name] = tuple(self.stretches)
        self.note("flops", self.live.flops)
        self.note("kernels", self.live.kernels)
        self.live.flops = self.live.kernels = 0
        known = self.totals.setdefault(name, {})
        for what, size in self.noted.items():
            known[what] = known.get(what, 0) + size
        self.noted = {}
        self.begin()

    def note(self, what: str, size: int) -> None:
        self.noted[what] = self.noted.get(what, 0) + size

    def ready(self, parameter: nn.Parameter) -> None:
        peak, size = self.live.peak, parameter.grad.nbytes
        parameter.grad = None
        found = Ready(parameter.numel(), size, family_of(parameter))
        self.stretches.append(Stretch(peak - self.start, self.live.now - self.start, found))
        self.live.restart()

    def watch(self, stack: ExitStack, index: int, layer: nn.Module) -> None:
        """Cut where the hidden states enter and leave the layer, and where their gradients do."""

        def enter(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if not self.segments["forward"].keys() - {"embedding"}:
                self.cut("forward", "before")
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self.cut("backward", index))

        def leave(_, args, kwargs, output):
            self.cut("forward", index)
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad and "head" not in self.segments["backward"]:
                hidden.register_hook(lambda _: self.head_done())

        stack.enter_context(_hook(layer.register_forward_pre_hook(enter, with_kwargs=True)))
        stack.enter_context(_hook(layer.register_forward_hook(leave, with_kwargs=True)))

    def head_done(self) -> None:
        if "head" not in self.segments["backward"]:
            self.cut("backward", "head")


class _hook:
    """A hook's handle as a context."""

    def __init__(self, handle):
        self.handle = handle

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


def _patch(stack: ExitStack, module: nn.Module, forward: Callable) -> None:
    kept = module.__dict__.get("forward")
    module.forward = forward

    def restore():
        del module.forward
        if kept is not None:
            module.forward = kept

    stack.callback(restore)


def _passed(hidden_states, *args, **kwargs):
    return hidden_states


def _mask(model: nn.Module, batch: int, length: int):
    """A ready mask in the form that the model takes, one or one for each kind of layer."""
    config = model.config.get_text_config()
    eager = model.config._attn_implementation == "eager"
    dtype = model.dtype if eager else torch.bool
    mask = torch.empty(batch, 1, length, length, dtype=dtype, device="meta")
    kinds = set(getattr(config, "layer_types", None) or ())
    return dict.fromkeys(kinds, mask) if len(kinds) > 1 or config.model_type in ("gpt_oss",) else mask
