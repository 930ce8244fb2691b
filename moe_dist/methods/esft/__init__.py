"""ESFT: train only the experts that a task uses. Score the experts, select them, train them, share them.

In a training loop of one's own, on a plain transformers model:

    summary = score_experts(model, batches)
    apply_selection(model, choose(summary.of_kind("token"), p=0.2))
    ...train...
    model.save_pretrained("adapters/intent")
"""

from moe_dist.methods.esft.select import least_used_experts, random_experts, select_experts

_HOMES = {
    "score_experts": "library",
    "apply_selection": "library",
    "choose": "selection",
    "save_adapter": "adapter_save",
    "load_adapter": "adapter_load",
    "unload_adapter": "adapter_load",
    "swap_adapter": "adapter_load",
    "merge_adapters": "merge",
}
__all__ = ["least_used_experts", "random_experts", "select_experts", *_HOMES]


def __getattr__(name: str):
    """Import on first use: transformers takes seconds, and selecting needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
