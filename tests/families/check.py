"""One family through the whole way: load, outputs and gradients at EP = 2 against transformers, export to the bit; and
outputs and gradients with its blocks cut over the tensor axis, where its plan allows that."""

from __future__ import annotations

import importlib
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from moe_dist.errors import UserError
from moe_dist.models import export_model, load_model
from moe_dist.parallel.grid import Grid, build_grid
from moe_dist.train.family import family_of, replicas_of
from moe_dist.train.rows import model_inputs, rank_rows
from tests.families.tiny import VOCAB, tiny_model
from tests.models.compare import file_tensors, pairs, same_bits
from tests.pool import RankFailure

TOLERANCE = 2e-6
FLOOR = 1e-5  # a gradient below this share of the whole gradient's norm is compared on that scale: it is rounding
EXACT = 5e-7  # in float64; some norms and routers compute in float32 whatever the model's dtype
RANKS = 2
TIMEOUT = 600.0


@dataclass
class Result:
    """What came of one family. `stage` is where it failed, None where it passed. `tensor`: the worst distance over the
    tensor axis, None where that refuses the family, for the reason `refused`."""

    family: str
    experts: str
    model: str = ""
    output: float = 0.0
    gradient: float = 0.0
    double: float | None = None  # worst gradient in float64, where float32 could not tell
    tensor: float | None = None
    refused: str = ""
    seconds: float = 0.0
    stage: str | None = None
    reason: str = ""


def check(family: str, experts: str, folder: Path, run: Callable[..., list]) -> Result:
    """Run all stages; a failure is part of the result. `run(fn, *args, timeout=)`: its results on `RANKS` ranks."""
    result, started = Result(family, experts), time.monotonic()
    try:
        result.stage = "build"
        stock = tiny_model(family, experts)
        result.model = type(stock).__name__
        result.stage = "save"
        stock.save_pretrained(folder / "in")
        result.stage = "load"
        answers = run(compare, family, result.model, folder / "in", folder / "out", timeout=TIMEOUT)
        result.output, result.gradient = (max(answer[i] for answer in answers) for i in (0, 1))
        doubles = [answer[2] for answer in answers if answer[2] is not None]
        result.double = max(doubles, default=None)
        result.stage, result.reason = min((answer[3:] for answer in answers), key=lambda answer: answer[0] is None)
        if result.stage is None:
            result.stage = "export"
            same_bits(file_tensors(folder / "out"), file_tensors(folder / "in"))
            again = type(stock).from_pretrained(folder / "out")
            same_bits(again.state_dict(), type(stock).from_pretrained(folder / "in").state_dict())
            result.stage = "tensor"
            result.tensor, result.refused = over_tensor_axis(result, folder / "in", run)
            result.stage = None
    except RankFailure as failure:
        result.reason = str(failure).strip().splitlines()[-1]
    except Exception as error:
        result.reason = _line(error)
    result.seconds = time.monotonic() - started
    return result


def compare(family: str, model: str, folder: Path, out: Path) -> tuple[float, float, float | None, str | None, str]:
    """On each rank: (worst distance of outputs, of gradients, of float64 ones, stage of a failure or None, why)."""
    output = gradient = 0.0
    double = None
    stage = "load"
    try:
        grid = build_grid(expert=RANKS)
        code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        stock = getattr(code, model).from_pretrained(folder)
        ours = load_model(folder, grid)
        stage = "output"
        output, distances = distances_of(ours, stock, grid)
        assert output <= TOLERANCE, f"outputs differ by {output:.1e}"
        stage = "gradient"
        gradient = max(distances.values())
        if _on_any_rank(gradient > TOLERANCE):
            # Some dense gradients (decay rates of linear attention, scales of hyper-connections) are sums that all but
            # cancel: transformers' own float32 is as far from its float64 there. Double precision tells rounding from
            # a wrong gradient.
            stock = getattr(code, model).from_pretrained(folder, dtype=torch.float64)
            stock.set_experts_implementation("eager")  # the only one that knows float64
            _, exact = distances_of(load_model(folder, grid, dtype=torch.float64), stock, grid)
            worst = max(exact, key=exact.get)
            double = exact[worst]
            assert double <= EXACT, f"gradient of {worst} differs by {double:.1e} in float64"
        stage = "export"
        export_model(ours, out)
    except Exception as error:
        return output, gradient, double, stage, _line(error)
    return output, gradient, double, None, ""


def over_tensor_axis(result: Result, folder: Path, run: Callable[..., list]) -> tuple[float | None, str]:
    """The worst distance of logits and gradients, and why the axis refuses the family (then there is none).

    Attention adds up in another order here, and its softmax is float32 in double precision, too. So where float32 could
    not tell gradients over the expert axis, logits alone are judged.
    """
    for dtype, tolerance in ((torch.float32, TOLERANCE), (torch.float64, EXACT)):
        answers = run(cut_by_heads, result.family, result.model, folder, dtype, timeout=TIMEOUT)
        if refused := answers[0][2]:
            return None, refused
        worst = max(output if result.double is not None else max(output, gradient) for output, gradient, _ in answers)
        if worst <= tolerance:
            return worst, ""
    raise AssertionError(f"over the tensor axis by {worst:.1e} in float64")


def cut_by_heads(family: str, model: str, folder: Path, dtype: torch.dtype) -> tuple[float, float, str]:
    """On each rank: the distance of its logits, the worst of its gradients, and why the axis refuses the family."""
    grid = build_grid(tensor=RANKS)
    try:
        ours = load_model(folder, grid, dtype=dtype)
    except UserError as error:
        return 0.0, 0.0, str(error)
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    stock = getattr(code, model).from_pretrained(folder, dtype=dtype)
    stock.set_experts_implementation("eager")
    if hasattr(stock, "codec_embedding"):
        return 0.0, 0.0, "a talker takes embeddings only"
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    batch["position_ids"] = torch.arange(12).expand(2, -1)
    mine = ours(**model_inputs(rank_rows(batch, grid), ours.config, dtype=dtype)).logits
    theirs = _forward(stock, ids)
    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    (mine * weight.chunk(RANKS, dim=-1)[grid.rank]).sum().backward()
    (theirs * weight).sum().backward()
    for parameter in ours.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        group = replicas_of(family_of(parameter), grid).group
        if group is not None:
            dist.all_reduce(parameter.grad, group=group)
    floor = _floor(stock)
    gradient = max(_distance(a, b, floor) for _, a, b in pairs(ours, stock, grad=True))
    return _distance(mine, theirs.chunk(RANKS, dim=-1)[grid.rank], 0.0), gradient, ""


def distances_of(ours: torch.nn.Module, stock: torch.nn.Module, grid: Grid) -> tuple[float, dict[str, float]]:
    """Distance of this rank's output, and of every gradient of this rank, from the stock model on all rows."""
    ids = torch.randint(3, VOCAB, (RANKS, 12), generator=torch.Generator().manual_seed(1))
    mine = _forward(ours, ids[grid.rank : grid.rank + 1])
    # Row by row like the ranks, so that what is compared is not the rounding of products of another shape.
    theirs = [_forward(stock, row[None]) for row in ids]
    weight = torch.randn(RANKS, *mine.shape, generator=torch.Generator().manual_seed(2))
    (mine * weight[grid.rank]).sum().backward()
    for row, expected in enumerate(theirs):
        (expected * weight[row]).sum().backward()
    for parameter in ours.parameters():
        if not hasattr(parameter, "is_expert"):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
    floor = _floor(stock)
    gradients = {name: _distance(a, b, floor) for name, a, b in pairs(ours, stock, grad=True)}
    return _distance(mine, theirs[grid.rank], 0.0), gradients


def _floor(stock: torch.nn.Module) -> float:
    grads = [parameter.grad for parameter in stock.parameters() if parameter.grad is not None]
    return FLOOR * torch.stack([grad.double().norm() for grad in grads]).norm().item()


def _on_any_rank(flag: bool) -> bool:
    found = torch.tensor(int(flag))
    dist.all_reduce(found)
    return bool(found)


def _forward(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    codec = getattr(model, "codec_embedding", None)  # a talker takes embeddings only
    tokens = {"input_ids": ids} if codec is None else {"inputs_embeds": codec(ids)}
    out = model(**tokens, use_cache=False)
    return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state


def _distance(ours: torch.Tensor, theirs: torch.Tensor, floor: float) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    scale = max(theirs.norm().item(), floor)
    return (ours - theirs).norm().item() / (scale or 1.0)


def _line(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text[:200]} ({Path(where.filename).name}:{where.lineno})"


def as_json(results: list[Result]) -> str:
    return json.dumps([vars(result) for result in results], indent=1)
