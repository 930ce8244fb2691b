"""Filters of generated records: what is badly formed, of a wrong length, or too much like something else.

A filter is called with a record and gives the reason to leave it out, or None. `Filters` puts several in a row, counts
the reasons, and tells those that compare records with each other which ones were kept. The outcome depends on the
records and their order alone, so filtering in the order of ids is the same on any number of ranks and after a resume.

A record: {"id": str, "messages": [{"role": "user", ...}, {"role": "assistant", ...}], "skill": str, "provenance": {}};
while only the instruction is there, the assistant's message is missing and filters of answers pass it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from moe_dist.methods.self_moe.overlap import SimilarTexts, ngrams_of, words_of

REPETITION_WORDS = 40  # shorter answers may well repeat themselves
REPETITION_N = 4


class Filter(Protocol):
    """A test of one record. Where it has a method `keep(record)`, that is called with each record that all let pass."""

    def __call__(self, record: Mapping) -> str | None:
        """A short reason to leave the record out, the same words for the same kind of fault; None to keep it."""


def question_of(record: Mapping) -> str:
    """The user's message."""
    return next(message["content"] for message in record["messages"] if message["role"] == "user")


def answer_of(record: Mapping) -> str | None:
    """The assistant's message; None while there is none."""
    return next((message["content"] for message in record["messages"] if message["role"] == "assistant"), None)


class Filters:
    """Filters one after the other; the first reason counts. `reasons`: how many records each has left out."""

    def __init__(self, filters: Sequence[Filter]):
        self.filters = list(filters)
        self.reasons: Counter[str] = Counter()
        self.kept = 0

    def __call__(self, record: Mapping) -> str | None:
        for test in self.filters:
            reason = test(record)
            if reason is not None:
                self.reasons[reason] += 1
                return reason
        for test in self.filters:
            if hasattr(test, "keep"):
                test.keep(record)
        self.kept += 1
        return None

    def summary(self) -> dict:
        """{"kept": n, "left_out": {reason: n}}, most frequent first."""
        return {"kept": self.kept, "left_out": dict(self.reasons.most_common())}


class Format:
    """Something is there, and the answer is one.

    stops: strings that only a prompt has (its headings); in an answer they show that the model went on with the prompt.
    An answer of which fewer than `distinct` of all runs of 4 words are different goes round in circles.
    """

    def __init__(self, *, stops: Sequence[str] = (), distinct: float = 0.3):
        self.stops, self.distinct = tuple(stops), distinct

    def __call__(self, record: Mapping) -> str | None:
        question, answer = question_of(record), answer_of(record)
        if not words_of(question):
            return "empty instruction"
        if any(stop in question for stop in self.stops):
            return "prompt in the instruction"
        if answer is None:
            return None
        if not words_of(answer):
            return "empty answer"
        if any(stop in answer for stop in self.stops):
            return "prompt in the answer"
        if words_of(answer) == words_of(question):
            return "answer repeats the instruction"
        runs = ngrams_of(answer, REPETITION_N)
        if len(runs) >= REPETITION_WORDS and len(set(runs)) < self.distinct * len(runs):
            return "answer goes round in circles"
        return None


class Length:
    """Instruction and answer have from `low` to `high` words, bounds included."""

    def __init__(self, *, instruction: tuple[int, int], answer: tuple[int, int]):
        self.bounds = {"instruction": instruction, "answer": answer}

    def __call__(self, record: Mapping) -> str | None:
        for what, text in (("instruction", question_of(record)), ("answer", answer_of(record))):
            low, high = self.bounds[what]
            if text is not None and not low <= (count := len(words_of(text))) <= high:
                return f"{what} too {'short' if count < low else 'long'}"
        return None


class NearDuplicates:
    """The instruction is like that of an earlier record or of a seed: Jaccard similarity of their sets of 3-grams.

    seeds: instructions that may not come back. similarity: 1 leaves out only what has the same words.
    """

    def __init__(self, *, seeds: Iterable[str] = (), similarity: float = 0.7):
        self._seeds, self._kept = SimilarTexts(similarity), SimilarTexts(similarity)
        for number, seed in enumerate(seeds):
            self._seeds.add(seed, f"seed {number}")

    def __call__(self, record: Mapping) -> str | None:
        question = question_of(record)
        if self._seeds.nearest(question):
            return "near-duplicate of a seed"
        return "near-duplicate" if self._kept.nearest(question) else None

    def keep(self, record: Mapping) -> None:
        """The record was kept: later ones are compared with it."""
        self._kept.add(question_of(record), record["id"])
