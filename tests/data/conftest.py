"""A tiny tokenizer, trained once; no test of data needs the network."""

import json

import pytest

from moe_dist.data.corpora import train_tokenizer

SENTENCE = "the quick brown fox jumps over the lazy dog while nine experts wait for their tokens"
WORDS = SENTENCE.split()


@pytest.fixture(scope="session")
def tokenizer():
    texts = [" ".join(WORDS[i % len(WORDS) :] + WORDS[: i % len(WORDS)]) for i in range(40)]
    return train_tokenizer(texts, vocab_size=320)


@pytest.fixture
def write_jsonl(tmp_path):
    """`write_jsonl(name, texts)`: a JSONL file of {"text"} records; returns its path."""

    def write(name: str, texts):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
        return path

    return write


def numbered(count: int, words: int = 6) -> list[str]:
    """Different short texts of uneven length."""
    return [
        " ".join([str(i), *(WORDS[(i * 7 + j) % len(WORDS)] for j in range(1 + i * 5 % words))]) for i in range(count)
    ]
