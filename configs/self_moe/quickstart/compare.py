"""What each step has brought: what was generated, the scores of all models, and answers by plain transformers and PEFT.

Usage: compare.py FOLDER, the folder of the quickstart.
"""

import json
import sys
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

if not sys.stderr.isatty():
    logging.disable_progress_bar()
folder = Path(sys.argv[1])

report = yaml.safe_load((folder / "generated" / "report.yaml").read_text())["skills"]
print(f"{'generated':<12}{'kept':>8}{'answered':>10}{'instructions':>14}")
for skill, row in report.items():
    print(f"{skill:<12}{row['kept']:>8}{row['answered']:>10}{row['instructions']:>14}")

skills = list(report)
models = ["base", *skills, "mixture"]
results = {name: json.loads((folder / f"eval-{name}" / "results.json").read_text()) for name in models}
print(f"\n{'held-out tasks':<16}" + "".join(f"{skill:>10}" for skill in [*skills, "average"]))
for name, tree in results.items():
    title = f"expert {name}" if name in skills else name
    scores = [*(tree["sets"][skill]["score"] for skill in skills), tree["average"]]
    print(f"{title:<16}" + "".join(f"{score:>10.1%}" for score in scores))

print(f"\n{'tokens go to':<16}" + "".join(f"{expert:>10}" for expert in skills))
for skill, experts in results["mixture"]["routing"].items():
    print(f"{skill:<16}" + "".join(f"{experts[expert]['first']:>10.1%}" for expert in skills))

# The mixture's folder is its base to plain transformers, with its experts as adapters; the merged expert is a model.
tokenizer = AutoTokenizer.from_pretrained(folder / "mixture")
base = AutoModelForCausalLM.from_pretrained(folder / "mixture").eval()
merged = AutoModelForCausalLM.from_pretrained(folder / "letters-model").eval()
adapted = PeftModel.from_pretrained(base, folder / "mixture" / "mixse" / "letters").eval()
assert "moe_dist" not in sys.modules
template = (folder / "tasks" / "alpaca.jinja").read_text()
print("\nplain transformers, the expert for letters as adapter of PEFT and as merged model:")
for instruction in ("Reverse the letters f a c b.", "Sort the letters h b g a."):
    asked = [{"role": "user", "content": instruction}]
    text = tokenizer.apply_chat_template(asked, chat_template=template, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    said = []
    with torch.no_grad():
        for model in (adapted, merged):
            tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            said.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        difference = (adapted(**inputs).logits - merged(**inputs).logits).abs().max()
    assert difference < 1e-3, f"adapter and merged model differ by {difference}"
    print(f"  {instruction} {said[0]!r} and {said[1]!r}")
