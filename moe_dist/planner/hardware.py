"""GPUs and clusters: the public figures that estimates of time rest on, and what is assumed beside them."""

from __future__ import annotations

from dataclasses import dataclass

from moe_dist.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """bf16, fp32: peak FLOP/s of dense matrix products. memory: bytes. memory_rate: bytes/s. inside, across: bytes/s
    that one GPU sends to others of its node, and to other nodes. source: where the figures are from."""

    name: str
    bf16: float
    fp32: float
    memory: int
    memory_rate: float
    inside: float
    across: float
    source: str


# NVLink figures of the data sheets count both directions; here is what one direction carries. The network is one port a
# GPU, as in NVIDIA's own DGX systems (HDR InfiniBand with A100, NDR with H100, H200 and B200).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12, 19.5e12, 80 * 10**9, 2.039e12, 300e9, 25e9, "NVIDIA A100 80GB data sheet, SXM"),
        Gpu("h100", 989e12, 67e12, 80 * 10**9, 3.35e12, 450e9, 50e9, "NVIDIA H100 data sheet, SXM, without sparsity"),
        Gpu("h200", 989e12, 67e12, 141 * 10**9, 4.8e12, 450e9, 50e9, "NVIDIA H200 data sheet, SXM, without sparsity"),
        Gpu(
            "b200",
            2250e12,
            75e12,
            180 * 10**9,
            7.7e12,
            900e9,
            50e9,
            "NVIDIA DGX B200 data sheet, per GPU, without sparsity",
        ),
    )
}


@dataclass(frozen=True)
class Cluster:
    """gpus in all, `node_size` a node.

    achieved: part of the peak that matrix products reach. usable: part of the memory that tensors may take; the rest is
    the context of CUDA, communicators and what an allocator cannot use. moved: part of a link's rate that collectives
    reach.

    Seconds: an exchange takes `begin`, and one after the other for each partner `message_inside` or `message_across`.
    These are what NCCL itself reckons with to choose among its algorithms (src/graph/tuning.cc, version 2.2x: ring,
    protocol Simple; baseLat 8.4, hwLat 3.4 over NVLink and 14.0 over a network, in microseconds). launch: what the host
    needs for one kernel. Eager PyTorch spends 5 to 10 microseconds on an operator with its gradient's book-keeping; it
    is hidden as long as the kernels take longer, see `speed`.
    """

    gpu: Gpu
    gpus: int
    node_size: int = 8
    achieved: float = 0.45
    moved: float = 0.75
    usable: float = 0.9
    begin: float = 8.4e-6
    message_inside: float = 3.4e-6
    message_across: float = 14e-6
    launch: float = 6e-6

    @property
    def room(self) -> int:
        return int(self.gpu.memory * self.usable)

    def rate(self, ranks: int, stride: int = 1) -> float:
        """Bytes/s a GPU sends within a group of `ranks`, of which consecutive ones are `stride` ranks apart."""
        link = self.gpu.inside if ranks * stride <= self.node_size else self.gpu.across
        return link * self.moved

    def latency(self, ranks: int, stride: int = 1) -> float:
        """Seconds of an exchange of nothing within such a group: a message to each of the other ranks, or a ring."""
        if ranks == 1:
            return 0.0
        nodes = min(ranks, -(-ranks * stride // self.node_size))
        return self.begin + (ranks - nodes) * self.message_inside + (nodes - 1) * self.message_across


def gpu_named(name: str) -> Gpu:
    """Raises UserError for one that the table does not have."""
    if name not in GPUS:
        raise UserError(
            f"--gpu {name}: known are {', '.join(GPUS)}; --memory-gb, --tflops, ... set figures of another one"
        )
    return GPUS[name]
