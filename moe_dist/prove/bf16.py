"""What float32 cannot show of a run in bf16: that its engine, another one, reduces right, and that what has to stay in
float32 does.

Rounding to bf16 moves single tensors by percents, and a token that is near the edge goes to another expert. So whole
families of gradients are compared. A gradient that is doubled, averaged or not summed over ranks is at least half of
itself away; what is allowed is half of that, or more where plain transformers in bf16 is itself that far away.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from safetensors import safe_open

from moe_dist.models.nexus.configuration_nexus import MODEL_TYPES
from moe_dist.models.surgery import moe_layers
from moe_dist.prove import plain
from moe_dist.prove.certificate import EASE, Check
from moe_dist.prove.compare import BITS
from moe_dist.prove.errors import Tallies, worst_of_ranks
from moe_dist.prove.nexus import rows
from moe_dist.prove.plain import Plain, label
from moe_dist.prove.problem import Problem
from moe_dist.train.state import stored_buffers
from moe_dist.train.trainable import Selection

FAMILIES = ("dense", "expert")
LOGITS = 1e-5  # of a router's logits in float32, from the very same inputs
FAR = 0.25  # a relative error of gradients that rounding and a few tokens at other experts do not make


def family(key: str) -> str:
    """Of a tensor by its label."""
    return FAMILIES[key.endswith("]")]


def in_bf16(problem: Problem) -> Problem:
    """The same problem as a run that computes in bf16."""
    config = deepcopy(problem.config)
    config.model.dtype, config.train.precision = "bfloat16", "bf16"
    return replace(problem, config=config)


def distance(problem: Problem, selection: Selection, device: torch.device) -> dict[str, float]:
    """How far gradients of plain transformers in bf16 are from those in float32, relatively, by family. One process;
    `Plain.run` has left the latter in the problem's folder."""
    tallies = Tallies()
    gradients, _ = Plain(problem, selection, device, torch.bfloat16).first_gradients()
    with safe_open(problem.work / plain.GRADIENTS, framework="pt") as reference:
        for key, gradient in gradients.items():
            tallies.add(family(key), gradient, reference.get_tensor(key))
    return {name: tally.error for name, tally in tallies.found.items()}


def judge_bf16(trial, expected: dict) -> Iterator[Check]:
    """Checks of one step in bf16. Collective. trial: of `in_bf16(problem)`; expected: the plain process' figures."""
    engine, problem, grid = trial.engine, trial.problem, trial.grid
    model = engine.module
    routers = [layer.origin.router[0] for _, layer in moe_layers(model) if layer.origin.router is not None]
    yield Check.of("bf16 statistics", _statistics(trial, routers, expected["buffers_at_start"]), BITS)
    heard: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [model.get_submodule(path).register_forward_hook(partial(_hear, heard, path)) for path in routers]
    trial.passes(0)
    for hook in hooks:
        hook.remove()
    if model.config.model_type in MODEL_TYPES:
        yield Check.of("bf16 router", _router_errors(trial, heard), LOGITS)
    tallies = Tallies()
    with safe_open(problem.work / plain.GRADIENTS, framework="pt") as reference:
        for fragment in engine.gradients():
            key = label((fragment.name, fragment.expert))
            tallies.add(family(key), fragment.tensor, fragment.range.of(reference.get_tensor(key)))
    for name, tally in tallies.over_ranks(grid).items():
        allowed = max(FAR, EASE * expected["bf16"][name])
        yield Check.of(f"bf16 gradients, {name}", {"all of them together": tally.error}, allowed)


def _hear(heard: dict, path: str, router, inputs: tuple, output: tuple) -> None:
    heard.setdefault(path, (inputs[0].detach(), output[0].detach()))


def _statistics(trial, routers: list[str], at_start: dict[str, list]) -> dict[str, float]:
    """Buffers of routers, which are in float32 whatever the model is: 0 where they are what the folder holds."""
    errors = {}
    for name, buffer in stored_buffers(trial.engine.module):
        if name.rpartition(".")[0] in routers:
            exact = torch.tensor(at_start[name], dtype=torch.float32)
            same = buffer.dtype == torch.float32 and torch.equal(buffer.cpu(), exact)
            errors[trial.problem.original(name)] = 0.0 if same else 1.0
    return worst_of_ranks(errors, trial.grid)


def _router_errors(trial, heard: dict) -> dict[str, float]:
    """Logits of each router against those that its formula gives in float32 from the same inputs and weights."""
    errors, model = {}, trial.engine.module
    for path, (x, logits_TE) in heard.items():
        router = model.get_submodule(path)
        with trial.engine.gathered(list(router.parameters())), torch.no_grad():
            exact_TE = x.flatten(0, -2).float() @ rows(router, model.config).T
        error = ((logits_TE.float() - exact_TE).norm() / exact_TE.norm()).item()
        errors[trial.problem.original(path)] = error
    return worst_of_ranks(errors, trial.grid)
