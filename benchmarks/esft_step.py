"""A step of ESFT against full fine-tuning, gradient masking and LoRA on the experts: time and bytes.

    python -m benchmarks.esft_step [--json FILE] [--full]

Experts alone: forward and backward of one layer's products (64 experts, H 1024, I 512, 8,192 balanced rows, 8 experts
train), against the same kernels with gradients of all 64 and a mask. In the lowest trainable layer nothing asks for the
gradient of the rows; masking as it is usually done computes it (all parameters require grad), and one more row compares
with masking that does not.

Whole model: DeepSeek-V2-Lite (64 experts, top 6, 2 shared) at a quarter of its widths and with every third of its 26
MoE layers, 361 M parameters; the published expert config of the intent task and the routing that the full model had
there; 4,096 tokens a step in sequences of 512. All arms have bf16 weights, frozen or not, and fp32 masters, gradients
and AdamW moments of what trains, in the engine without DeepSpeed; the last row tells ZeRO's alignment. Before anything
is timed, losses and the gradients of the selected experts are compared between the arms.

Peak activation bytes are what forward and backward allocate and give back; gradients stay and are counted beside them.
LoRA is what PEFT does with stacked experts: the changed weights are formed in each forward. LoRA beside the products
would need about as many floating-point operations as ESFT.

Goals are rows whose peer is the goal: a ratio of 1 or more meets it. The floor is the ratio of the matrix products'
floating-point operations, counted by torch. Needs ../shared/data/esft beside the checkout; without it only the experts
alone are measured.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import _esft_arms
from benchmarks._esft_arms import Arm, Task
from benchmarks._harness import Median, interleaved, row, run
from benchmarks._measure import allocated, flops
from benchmarks.esft_placement import DATA
from moe_dist.moe.dispatch import DispatchPlan, stay_here
from moe_dist.moe.hop import slots_of
from moe_dist.moe.mixture import How, mixture
from moe_dist.ops import native
from moe_dist.ops.grouped_mlp import swiglu

MB = 1e6
HIDDEN, WIDTH, EXPERTS, TRAINED, ROWS = 1024, 512, 64, 8, 8192
SCALE, EVERY, TOKENS, LENGTH = 4, 3, 4096, 512
STATE_BYTES = 12  # of an element: fp32 master, fp32 exp_avg, fp32 exp_avg_sq
# ‖a − b‖ / ‖b‖ of the same gradient in two arms: the products are the same ones, and so is their rounding.
TOLERANCE = 1e-6


def main() -> None:
    torch.set_num_threads(2)
    run("esft_step", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict]:
    yield from experts_alone(seconds=60.0 if full else 10.0)
    if (DATA / "intent_routing.npz").is_file():
        task = Task.published(DATA, scale=SCALE, every=EVERY, tokens=TOKENS, length=LENGTH)
        yield from whole_model(task, rounds=20 if full else 4)
        yield zero_alignment(task)
    else:
        print(f"no rows for the whole model: the routing of the intent task is not in {DATA}")


def experts_alone(
    *, hidden: int = HIDDEN, width: int = WIDTH, rows: int = ROWS, seconds: float, rounds: int = 40
) -> Iterator[dict]:
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        ours, masked = _expert_contenders(hidden, width, rows, dtype)
        _same(ours(True), {what: grad[:TRAINED] for what, grad in masked(True).items()})
        calls = [partial(call, below) for below in (True, False) for call in (ours, masked)]
        middle, middle_masked, lowest, lowest_masked = interleaved(calls, rounds=rounds, seconds=seconds)
        case = f"experts alone, {TRAINED} of {EXPERTS} train, {name}"
        yield row(case, middle, middle_masked, "gradient masking")
        yield row(f"{case}, share of its time", middle / middle_masked, 1 / 1.4, "goal: 1 / 1.4", unit="share")
        yield row(f"{case}, lowest layer", lowest, middle_masked, "gradient masking")
        goal = "goal: 1 / 2.5"
        yield row(f"{case}, lowest layer, share of its time", lowest / middle_masked, 1 / 2.5, goal, unit="share")
        yield row(f"{case}, lowest layer", lowest, lowest_masked, "gradient masking without the rows' gradient")


def _expert_contenders(hidden: int, width: int, rows: int, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """Two functions `(does anything below need a gradient) -> gradients of the weights`, the last with a mask."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up_proj": (EXPERTS, 2 * width, hidden), "down_proj": (EXPERTS, hidden, width)}
    weights = [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes.values()]
    weights = [weight.to(dtype) for weight in weights]
    x_RH, grad_RH = torch.randn(2, rows, hidden, generator=generator).to(dtype)
    whole = [weight.clone().requires_grad_() for weight in weights]
    trained = [weight[:TRAINED].clone().requires_grad_() for weight in weights]
    frozen = [weight[TRAINED:].clone() for weight in weights]
    mask = (torch.arange(EXPERTS) < TRAINED).to(dtype).view(-1, 1, 1)
    each = rows // EXPERTS

    seats_R1 = torch.arange(EXPERTS).repeat_interleave(each).unsqueeze(1)
    ones_R1 = torch.ones(seats_R1.shape)
    part = stay_here(slots_of(seats_R1, ones_R1), EXPERTS)
    plan = DispatchPlan([part], part.seats.counts_E)

    def gradients(leaves: list[torch.Tensor], spans: list[list], below: bool) -> dict[str, torch.Tensor]:
        how = How(swiglu, tuple(len(span[0]) for span in spans), dtype)
        mixture(x_RH.detach().requires_grad_(below), ones_R1, plan, how, spans).backward(grad_RH)
        found = {what: leaf.grad for what, leaf in zip(shapes, leaves, strict=True)}
        for leaf in leaves:
            leaf.grad = None
        return found

    def ours(below: bool) -> dict[str, torch.Tensor]:
        spans = [[*trained, None, None], [*frozen, None, None]]
        return gradients(trained, spans, below)

    def masked(below: bool) -> dict[str, torch.Tensor]:
        found = gradients(whole, [[*whole, None, None]], below)
        return {what: grad.mul_(mask) for what, grad in found.items()}

    return ours, masked


def whole_model(task: Task, *, rounds: int) -> Iterator[dict]:
    """The rows of ESFT against each other arm; both of a pair are in memory and take turns."""
    ours = _esft_arms.esft(task)
    mine = costs(ours)
    for build in (_esft_arms.full, _esft_arms.masking, _esft_arms.lora):
        peer = build(task)
        theirs = costs(peer)
        if abs(theirs["loss"] - mine["loss"]) > 1e-5 * mine["loss"]:
            raise ValueError(f"{peer.name} computes another loss: {theirs['loss']}, not {mine['loss']}")
        if build is not _esft_arms.lora:
            _same(mine["gradients"], theirs["gradients"])
        (fast, whole), (their_fast, their_whole) = _take_turns((ours, peer), rounds)
        yield row("forward+backward", fast, their_fast, peer.name)
        yield row("step with optimizer", whole, their_whole, peer.name)
        yield row("products counted", mine["flops"] / 1e9, theirs["flops"] / 1e9, peer.name, unit="GFLOP")
        for what in ("peak activation", "gradient", "optimizer"):
            yield row(f"{what} bytes", mine[what] / MB, theirs[what] / MB, peer.name, unit="MB")
        if build is _esft_arms.full:
            floor = mine["flops"] / theirs["flops"]
            goal = f"goal: 1.05 x the floor of {floor:.3f}"
            yield row("forward+backward, share of full's time", fast / their_fast, 1.05 * floor, goal, unit="share")
            yield row("step, share of full's time", whole / their_whole, 0.65, "goal: 0.65", unit="share")
        del peer, theirs
        gc.collect()
    selected = _selected(ours)
    goal = f"goal: exactly {{}} x {selected:,} selected parameters"
    yield row("gradient bytes", mine["gradient"], 4 * selected, goal.format(4), unit="bytes")
    yield row("optimizer bytes", mine["optimizer"], STATE_BYTES * selected, goal.format(STATE_BYTES), unit="bytes")


def zero_alignment(task: Task) -> dict:
    """The optimizer's bytes under DeepSpeed's ZeRO 2 on one rank, against the exact count."""
    arm = _esft_arms.esft(task, backend="deepspeed")
    selected = _selected(arm)
    arm.forward_backward()
    arm.step()
    found, exact = arm.optimizer_bytes(), STATE_BYTES * selected
    arm.engine.close()
    name = f"the exact count: ZeRO 2 on one rank aligns by {found - exact} bytes"
    return row("optimizer bytes, ZeRO 2", found, exact, name, unit="bytes")


def _selected(arm: Arm) -> int:
    return sum(parameter.numel() for parameter in arm.engine.module.parameters() if parameter.requires_grad)


def costs(arm: Arm) -> dict:
    """One whole step, measured: loss, gradients of the selected experts, FLOPs and bytes. The arm is warm after it."""
    losses = []
    found: dict = {"flops": flops(lambda: losses.append(arm.forward_backward())), "loss": losses[0]}
    found["gradients"] = {what: tensor.clone() for what, tensor in arm.selected_gradients().items()}
    found["gradient"] = arm.gradient_bytes()
    arm.step()
    found["optimizer"] = arm.optimizer_bytes()
    found["peak activation"], left = allocated(arm.forward_backward)
    assert left >= found["gradient"], "the gradients of this step were allocated in it"
    arm.step()
    return found


def _take_turns(arms: tuple[Arm, Arm], rounds: int) -> list[list[float]]:
    """Median milliseconds of (forward and backward, the whole step) of each arm."""
    times: list[list[tuple[float, float]]] = [[] for _ in arms]
    for turn in range(rounds):
        order = list(zip(arms, times, strict=True))
        for arm, series in order if turn % 2 == 0 else reversed(order):
            start = time.perf_counter()
            arm.forward_backward()
            middle = time.perf_counter()
            arm.step()
            series.append((1e3 * (middle - start), 1e3 * (time.perf_counter() - start)))
    return [[Median(column) for column in zip(*series, strict=True)] for series in times]


def _same(ours: dict, theirs: dict) -> None:
    """Raises ValueError where a gradient differs by more than rounding."""
    if not ours or ours.keys() != theirs.keys():
        raise ValueError("the arms have gradients of different experts")
    for what, gradient in ours.items():
        other = theirs[what].double()
        error = ((gradient.double() - other).norm() / other.norm()).item()
        if not error <= TOLERANCE:
            raise ValueError(f"the gradient of {what} differs by {error:.1e}")


if __name__ == "__main__":
    print(native.status())
    main()
