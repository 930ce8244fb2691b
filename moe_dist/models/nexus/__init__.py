"""Nexus models: a dense model of transformers whose MLPs are replaced by a shared expert plus routed experts.

`import moe_dist.models` is enough for `load_model` and for transformers' own Auto classes to know them. The three files
`configuration_nexus`, `router_nexus` and `modeling_nexus` need torch, transformers and each other only, and carry the
names that transformers gives such files.
"""
