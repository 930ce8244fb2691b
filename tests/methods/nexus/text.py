"""Small texts of three domains, a tokenizer trained on them, and models that go with it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from moe_dist.data.corpora import train_tokenizer
from tests.methods.nexus.tiny import dense_folder

TOKENS = 320
WORDS = {
    "code": ["def", "return", "import", "class", "self", "None", "for", "in", "range", "print", "lambda", "yield"],
    "prose": ["the", "a", "king", "and", "his", "daughter", "went", "over", "hill", "into", "wood", "by", "night"],
    "sums": ["1", "2", "3", "4", "5", "6", "7", "8", "9", "+", "=", "(", ")"],
    "new": ["selon", "la", "loi", "du", "bois", "mais", "il", "pleut", "sur", "ville"],
}


def documents(domain: str, count: int = 12) -> list[str]:
    generator = torch.Generator().manual_seed(len(domain))
    words = WORDS[domain]
    return [
        " ".join(words[i] for i in torch.randint(len(words), (10 + number,), generator=generator).tolist())
        for number in range(count)
    ]


def write_text(folder: Path) -> dict[str, str]:
    """{domain: JSONL file}."""
    files = {}
    for domain in WORDS:
        files[domain] = str(folder / f"{domain}.jsonl")
        lines = [json.dumps({"text": text}) for text in documents(domain)]
        Path(files[domain]).write_text("\n".join(lines) + "\n")
    return files


def tokenizer():
    return train_tokenizer([text for domain in WORDS for text in documents(domain)], vocab_size=TOKENS)


def seed_folder(family: str, folder: Path, **options) -> Path:
    """A dense model with its tokenizer."""
    dense_folder(family, folder, vocab_size=TOKENS, **options)
    tokenizer().save_pretrained(folder)
    return folder
