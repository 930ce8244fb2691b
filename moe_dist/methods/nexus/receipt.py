"""The receipt of an upcycling: which tensor came from where, and what was measured to equal what.

Measured on the files as written, tensor by tensor and layer by layer, with weights mapped and not loaded. A measurement
beyond its bound is a fault of this program, and stops it before the folder appears.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from moe_dist.methods.nexus.folders import ModelFolder
from moe_dist.models.folder import WeightFiles, open_weights
from moe_dist.models.nexus.router_nexus import KINDS, NexusRouter

if TYPE_CHECKING:
    from moe_dist.methods.nexus.extend import Change
    from moe_dist.methods.nexus.parts import Part
    from moe_dist.methods.nexus.upcycle import Plan

TOKENS = 16
SAMPLED = 4096  # elements of each mean and blend, spread over it, that are computed again in float64
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}


@dataclass(frozen=True)
class Check:
    """`what` was measured to differ by at most `error` (relative, worst over all layers; where equality to the bit is
    asked for, the number of tensors that differ); it may by `bound`."""

    what: str
    error: float
    bound: float


@dataclass(frozen=True)
class Receipt:
    """models: name, folder and fingerprint of each. tensors: name -> where it came from. space: of the domains."""

    method: str
    models: list[dict]
    tensors: dict[str, str]
    checks: list[Check]
    space: dict | None

    def to_dict(self) -> dict:
        return asdict(self)

    def render(self) -> str:
        """For people: tensors that differ in their layer alone share a line."""
        lines = [f"{self.method}: {len(self.tensors):,} tensors of {len(self.models)} models"]
        lines += [f"  {model['name']:<16} {model['folder']}  {model['fingerprint']}" for model in self.models]
        grouped: dict[tuple[str, str], int] = {}
        for key, said in self.tensors.items():
            place = tuple(re.sub(r"\.layers\.\d+\.", ".layers.{l}.", text) for text in (key, said))
            grouped[place] = grouped.get(place, 0) + 1
        width = max(len(key) for key, _ in grouped)
        lines += [f"  {key:<{width}}  {count:>3} x  {said}" for (key, said), count in grouped.items()]
        lines += [f"  measured: {check.what}: {check.error:.1e} (at most {check.bound:.0e})" for check in self.checks]
        return "\n".join(lines)


def measure(plan: Plan, folder: Path) -> Receipt:
    """Measure the weights in `folder`, which `plan` wrote. Raises RuntimeError where one is not what it must be."""
    with open_weights(folder) as files:
        checks = [*_same_checks(plan.parts, files), *_mean_checks(plan, files)]
        if plan.method != "dense_merging":
            checks += _block_checks(plan, files)
    _hold(checks)
    return Receipt(
        plan.method,
        [model.identity for model in (plan.seed, *plan.experts)],
        {part.key: part.said for part in plan.parts},
        checks,
        None if plan.domains is None else plan.domains.space,
    )


def measure_change(change: Change, folder: Path) -> Receipt:
    """The same for a model that got an expert, or lost one."""
    with open_weights(folder) as files:
        checks = [*_same_checks(change.parts, files), *_change_checks(change, files)]
    _hold(checks)
    return Receipt(
        change.what,
        [model.identity for model in (change.model, *change.others)],
        {part.key: part.said for part in change.parts},
        checks,
        change.config.domain_space,
    )


def measure_stock(model: ModelFolder, parts: Sequence[Part], config: PreTrainedConfig, folder: Path) -> Receipt:
    """The same for a Nexus model that was written as a stock one: each block on random tokens, in both forms."""
    dtype = model.files.main_dtype()
    x_TH = torch.randn(TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    mlp = _Mlp(config.hidden_act, x_TH)
    rows, blocks = 0.0, 0.0
    with open_weights(folder) as files, torch.no_grad():
        for layer in range(config.num_hidden_layers):
            path = f"model.layers.{layer}.mlp"
            router = router_of(model.files, f"{path}.gate", model.config)
            rows = max(rows, _distance(files.read(f"{path}.gate.weight"), router.rows()))
            _, weights_TK, ids_TK = router(x_TH)
            ours = mlp.mixture(lambda e, path=path: (model.read, f"{path}.experts.{e}"), weights_TK, ids_TK)
            stock = mlp.mixture(lambda e, path=path: (files.read, f"{path}.experts.{e}"), weights_TK, ids_TK)
            if model.config.use_shared_expert:
                ours += mlp(model.read, f"{path}.shared_expert")
            gate_T1 = F.linear(x_TH, files.read(f"{path}.shared_expert_gate.weight")).sigmoid()
            stock += gate_T1 * mlp(files.read, f"{path}.shared_expert")
            blocks = max(blocks, _distance(stock, ours))
        same = list(_same_checks(parts, files))
    checks = [
        *same,
        Check("the plain router's weight is the folded rows", rows, BOUNDS[dtype]),
        Check("each block computes what it did, for the same routing", blocks, BOUNDS[dtype]),
    ]
    _hold(checks)
    said = {part.key: part.said for part in parts}
    return Receipt("export as qwen2_moe", [model.identity], said, checks, model.config.domain_space)


def measure_copy(model: ModelFolder, parts: Sequence[Part], what: str, folder: Path) -> Receipt:
    """The same for a Nexus model whose tensors stay as they are."""
    with open_weights(folder) as files:
        checks = list(_same_checks(parts, files))
    _hold(checks)
    said = {part.key: part.said for part in parts}
    return Receipt(what, [model.identity], said, checks, model.config.domain_space)


def _hold(checks: list[Check]) -> None:
    for check in checks:
        if not check.error <= check.bound:
            raise RuntimeError(f"what was written is wrong: {check.what}: differs by {check.error:.2e}")


def _same_checks(parts: Sequence[Part], files: WeightFiles) -> Iterator[Check]:
    """Whatever was copied, or made of nothing but a rule, is in the files to the bit: every byte of it is compared."""
    for said, some, expected in (
        (
            "tensors that are copies are their source to the bit",
            [part for part in parts if part.make is None and len(part.sources) == 1],
            lambda part: part.sources[0][0].read(part.sources[0][1]),
        ),
        (
            "tensors that are no copies or means are as they were made, to the bit",
            [part for part in parts if part.make is not None],
            lambda part: part.make(),
        ),
    ):
        if some:
            differing = sum(not _same_bits(files.read(part.key), expected(part)) for part in some)
            yield Check(f"{len(some)} {said}", float(differing), 0.0)


def _same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    # As bytes: a NaN equals itself, and zero is not minus zero.
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (found, expected)))


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Some elements, spread evenly over the tensor, in float64."""
    return tensor.reshape(-1)[:: max(1, tensor.numel() // SAMPLED)].double()


def _change_checks(change: Change, files: WeightFiles) -> Iterator[Check]:
    old, config = change.model, change.config
    dtype = old.files.main_dtype()
    x_TH = torch.randn(TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    mlp = _Mlp(config.hidden_act, x_TH)
    rows, experts, added = 0.0, 0.0, 0.0
    # A row that is stretched to the mean length of the others follows them.
    fixed = {new: number for new, number in change.kept.items() if number not in old.config.renormalised}
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}.mlp"
        with torch.no_grad():
            before = router_of(old.files, f"{path}.gate", old.config).rows()
            after = router_of(files, f"{path}.gate", config).rows()
        rows = max(rows, _distance(after[list(fixed)], before[list(fixed.values())]))
        for new, number in change.kept.items():
            written, expected = mlp(files.read, f"{path}.experts.{new}"), mlp(old.read, f"{path}.experts.{number}")
            experts = max(experts, _distance(written, expected))
        for model in change.others:
            written = mlp(files.read, f"{path}.experts.{config.num_experts - 1}")
            added = max(added, _distance(written, mlp(model.read, path)))
    if not change.new_rows:
        yield Check("the router's rows of the experts that stay are as they were", rows, BOUNDS[torch.float32])
    yield Check("the experts that stay compute what they did", experts, BOUNDS[dtype])
    if change.others:
        (new,) = change.others
        yield Check(f"the new expert is the MLP of {new.name}", added, BOUNDS[dtype])
        worst = 0.0
        for key in change.merged:
            found, ours, theirs = (_sample(read(key)) for read in (files.read, old.read, new.read))
            worst = max(worst, _distance(found, (1 - change.share) * ours + change.share * theirs))
        yield Check(f"{len(change.merged)} tensors took {change.share:.4g} of {new.name}", worst, BOUNDS[dtype])


def _mean_checks(plan: Plan, files: WeightFiles) -> Iterator[Check]:
    means = [part for part in plan.parts if len(part.sources) > 1]
    worst, bound = 0.0, 0.0
    for part in means:
        found = _sample(files.read(part.key))
        sources = [_sample(model.read(key)) for model, key in part.sources]
        worst = max(worst, _distance(found, torch.stack(sources).mean(0)))
        bound = max(bound, BOUNDS[part.entry.dtype])
    if means:
        yield Check(f"{len(means)} means are the mean in float64", worst, bound)


def _block_checks(plan: Plan, files: WeightFiles) -> list[Check]:
    """Each block's output on random tokens, from the files as written and from the dense models by its formula."""
    config, seed = plan.config, plan.seed
    dtype = seed.files.main_dtype()
    generator = torch.Generator().manual_seed(0)
    routed = {"btx": (seed, *plan.experts), "sparse_upcycling": (seed,) * config.num_experts}.get(
        plan.method, plan.experts
    )
    errors = {"block": 0.0, "promise": 0.0}
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}.mlp"
        x_TH = torch.randn(TOKENS, config.hidden_size, generator=generator).to(dtype)
        router = router_of(files, f"{path}.gate", config)
        with torch.no_grad():
            _, weights_TK, ids_TK = router(x_TH)
        mlp = _Mlp(config.hidden_act, x_TH)
        written = mlp.mixture(lambda expert, path=path: (files.read, f"{path}.experts.{expert}"), weights_TK, ids_TK)
        expected = mlp.mixture(lambda expert, path=path: (routed[expert].read, path), weights_TK, ids_TK)
        dense_TH = mlp(seed.read, path).to(written.dtype)
        if config.use_shared_expert:
            shared_TH = mlp(files.read, f"{path}.shared_expert").to(written.dtype)
            errors["promise"] = max(errors["promise"], _distance(shared_TH, dense_TH))
            written, expected = written + shared_TH, expected + dense_TH
        elif plan.method == "sparse_upcycling":
            errors["promise"] = max(errors["promise"], _distance(written, dense_TH))
        else:
            errors["promise"] = max(errors["promise"], _distance(weights_TK.sum(1), torch.ones(TOKENS)))
        errors["block"] = max(errors["block"], _distance(written, expected))
    formula = "MLP_seed(x) + sum of gate * MLP_expert(x)" if config.use_shared_expert else "sum of weight * MLP(x)"
    promise = {
        "btx": "the weights of a token's experts sum to 1, so that equal experts would be the dense model",
        "sparse_upcycling": "each block is the seed's MLP",
    }.get(plan.method, "without routed output each block is the seed's MLP")
    return [
        Check(f"each block is {formula} of the dense models", errors["block"], BOUNDS[dtype]),
        Check(promise, errors["promise"], BOUNDS[dtype]),
    ]


class _Mlp:
    """The family's MLP over weights that stay in their files."""

    def __init__(self, act: str, x_TH: torch.Tensor):
        self.act, self.x_TH = ACT2FN[act], x_TH

    def __call__(self, read: Callable[[str], torch.Tensor], path: str, rows: torch.Tensor | slice = slice(None)):
        x_TH = self.x_TH[rows]
        gate, up, down = (read(f"{path}.{name}_proj.weight") for name in ("gate", "up", "down"))
        return F.linear(self.act(F.linear(x_TH, gate)) * F.linear(x_TH, up), down)

    def mixture(self, expert_at: Callable, weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        """Σ_k weight_k · MLP_{id_k}(x), in the weights' dtype; `expert_at(e)` gives (reader, path) of expert e."""
        y_TH = torch.zeros_like(self.x_TH, dtype=weights_TK.dtype)
        for expert in ids_TK.unique().tolist():
            rows, slots = torch.where(ids_TK == expert)
            y_TH.index_add_(0, rows, weights_TK[rows, slots, None] * self(*expert_at(expert), rows))
        return y_TH


def router_of(files: WeightFiles, path: str, config: PreTrainedConfig) -> NexusRouter:
    """The router at `path`, over weights that stay in their files."""
    with torch.device("meta"):
        router = KINDS[config.router](config)
    router.load_state_dict({name: files.read(f"{path}.{name}") for name in router.state_dict()}, assign=True)
    return router.eval()


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖a−b‖/‖b‖ in float64; the plain norm where b is zero."""
    found, expected = found.double(), expected.double()
    return (found - expected).norm().item() / (expected.norm().item() or 1.0)
