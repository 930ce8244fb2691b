"""What ESFT has changed: held-out losses, tensors, and text, with both models loaded by plain transformers.

Usage: compare.py FOLDER, the folder of the quickstart, with base-model, merged, experts.json and the two eval-*.json.
"""

import json
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

if not sys.stderr.isatty():
    logging.disable_progress_bar()
folder = Path(sys.argv[1])
before, after = (json.loads((folder / f"eval-{name}.json").read_text())["domains"] for name in ("base", "merged"))
print(f"{'held-out loss':<16}{'base':>8}{'ESFT':>8}{'change':>9}")
for domain, figures in before.items():
    was, now = figures["loss"], after[domain]["loss"]
    print(f"{domain:<16}{was:>8.4f}{now:>8.4f}{now - was:>+9.4f}")

base, tuned = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("base-model", "merged"))
assert "moe_dist" not in sys.modules
experts = json.loads((folder / "experts.json").read_text())["experts"]
others = dict(tuned.named_parameters())
changed = {}
for name, tensor in base.named_parameters():
    if ".experts." in name:
        layer = re.search(r"layers\.(\d+)\.", name).group(1)
        here = {e for e in range(len(tensor)) if not torch.equal(tensor[e], others[name][e])}
        changed[layer] = changed.get(layer, set()) | here
    else:
        assert torch.equal(tensor, others[name]), f"{name} has changed"
for layer, ids in changed.items():
    assert ids == set(experts.get(layer, [])), f"layer {layer}: {sorted(ids)} have changed"
chosen, total = sum(map(len, experts.values())), base.config.num_experts * len(changed)
print(f"\n{chosen} of {total} experts have changed, those that were selected; everything else is the same to the bit")

tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
prompt = "The "
inputs = tokenizer(prompt, return_tensors="pt")
for name, model in (("base", base), ("ESFT", tuned)):
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
    print(f"--- {name}: {tokenizer.decode(tokens[0], skip_special_tokens=True)!r}")
