"""Load an exported folder with plain transformers and print what the model writes. Usage: sample.py FOLDER"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

if not sys.stderr.isatty():
    logging.disable_progress_bar()
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
assert "moe_dist" not in sys.modules
print(f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters, loaded by transformers")

torch.manual_seed(0)
for prompt in ("def __init__(self", "Return the"):
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=48,
        do_sample=True,
        temperature=0.7,
        top_k=20,
        pad_token_id=tokenizer.pad_token_id,
    )
    print(f"--- {prompt!r}:\n{tokenizer.decode(tokens[0], skip_special_tokens=True)}")
