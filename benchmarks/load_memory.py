"""Peak anonymous memory of loading a model on each of 4 ranks, against what a rank keeps.

    python -m benchmarks.load_memory [--json FILE] [--full]

The checkpoint is a Qwen3-MoE of random weights, a little over 1 GB (--full: 4 GB), written to a temporary folder. Each
rank of an expert group of 4 loads its share. Its RssAnon is read from /proc by a process that does nothing else, and
what it was before the load is taken off; pages of mapped files are not anonymous and do not count. The bound is the
rank's own share plus the largest tensor of the files plus 10 %. Beside it: transformers' own `from_pretrained`, which
loads everything everywhere.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks._harness import row, run

RANKS = 4
MB = 1e6
SLACK = 1.1


def main() -> None:
    run("load_memory", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict]:
    with tempfile.TemporaryDirectory(prefix="load-memory-") as folder:
        size, largest = in_process(write_checkpoint, folder, 20 if full else 5)
        yield f"The checkpoint has {size / MB:.0f} MB, its largest tensor {largest / MB:.0f} MB."
        port = _free_port()
        peaks, shares = watch(_load_ours, [(folder, rank, port) for rank in range(RANKS)])
        whole, _ = watch(_load_transformers, [(folder,)])
        for rank, (peak, share) in enumerate(zip(peaks, shares, strict=True)):
            bound = SLACK * (share + largest)
            case = f"{size / 1e9:.2f} GB on rank {rank} of {RANKS}"
            yield row(case, peak / MB, bound / MB, "bound: own share + largest tensor + 10 %", unit="MB")
            yield row(case, peak / MB, whole[0] / MB, "transformers from_pretrained", unit="MB")


def write_checkpoint(folder: str, layers: int) -> tuple[int, int]:
    """Random bf16 weights as a Hugging Face folder -> bytes of its files, bytes of its largest tensor."""
    from safetensors import safe_open
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=16384,
        hidden_size=1024,
        moe_intermediate_size=512,
        num_experts=64,
        num_experts_per_tok=8,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.02, 0.02)
    model.save_pretrained(folder, max_shard_size="400MB")
    size = largest = 0
    for path in Path(folder).glob("*.safetensors"):
        size += path.stat().st_size
        with safe_open(path, "pt") as file:
            for key in sorted(file.keys()):
                view = file.get_slice(key)
                count = torch.Size(view.get_shape()).numel()
                largest = max(largest, count * torch.bfloat16.itemsize)
    return size, largest


def _load_ours(folder: str, rank: int, port: int, ready: Callable[[], None]) -> int:
    """Load this rank's share between `ready()` and the return -> bytes that stay."""
    import torch.distributed as dist

    from moe_dist.models import load_model
    from moe_dist.parallel.grid import build_grid

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, RANKS, "127.0.0.1", port)), strict=True))
    dist.init_process_group("gloo")
    grid = build_grid(expert=RANKS)
    ready()
    model = load_model(folder, grid)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _load_transformers(folder: str, ready: Callable[[], None]) -> int:
    from transformers import AutoModelForCausalLM

    ready()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def watch(load: Callable[..., int], arguments: list[tuple]) -> tuple[list[int], list[int]]:
    """Run `load(*args, ready)` in a process for each of `arguments` -> (peak anonymous bytes during it, its result)."""
    context = torch.multiprocessing.get_context("spawn")
    pipes, processes = [], []
    os.environ["OMP_NUM_THREADS"] = "1"
    for args in arguments:
        here, there = context.Pipe()
        processes.append(context.Process(target=_watched, args=(load, args, there), daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    del os.environ["OMP_NUM_THREADS"]
    try:
        for pipe in pipes:
            pipe.recv()  # ready
        before = [anonymous(process.pid) for process in processes]
        peaks, results = list(before), [None] * len(pipes)
        for pipe in pipes:
            pipe.send("go")
        while None in results:
            for i, (process, pipe) in enumerate(zip(processes, pipes, strict=True)):
                if results[i] is None:
                    peaks[i] = max(peaks[i], anonymous(process.pid))
                    if pipe.poll():
                        results[i] = pipe.recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [peak - start for peak, start in zip(peaks, before, strict=True)], results


def _watched(load: Callable[..., int], args: tuple, pipe) -> None:
    torch.set_num_threads(1)

    def ready():
        pipe.send("ready")
        pipe.recv()

    pipe.send(load(*args, ready))
    pipe.recv()  # stay until the last reading was taken


def anonymous(pid: int) -> int:
    """Bytes of memory in use that no file backs."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this kernel does not tell RssAnon")


def in_process(function: Callable, *args):
    """The result of `function(*args)`, run in a process of its own so that its memory goes with it."""
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, args)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
