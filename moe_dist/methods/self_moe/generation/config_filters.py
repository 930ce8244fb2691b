"""The section of a configuration that says which generated records are kept."""

from __future__ import annotations

from dataclasses import dataclass

from moe_dist.config.schema import key
from moe_dist.errors import UserError
from moe_dist.methods.self_moe.judging.answers import LAST_NUMBER, check_pattern


@dataclass
class FilterSection:
    instruction_words: list[int] = key([3, 300], "Fewest and most words of an instruction.")
    response_words: list[int] = key([1, 1000], "Fewest and most words of a response.")
    similarity: float = key(
        0.7,
        "Instructions this alike are near-duplicates: Jaccard similarity of their sets of runs of 3 words.",
        above=0,
        high=1,
    )
    evaluation: list[str] = key([], "JSONL files of held-out items; what overlaps with them is left out.")
    ngram: int = key(13, "A run of so many words in common is overlap with a held-out item.", low=1)
    samples: int = key(0, "Sampled answers by which an answer is checked for self-consistency; 0 = no check.", low=0)
    agreement: float = key(0.5, "The share of the sampled answers that has to agree with the answer.", above=0, high=1)
    answer: str = key(
        LAST_NUMBER,
        "Regular expression that finds the answer in a response: its last match, group 1 where there is one.",
    )
    check: str | None = key(
        None,
        "Python file with `check(instruction, response)`, run locked down for every pair: true keeps it. "
        "`python` and `arithmetic` name checks of our own.",
    )

    def validate(self, place: str) -> None:
        """Check what bounds of single keys do not say. Raises UserError that names the key."""
        for name in ("instruction_words", "response_words"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
                raise UserError(f"{place}.{name}={bounds}: has to be [fewest, most]")
        check_pattern(self.answer, f"{place}.answer")
