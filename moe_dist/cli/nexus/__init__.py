"""Nexus: make one mixture of experts of dense models that were trained on different domains.

examples:
  moe-dist nexus branch branch.yaml
  moe-dist nexus embed nexus.yaml --out domains.safetensors
  moe-dist nexus upcycle nexus.yaml upcycled nexus.domains=domains.safetensors
  moe-dist nexus extend new.yaml extended nexus.model=upcycled nexus.domains=new.safetensors
"""

VERBS = {
    "branch": "train the dense experts from the seed, one a domain",
    "embed": "embed the domains, by which the router will know the experts",
    "upcycle": "make one model of the seed and the experts",
    "extend": "add an expert to such a model",
    "remove": "take an expert out",
    "export": "write such a model for plain transformers and serving engines",
}
