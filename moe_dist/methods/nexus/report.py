"""Tables that the Nexus verbs print."""

from __future__ import annotations

from torch.nn import functional as F

from moe_dist.methods.nexus.domain_file import Domains


def render_domains(domains: Domains) -> str:
    """The domains with their documents, and the cosine of every pair of embeddings."""
    unit_NM = F.normalize(domains.embeddings_NM, dim=1)
    cosine_NN = unit_NM @ unit_NM.T
    width = max(len(name) for name in domains.names)
    lines = [f"embedder {domains.embedder}, {domains.dim} dimensions"]
    lines += [
        f"{name:<{width}}  {domains.documents[name]:>6,} documents  cosines "
        + " ".join(f"{value:+.2f}" for value in cosine_N.tolist())
        for name, cosine_N in zip(domains.names, cosine_NN, strict=True)
    ]
    return "\n".join(lines)
