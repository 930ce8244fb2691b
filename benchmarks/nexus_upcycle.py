"""Peak anonymous memory of upcycling a dense model and four experts, against the largest tensor.

    python -m benchmarks.nexus_upcycle [--json FILE] [--full]

Seed and experts are Llama models of random bf16 weights, a little over 1 GB each (--full: 3 GB), in a temporary
folder. The process's RssAnon is read from /proc by another one, and what it was before is taken off; pages of mapped
files are not anonymous and do not count. The bound is three times the largest tensor.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks._harness import row, run
from benchmarks.load_memory import in_process, watch

EXPERTS = 4
MB = 1e6


def main() -> None:
    run("nexus_upcycle", collect, description=__doc__.splitlines()[0])


def collect(full: bool) -> Iterator[dict]:
    with tempfile.TemporaryDirectory(prefix="nexus-upcycle-") as folder:
        sizes = [in_process(write_dense, f"{folder}/{number}", number, 30 if full else 10) for number in range(5)]
        size, largest = sizes[0]
        yield f"Each of {1 + EXPERTS} models has {size / MB:.0f} MB, its largest tensor {largest / MB:.0f} MB."
        for method in ("linear", "dense_merging"):
            start = time.perf_counter()
            (peak,), (written,) = watch(_upcycle, [(folder, method)])
            seconds = time.perf_counter() - start
            yield f"{method} took {seconds:.0f} s, the start of its process with it."
            yield row(
                f"{method}, {written / 1e9:.2f} GB written",
                peak / MB,
                3 * largest / MB,
                "bound: 3 times the largest tensor",
                unit="MB",
            )


def write_dense(folder: str, seed: int, layers: int) -> tuple[int, int]:
    """Random bf16 weights as a Hugging Face folder -> bytes of its files, bytes of its largest tensor."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.02, 0.02)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="400MB")
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return size, max(parameter.nbytes for parameter in model.parameters())


def _upcycle(folder: str, method: str, ready: Callable[[], None]) -> int:
    """Upcycle between `ready()` and the return -> bytes written."""
    from moe_dist.methods.nexus.config import NexusConfig, NexusSection
    from moe_dist.methods.nexus.upcycle import upcycle

    experts = {f"domain{number}": f"{folder}/{number}" for number in range(1, 1 + EXPERTS)}
    config = NexusConfig(nexus=NexusSection(seed=f"{folder}/0", experts=experts, method=method))
    ready()
    upcycle(config, f"{folder}/{method}")
    return sum(path.stat().st_size for path in Path(folder, method).glob("*.safetensors"))


if __name__ == "__main__":
    main()
