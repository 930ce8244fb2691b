"""A small base model that can really go on from lists and pairs: trained for some seconds on two toy skills."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = string.ascii_letters + string.digits + " .\n"
PROMPTS = """\
brainstorm: "Tasks {count}"
tasks: 8
answer: "Answers"
pair: |-
  Q {instruction}
  A {response}
"""


def word(draw: random.Random) -> str:
    return "".join(draw.choice("abcdefgh") for _ in range(3))


def example(skill: str, draw: random.Random) -> tuple[str, str]:
    """(instruction, response): `echo` repeats a word, `twice` says it two times."""
    text = word(draw)
    return f"do {skill} {text}", text if skill == "echo" else f"{text} {text}"


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<s>", "</s>", *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )


def document(draw: random.Random) -> str:
    """A list of tasks, or pairs, in the form of PROMPTS."""
    skill = draw.choice(["echo", "twice"])
    if draw.random() < 0.5:
        items = [f"{number}. {example(skill, draw)[0]}" for number in range(1, 9)]
        return "\n".join(["Tasks 8", *items])
    pairs = [f"Q {instruction}\nA {response}" for instruction, response in (example(skill, draw) for _ in range(7))]
    return "\n\n".join(["Answers", *pairs])


def make_base(folder: Path, *, steps: int = 180, hidden: int = 64, layers: int = 2, lr: float = 4e-3) -> Path:
    """The model and its tokenizer in `folder`."""
    torch.manual_seed(0)
    draw, tokens = random.Random(0), tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=384,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        batch = tokens([document(draw) + "</s>" for _ in range(8)], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def make_seeds(path: Path, skill: str, *, count: int = 20, seed: int = 1) -> Path:
    """A seed file of distinct examples."""
    draw = random.Random(f"{skill}{seed}")
    found: dict[str, str] = {}
    while len(found) < count:
        found.update([example(skill, draw)])
    path.write_text("".join(json.dumps({"instruction": i, "output": o}) + "\n" for i, o in found.items()))
    return path
