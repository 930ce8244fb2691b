"""Nexus models: a dense model of transformers whose MLPs are replaced by a shared expert plus routed experts.

`load_model` knows them; transformers' own Auto classes do once `modeling_nexus` is imported. The three files
`configuration_nexus`, `router_nexus` and `modeling_nexus` need torch, transformers and each other only, and have the
names that transformers gives such files: `nexus export --form own` puts them beside the weights.
"""
