"""What each step has brought: held-out losses by domain, what the new expert gets, and text by plain transformers.

Usage: compare.py FOLDER, the folder of the quickstart.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

if not sys.stderr.isatty():
    logging.disable_progress_bar()
folder = Path(sys.argv[1])


def of_run(name: str) -> dict:
    """Figures by domain at the end of a training run."""
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "eval"][-1]["domains"]


def of_eval(name: str) -> dict:
    return json.loads((folder / f"eval-{name}.json").read_text())["domains"]


def share_of_last(figures: dict) -> float:
    """Share of a domain's tokens that the last expert gets, over all layers."""
    slots = figures["experts"].values()
    return sum(layer[-1] for layer in slots) / sum(sum(layer) for layer in slots)


columns = {
    "seed": of_run("seed"),
    "dense docs": of_run("experts/runs/docs"),
    "dense help": of_run("experts/runs/help"),
    "dense code": of_run("new-expert/runs/code"),
    "mixture": of_run("mixture"),
    "+ code": of_eval("extended"),
    "trained": of_run("extended-run"),
    "stock": of_eval("stock"),
}
print(f"{'held-out loss':<14}" + "".join(f"{name:>12}" for name in columns))
for domain in columns["seed"]:
    print(f"{domain:<14}" + "".join(f"{figures[domain]['loss']:>12.4f}" for figures in columns.values()))
print("\nshare of the tokens that the new expert gets, before and after training")
for domain in columns["seed"]:
    before, after = (share_of_last(columns[name][domain]) for name in ("+ code", "trained"))
    print(f"{domain:<14}{before:>8.1%}{after:>8.1%}")

model = AutoModelForCausalLM.from_pretrained(folder / "stock").eval()
tokenizer = AutoTokenizer.from_pretrained(folder / "stock")
assert "moe_dist" not in sys.modules
inputs = tokenizer("The ", return_tensors="pt")
torch.manual_seed(0)
tokens = model.generate(
    inputs["input_ids"],
    attention_mask=inputs["attention_mask"],
    max_new_tokens=40,
    do_sample=True,
    temperature=0.7,
    top_k=20,
    pad_token_id=tokenizer.pad_token_id,
)
print(f"\nthe stock model says: {tokenizer.decode(tokens[0], skip_special_tokens=True)!r}")
