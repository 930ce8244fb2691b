"""Hugging Face models in and out: families, surgery, loading, initialising, export."""

_HOMES = {
    "load_model": "loading",
    "init_model": "initialising",
    "export_model": "export",
    "moe_layers": "surgery",
    "swap": "surgery",
    "FAMILIES": "families",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Import on first use: transformers takes seconds, and `import moe_dist` may not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
