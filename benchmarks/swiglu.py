"""SwiGLU's two passes against torch's own, outputs preallocated on both sides.

    python -m benchmarks.swiglu [--json FILE] [--full]

The sizes are those of one expert (what the layer works on at a time, in the cache) and of all rows of a layer at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks._harness import interleaved, row, run
from moe_dist.ops import native
from moe_dist.ops.swiglu import swiglu_backward, swiglu_forward

SIZES = ((256, 512), (16384, 512), (512, 1024), (192, 1408))  # rows, expert width
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    torch.set_num_threads(2)
    run("swiglu", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict]:
    rounds = 400 if full else 100
    for name, dtype in DTYPES.items():
        for rows, width in SIZES:
            z, grad = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
            a, grad_z = torch.empty_like(grad), torch.empty_like(z)
            gate, up = z.chunk(2, dim=1)
            grad_gate, grad_up = grad_z.chunk(2, dim=1)
            silu = torch.empty_like(grad)

            def torch_forward(gate=gate, up=up, silu=silu, a=a):
                torch.mul(torch.ops.aten.silu.out(gate, out=silu), up, out=a)

            def torch_backward(gate=gate, up=up, silu=silu, a=a, grad=grad, grad_gate=grad_gate, grad_up=grad_up):
                torch.ops.aten.silu.out(gate, out=silu)
                torch.mul(grad, silu, out=grad_up)
                torch.mul(silu, up, out=a)
                torch.mul(grad, up, out=silu)
                torch.ops.aten.silu_backward.grad_input(silu, gate, grad_input=grad_gate)

            pairs = {
                "forward": (lambda z=z, a=a: swiglu_forward(z, out=a), torch_forward),
                "backward": (
                    lambda z=z, a=a, grad=grad, grad_z=grad_z: swiglu_backward(grad, z, out=a, out_grad=grad_z),
                    torch_backward,
                ),
            }
            for which, (ours, peer) in pairs.items():
                mine, theirs = interleaved([ours, peer], rounds=rounds)
                yield row(f"R{rows} I{width} {name} {which}", mine, theirs, "torch, out=")


if __name__ == "__main__":
    print(native.status())
    main()
