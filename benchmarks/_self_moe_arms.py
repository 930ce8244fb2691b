"""The arms of the experiment on Self-MoE's quality."""

from __future__ import annotations

# Arm -> its name in tables. Mixtures over trained experts, whose router is trained:
ROUTED = {
    "top1": "MiXSE, top 1",
    "top2": "MiXSE, top 2",
    "all": "MiXSE, all experts",
    "last": "MiXSE, top 1, router reads the base's last hidden state",
}
# made of the same experts without training:
MADE = {
    "uniform": "uniform weights",
    "random": "random routing",
    "ties": "TIES",
    "dare": "DARE",
}
# and trained from the base for as many steps as experts and router together:
TRAINED = {
    "instance": "instance merging (one LoRA, all skills)",
    "joint": "experts and router trained jointly, top 1",
}
ARMS = {**ROUTED, **MADE, **TRAINED}
DEFAULT = "top1"

# Sections of `moe-dist self-moe compose`; top_k None is all experts.
COMPOSED: dict[str, dict] = {
    "top1": {"method": "mixse", "top_k": 1},
    "top2": {"method": "mixse", "top_k": 2},
    "all": {"method": "mixse", "top_k": None},
    "last": {"method": "mixse", "top_k": 1, "router_input": "base_last_hidden"},
    "uniform": {"method": "uniform"},
    "random": {"method": "random", "top_k": 1},
    "joint": {"method": "joint", "top_k": 1},
}
# Densities and weights that a merge may have; the best on windows that no table shows is taken, seed by seed. The first
# of each are what its paper says (a weight of None: 1 for ties, 1/n for dare).
MERGED = {
    "ties": ((0.2, 0.5, 1.0), (1.0, 0.5, 2.0)),
    "dare": ((0.1, 0.5, 0.9), (0.25, 0.5, 1.0)),
}
