"""Time of each back end of the experts, forward and backward: the one that `auto` takes against all others.

One rank's experts, SwiGLU without biases, all of which train. Even: each has as many rows as any other; balanced: rows
choose experts at random, all alike; skewed: the n-th most wanted expert has 1/n of the first one's rows. A back end
that does not serve is not there: `batched` wants rows so even that padding costs at most a quarter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks._harness import Median, interleaved, row, run
from moe_dist.ops import grouped_mlp
from moe_dist.ops.grouped_mlp import Span, serving, swiglu

# experts, hidden, width, rows: few wide ones as in Mixtral, 64 and 128 narrow ones as in DeepSeek and Qwen3
SIZES = [(8, 512, 1024, 1024), (64, 512, 256, 4096), (128, 256, 128, 4096)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> None:
    run("experts_backends", collect, description=__doc__.splitlines()[0], arguments=arguments)


def collect(full: bool) -> Iterator[dict | str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    relative: dict[str, list[str]] = {}
    for experts, hidden, width, rows in SIZES:
        if full:
            rows *= 4
        for dtype_name, dtype in DTYPES.items():
            for load in LOADS:
                case = f"{experts} experts {hidden}x{width}, {rows} rows, {dtype_name}, {load}"
                times = measured(LOADS[load](experts, rows), hidden, width, dtype, device, rounds=15 if full else 7)
                auto = times.pop("auto")
                best = min(*times.values(), auto)
                relative[case] = [f"{name} {time / best:.2f}" for name, time in times.items()]
                for name, time in times.items():
                    yield row(case, auto, time, name)
    yield "Times relative to the fastest of them:\n\n" + "\n".join(
        f"- {case}: {', '.join(names)}" for case, names in relative.items()
    )


def measured(
    counts: list[int], hidden: int, width: int, dtype: torch.dtype, device: torch.device, *, rounds: int
) -> dict[str, Median]:
    """Milliseconds of each back end that serves, and of `auto`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    span = Span(
        draw(len(counts), 2 * width, hidden) / hidden**0.5,
        draw(len(counts), hidden, width) / width**0.5,
        None,
        None,
        counts,
        torch.tensor(counts, device=device),
    )
    x_RH, grad_RH = draw(sum(counts), hidden), draw(sum(counts), hidden)
    factor_R = torch.rand(sum(counts), generator=generator).to(device)

    def step(backend: str) -> None:
        options = {"factor_R": factor_R, "backend": backend}
        _, zs = grouped_mlp.forward(x_RH, [span], swiglu, keep_z=[True], **options)
        options |= {"needs_rows": True, "needs_factor": True, "needs": (True, True, False, False)}
        grouped_mlp.backward(grad_RH, x_RH, zs, [span], swiglu, on_rows=lambda dx, dfactor: None, **options)
        if device.type == "cuda":
            torch.cuda.synchronize()

    names = ["auto", *serving(x_RH, span, swiglu)]
    steps = [lambda name=name: step(name) for name in names]
    return dict(zip(names, interleaved(steps, rounds=rounds, seconds=5.0), strict=True))


def _even(experts: int, rows: int) -> list[int]:
    return [rows // experts] * experts


def _balanced(experts: int, rows: int) -> list[int]:
    chosen_R = torch.randint(experts, (rows,), generator=torch.Generator().manual_seed(0))
    return chosen_R.bincount(minlength=experts).tolist()


def _skewed(experts: int, rows: int) -> list[int]:
    share_S = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    bound_S = (share_S.cumsum(0) * rows / share_S.sum()).round().long()
    return bound_S.diff(prepend=bound_S.new_zeros(1)).tolist()


LOADS = {"even": _even, "balanced": _balanced, "skewed": _skewed}


if __name__ == "__main__":
    main()
