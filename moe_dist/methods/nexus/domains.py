"""Domain embeddings: the mean of a domain's documents in an embedder's space, centred over the domains.

With a seed model that is run over the same documents the file also gets the prototypes: for every layer the centred
mean of what its MLP is fed. An embedder other than the seed model is mapped there by a ridge fit over the documents,
so that a new domain needs the embedder alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from moe_dist.data.loader import train_sources
from moe_dist.data.records import RecordLog
from moe_dist.errors import UserError
from moe_dist.methods.nexus.config import SEED, NexusConfig, seed_of
from moe_dist.methods.nexus.domain_file import Domains, RouterInputs, read_domains
from moe_dist.methods.nexus.embedders import SeedEmbedder, SentenceEmbedder, read_vectors

RIDGE = 0.1  # relative strength of the ridge: see `ridge`


@dataclass
class _Documents:
    """The vectors of one domain's documents: embedder's `[m]`, MLP inputs `[L,H]` and lengths `[L]`."""

    vectors: list[torch.Tensor]
    inputs: list[torch.Tensor]
    lengths: list[torch.Tensor]


def embed(config: NexusConfig, *, device: torch.device | str = "cpu") -> Domains:
    """Embed every source of data.train, one domain each. Deterministic.

    With nexus.same_space_as the centre and the statistics are that file's, so that the new domains stand beside its
    own. Raises UserError for whatever is wrong with the input, another embedder than that file's included.
    """
    base = None if config.nexus.same_space_as is None else read_domains(config.nexus.same_space_as)
    given = config.nexus.embedder.endswith(".safetensors")
    found = _from_vectors(config, base) if given else _from_documents(config, base, torch.device(device))
    if base is not None:
        base.check_same_space(found.space, where=f"nexus.embedder={config.nexus.embedder}")
    return found


def _from_vectors(config: NexusConfig, base: Domains | None) -> Domains:
    sources = config.data.train
    if not all(source.name for source in sources):
        raise UserError("data.train: with given vectors every domain needs its name")
    names = tuple(source.name for source in sources)
    _check_enough(names, base)
    embedder, vectors = read_vectors(config.nexus.embedder, names)
    by_name = dict(zip(names, vectors, strict=True))
    means_NM = torch.stack([vectors.mean(0) for vectors in by_name.values()])
    centre_M = _centre(means_NM, base)
    documents = {name: len(vectors) for name, vectors in by_name.items()}
    return Domains(names, documents, embedder, (means_NM - centre_M).float(), centre_M.float())


def _from_documents(config: NexusConfig, base: Domains | None, device: torch.device) -> Domains:
    by_name, embedder = _run(config, base, device)
    means_NM = torch.stack([torch.stack(domain.vectors).mean(0) for domain in by_name.values()])
    centre_M = _centre(means_NM, base)
    inputs = _measure(by_name, centre_M, fit=config.nexus.embedder != SEED) if base is None else base.inputs
    if inputs is None:
        raise UserError("nexus.same_space_as: that file has given vectors only; give vectors for the new domain too")
    if inputs.to_router_LHM is not None:
        prototypes_LNH = torch.einsum("lhm,nm->lnh", inputs.to_router_LHM.double(), means_NM - centre_M)
    else:
        means_LNH = torch.stack([torch.stack(domain.inputs).mean(0) for domain in by_name.values()], dim=1)
        prototypes_LNH = means_LNH - inputs.mean_LH.double()[:, None]
    return Domains(
        tuple(by_name),
        {name: len(domain.vectors) for name, domain in by_name.items()},
        embedder,
        (means_NM - centre_M).float(),
        centre_M.float(),
        prototypes_LNH.float(),
        inputs,
    )


def _run(config: NexusConfig, base: Domains | None, device: torch.device) -> tuple[dict[str, _Documents], str]:
    """The vectors of all documents, and the embedder's id. The seed model is run only where it is needed."""
    nexus = config.nexus
    sources = train_sources(config.data)
    _check_enough([source.name for source in sources], base)
    sentence = None if nexus.embedder == SEED else SentenceEmbedder(nexus.embedder, device=device)
    seed = None
    if sentence is None or base is None:
        seed = SeedEmbedder(seed_of(config), tokenizer=nexus.tokenizer, seq_len=config.data.seq_len, device=device)
    by_name = {}
    for source in sources:
        book = RecordLog(on_bad=config.data.on_bad_record)
        domain = _Documents([], [], [])
        for record in islice(source.records(book), nexus.documents):
            seen = (None, None, None) if seed is None else seed.run(record, book)
            if seen is None:
                continue
            domain.vectors.append(seen[0] if sentence is None else sentence.run(record))
            domain.inputs.append(seen[1])
            domain.lengths.append(seen[2])
        if not domain.vectors:
            raise UserError(f"data.train: the domain {source.name} has no document with a token")
        by_name[source.name] = domain
    return by_name, (sentence or seed).id


def _measure(by_name: dict[str, _Documents], centre_M: torch.Tensor, *, fit: bool) -> RouterInputs:
    """What the MLPs are fed over these domains; `fit`: also the map from the embedder's space to there.

    Every domain weighs the same in the means, however many documents it has.
    """
    mean_LH = torch.stack([torch.stack(domain.inputs).mean(0) for domain in by_name.values()]).mean(0)
    length_L = torch.stack([torch.stack(domain.lengths).mean(0) for domain in by_name.values()]).mean(0)
    to_router_LHM = None
    if fit:
        x_DM = torch.cat([torch.stack(domain.vectors) for domain in by_name.values()]) - centre_M
        y_DLH = torch.cat([torch.stack(domain.inputs) for domain in by_name.values()]) - mean_LH
        to_router_LHM = ridge(x_DM, y_DLH).float()
    return RouterInputs(mean_LH.float(), length_L.float(), to_router_LHM)


def ridge(x_DM: torch.Tensor, y_DLH: torch.Tensor) -> torch.Tensor:
    """W `[L,H,m]` that minimises Σ_d ‖y_d − W x_d‖² + λ‖W‖², λ = `RIDGE` · the sum of ‖x_d‖² over m."""
    strength = RIDGE * x_DM.square().sum() / x_DM.shape[1]
    gram_MM = x_DM.T @ x_DM + strength * torch.eye(x_DM.shape[1], dtype=x_DM.dtype)
    solved_MK = torch.linalg.solve(gram_MM, x_DM.T @ y_DLH.flatten(1))
    return solved_MK.T.reshape(*y_DLH.shape[1:], -1)


def _centre(means_NM: torch.Tensor, base: Domains | None) -> torch.Tensor:
    if base is None:
        return means_NM.mean(0)
    if base.dim != means_NM.shape[1]:
        raise UserError(
            f"nexus.same_space_as has embeddings of another embedder: {base.dim} dimensions, not {means_NM.shape[1]}"
        )
    return base.centre_M.double()


def _check_enough(names: Sequence[str], base: Domains | None) -> None:
    if not names or (len(names) < 2 and base is None):
        raise UserError(
            "data.train: name at least two domains, a source each; a single one has nothing that it differs from"
        )
