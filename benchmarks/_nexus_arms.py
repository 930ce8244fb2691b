"""The arms of the experiment on Nexus' quality: their names, and what `upcycle` and `extend` are told for them."""

from __future__ import annotations

ARMS = {
    "dense": "seed, continued",
    "dense_all": "seed, continued for the experts' tokens too",
    "merging": "dense merging",
    "btx": "BTX",
    "linear": "linear",
    "cosine": "linear cosine",
    "mlp": "MLP router of as many parameters",
    "paper": "Nexus, as in the paper",
    "prototype": "Nexus, prototype (default)",
    "no_projection": "prototype, P_r = 0",
    "residual": "residual cosine",
}
UPCYCLED = {
    "merging": {"method": "dense_merging"},
    "btx": {"method": "btx"},
    **{arm: {"method": "linear"} for arm in ("linear", "cosine", "mlp")},
    "paper": {"router": "paper"},
    **{arm: {"router": "prototype"} for arm in ("prototype", "no_projection", "residual")},
}
EXTENSIONS = {
    "reset": "linear, reset (the paper's baseline)",
    "append": "linear, append",
    "centroid": "linear, centroid",
    "cosine": "linear cosine, centroid",
    "paper": "Nexus, as in the paper",
    "renormed": "Nexus, new row as long as the old ones",
    "prototype": "Nexus, prototype (default)",
    "no_projection": "prototype, P_r = 0",
    "residual": "residual cosine",
}
EXTENDED = {  # arm -> (mixture that it begins with, options of the extension)
    **{how: ("linear", {"linear_extend": how}) for how in ("reset", "append", "centroid")},
    "cosine": ("cosine", {"linear_extend": "centroid"}),
    "renormed": ("paper", {"renorm_new": True}),
    **{arm: (arm, {}) for arm in ("paper", "prototype", "no_projection", "residual")},
}
MIXED = tuple(dict.fromkeys(mixture for mixture, _ in EXTENDED.values()))  # mixtures that go on, whose weights are kept
