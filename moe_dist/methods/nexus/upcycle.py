"""Upcycling: dense models become one, tensor by tensor, straight from their files into the new ones.

    method            routed experts      shared  other tensors            router        weights of a token's experts
    nexus             the experts         seed    mean of the experts      from domains  raw probability, top 1
    linear            the experts         seed    mean of the experts      random        raw probability, top 1
    btx               seed, the experts   none    mean of all of them      random        divided by their sum, top 2
    sparse_upcycling  copies of the seed  none    the seed's               random        divided by their sum, top 2
    dense_merging     -                   -       mean of all, MLPs too    -             -

nexus and linear: arXiv 2408.15901, section 3; btx: arXiv 2403.07816; sparse_upcycling: arXiv 2212.05055. Means are
taken in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from moe_dist.errors import UserError
from moe_dist.methods.nexus.config import NexusConfig, seed_of
from moe_dist.methods.nexus.domain_file import Domains, read_domains
from moe_dist.methods.nexus.folders import ModelFolder, check_alike, mlp_part, open_dense
from moe_dist.methods.nexus.parts import Part, filled, mean_of, random, write_model
from moe_dist.methods.nexus.receipt import Receipt, measure
from moe_dist.models.nexus.configuration_nexus import CONFIGS
from moe_dist.models.nexus.router_nexus import KINDS, TEMPERATURE
from moe_dist.models.shards import SHARD_BYTES, Entry

SILU_SQUARE = 0.3558  # mean of silu(z)² over standard normal z


@dataclass(frozen=True)
class Plan:
    """What an upcycling will write, and from what. domains: for the routers that need them."""

    method: str
    config: PreTrainedConfig
    seed: ModelFolder
    experts: tuple[ModelFolder, ...]
    parts: tuple[Part, ...]
    domains: Domains | None


def upcycle(config: NexusConfig, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Receipt:
    """Write the model that `config` describes to the folder `out`, new or empty. One process.

    Reads headers first: models that do not fit together, or domains that do not fit the models, raise UserError before
    anything is written. The folder appears whole or not at all; the receipt is in it as nexus_receipt.json.
    """
    plan = make_plan(config)
    looks = partial(measure, plan)
    return write_model(out, plan.parts, plan.config, plan.seed.folder, measure=looks, shard_bytes=shard_bytes)


def make_plan(config: NexusConfig) -> Plan:
    """Open and check all models, and lay out every tensor. Reads headers and domains, no weights."""
    nexus = config.nexus
    seed = open_dense("seed", seed_of(config))
    experts = tuple(open_dense(f"expert {name}", folder) for name, folder in nexus.experts.items())
    if nexus.method == "sparse_upcycling" and experts:
        raise UserError("nexus.method=sparse_upcycling copies the seed model alone; remove nexus.experts")
    if nexus.method != "sparse_upcycling" and not experts:
        raise UserError("nexus.experts is empty: name the dense models that become experts, as {domain: folder}")
    check_alike([seed, *experts])
    averaged = {"nexus": experts, "linear": experts, "sparse_upcycling": (seed,)}.get(nexus.method, (seed, *experts))
    if nexus.method == "dense_merging":
        parts = [mean_of(key, key, averaged) for key in seed.tensors]
        return Plan(nexus.method, seed.config, seed, experts, tuple(parts), None)
    routed = {"btx": (seed, *experts), "sparse_upcycling": (seed,) * nexus.num_experts}.get(nexus.method, experts)
    domains = _domains(config, seed) if nexus.method == "nexus" else None
    made = _config(config, seed, routed, domains)
    parts = []
    for key in seed.tensors:
        mlp = mlp_part(key)
        if mlp is None:
            parts.append(mean_of(key, key, averaged))
            continue
        path, name = mlp
        parts += [mean_of(f"{path}.experts.{e}.{name}.weight", key, (model,)) for e, model in enumerate(routed)]
        if made.use_shared_expert:
            parts.append(mean_of(f"{path}.shared_expert.{name}.weight", key, (seed,)))
        if name == "gate_proj":
            parts += _router_parts(f"{path}.gate", made, seed, domains, nexus.init_seed)
    return Plan(nexus.method, made, seed, experts, tuple(parts), domains)


def _config(config: NexusConfig, seed: ModelFolder, routed: tuple, domains: Domains | None) -> PreTrainedConfig:
    nexus = config.nexus
    shared = nexus.method in ("nexus", "linear")
    values = {key: value for key, value in seed.config.to_dict().items() if key not in ("model_type", "architectures")}
    values |= {
        "num_experts": len(routed),
        "num_experts_per_tok": nexus.top_k or (1 if shared else 2),
        "norm_topk_prob": not shared,
        "use_shared_expert": shared,
        "router": "linear" if domains is None else nexus.router,
        "domain_dim": None if domains is None or nexus.router == "prototype" else domains.dim,
        "domain_space": None if domains is None else domains.space,
        "expert_names": [model.name.removeprefix("expert ") for model in routed] if nexus.experts else [],
    }
    try:
        return CONFIGS[seed.config.model_type](**values)
    except Exception as error:  # the strict dataclasses of the hub wrap whatever a validator raises
        raise UserError(f"nexus: {str(error).splitlines()[-1].strip()}") from None


def _domains(config: NexusConfig, seed: ModelFolder) -> Domains:
    """The domains of the experts, in their order, from a file that fits the seed model and the router."""
    nexus = config.nexus
    if nexus.domains is None:
        raise UserError("nexus.domains is not set: `moe-dist nexus embed CONFIG.yaml --out FILE` makes the file")
    found = read_domains(nexus.domains)
    missing = [name for name in nexus.experts if name not in found.names]
    if missing:
        raise UserError(
            f"nexus.domains={nexus.domains} has no domain {', '.join(missing)} for the expert of that name; "
            f"it has {', '.join(found.names)}"
        )
    if found.embedder.startswith("seed:") and found.embedder != f"seed:{seed.identity['fingerprint']}":
        raise UserError(
            f"nexus.domains={nexus.domains} was embedded by another seed model than nexus.seed={nexus.seed}"
        )
    rows = [found.names.index(name) for name in nexus.experts]
    if nexus.router == "prototype":
        if found.prototypes_LNH is None:
            raise UserError(
                f"nexus.domains={nexus.domains} holds given vectors without statistics of the seed model, which the "
                "prototype router needs; take nexus.router=paper, or embed with another embedder"
            )
        layers, hidden = seed.config.num_hidden_layers, seed.config.hidden_size
        found.check_prototypes_fit(layers=layers, hidden=hidden, where=f"nexus.domains={nexus.domains}")
    return Domains(
        tuple(nexus.experts),
        {name: found.documents[name] for name in nexus.experts},
        found.embedder,
        found.embeddings_NM[rows],
        found.centre_M,
        None if found.prototypes_LNH is None else found.prototypes_LNH[:, rows],
        found.inputs,
    )


def _router_parts(
    path: str, config: PreTrainedConfig, seed: ModelFolder, domains: Domains | None, init_seed: int
) -> Iterator[Part]:
    layer = int(path.split(".")[2])
    with torch.device("meta"):
        router = KINDS[config.router](config)
    dtype = seed.files.main_dtype()
    for name, tensor in router.named_parameters():
        entry = Entry(tuple(tensor.shape), dtype)
        if name == "temperature":
            yield Part(f"{path}.{name}", entry, f"start value {TEMPERATURE:g}", make=filled(entry, TEMPERATURE))
        else:
            std = _start(name, config)
            key = f"{path}.{name}"
            yield Part(key, entry, f"random, std {std:.3g}, seed {init_seed}", make=random(key, entry, std, init_seed))
    for name, tensor in router.named_buffers():
        value = _statistics(name, layer, config, domains)
        yield Part(f"{path}.{name}", Entry(tuple(tensor.shape), torch.float32), f"domain file: {name}", make=value)


def _start(name: str, config: PreTrainedConfig) -> float:
    """Standard deviation of a router's random weight.

    The paper does not say how P_r starts. With all its weights at `initializer_range` its rows would be nearly zero,
    and a router of nearly equal logits learns late; here they begin as long as a linear router's. A domain's embedding
    has length one, so with W1 at 1 both halves of W1 d are standard normal, an entry of SwiGLU has the mean square
    `SILU_SQUARE`, and one of W2 · SwiGLU the variance std(W2)² · H · `SILU_SQUARE`. In a prototype router P_r is added
    to rows that have their length, and begins near zero.
    """
    if config.router != "paper":
        return config.initializer_range
    return 1.0 if name == "w1" else config.initializer_range / (config.hidden_size * SILU_SQUARE) ** 0.5


def _statistics(name: str, layer: int, config: PreTrainedConfig, domains: Domains) -> Callable[[], torch.Tensor]:
    if name == "domain_embeddings" and config.router == "prototype":
        return lambda: domains.prototypes_LNH[layer]
    if name == "domain_embeddings":
        return lambda: domains.directions_NM
    if name == "input_mean":
        return lambda: domains.inputs.mean_LH[layer]
    assert name == "input_length", name
    return lambda: domains.inputs.length_L[layer : layer + 1]
