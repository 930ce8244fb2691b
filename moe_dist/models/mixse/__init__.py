"""MiXSE (arXiv 2406.12034): LoRA experts over a frozen dense model, mixed token by token by one shared router."""

_HOMES = {
    "write_mixse_folder": "folder",
    "MixseSpec": "spec",
    "given_alpha": "mixing",
    "experts_off": "mixing",
    "RoutingRecorder": "recorder",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Import on first use: transformers takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
