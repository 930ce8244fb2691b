"""ESFT: train only the experts that a task uses. Score the experts, select them, train them, share them."""

from moe_dist.methods.esft.select import least_used_experts, random_experts, select_experts

__all__ = ["least_used_experts", "random_experts", "select_experts"]
