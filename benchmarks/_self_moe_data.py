"""Data generation of Self-MoE against the same prompts through plain `model.generate`, at the same batch size."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._harness import row
from moe_dist.methods.self_moe.generation import generate as pipeline
from moe_dist.methods.self_moe.generation.backend import Sampling
from moe_dist.methods.self_moe.generation.config import load_config
from moe_dist.methods.self_moe.generation.local_model import LocalModel
from tests.methods.self_moe.tiny_base import PROMPTS, make_base, make_seeds

BATCH = 8


def data_generation(full: bool) -> Iterator[dict | str]:
    """Rows in microseconds a token that ends up in a text. Ours is the whole verb, but for loading the model: prompts,
    both phases, parsing, filters, files. The peer goes through the same prompts in the order of their ids."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_base(folder / "base", hidden=128, layers=4, steps=120, lr=3e-3)
        (folder / "prompts.yaml").write_text(PROMPTS)
        make_seeds(folder / "seeds.jsonl", "echo")
        section = {
            "model": str(folder / "base"),
            "seeds": {"echo": str(folder / "seeds.jsonl")},
            "prompts": {"echo": str(folder / "prompts.yaml")},
            "count": 200 if full else 40,
            "batch_size": BATCH,
            "instruction_tokens": 128,
            "response_tokens": 24,
        }
        (folder / "generate.yaml").write_text(yaml.safe_dump({"generate": section}))
        for name in ("float32", "bfloat16") if full else ("float32",):
            ours, peer, records = _measure(folder, name, rounds=5 if full else 3)
            case = f"data generation, H128, 4 layers, batch {BATCH}, {name}, {records} records"
            yield row(case, ours, peer, "model.generate", unit="µs/token")


def _measure(folder: Path, dtype: str, *, rounds: int) -> tuple[float, float, int]:
    """(µs a token of ours, of the peer, records): medians over rounds in which they take turns."""
    config = load_config(folder / "generate.yaml", [f"generate.dtype={dtype}"])
    backend = _Recorder(folder / "base", dtype=dtype, device=torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        backend.asked.clear()
        out, before = folder / f"out-{dtype}-{turn}", time.perf_counter()
        with mock.patch.object(pipeline, "make_backend", return_value=backend):
            pipeline.generate(config, out, device=torch.device("cpu"), say=None)
        ours = (time.perf_counter() - before) / sum(tokens for *_, tokens in backend.asked)
        if turn:  # the first is a warm-up
            times[0].append(ours)
            times[1].append(_plain(model, tokenizer, backend.asked))
    records = len((out / "echo.jsonl").read_text().splitlines())
    return (*(1e6 * statistics.median(values) for values in times), records)


class _Recorder(LocalModel):
    """Keeps what it was asked: (prompts, sampling, tokens generated)."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.asked: list[tuple[Sequence[str], Sampling, int]] = []

    def complete(self, prompts, sampling, **options):
        done = super().complete(prompts, sampling, **options)
        self.asked.append((prompts, sampling, sum(text.tokens for text in done)))
        return done


def _plain(model, tokenizer, asked: Sequence[tuple[Sequence[str], Sampling, int]]) -> float:
    """Seconds a token of plain `generate` over the same prompts, stop strings by transformers' own criterion."""
    seconds, total = 0.0, 0
    for sampling in {sampling.stop: sampling for _, sampling, _ in asked}.values():
        prompts = [prompt for group, its, _ in asked if its.stop == sampling.stop for prompt in group]
        draws = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        for start in range(0, len(prompts), BATCH):
            before = time.perf_counter()
            inputs = tokenizer(prompts[start : start + BATCH], padding=True, return_tensors="pt")
            out_BL = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=sampling.max_tokens,
                stop_strings=list(sampling.stop),
                tokenizer=tokenizer,
                **(draws if sampling.temperature else {"do_sample": False}),
            )
            texts = tokenizer.batch_decode(out_BL[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            seconds += time.perf_counter() - before
            # A character is a token here; a stop string counts, as it was generated, and so does the end mark.
            total += sum(min(sampling.max_tokens, len(text) + (sampling.stop[0] not in text)) for text in texts)
    return seconds / total
