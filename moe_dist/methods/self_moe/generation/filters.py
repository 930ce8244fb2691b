"""Filters by form and likeness: length, traces of the prompt, going round in circles, near-duplicates.

The protocol, and the filters that always look, are in filters_base.py; `filters_of` puts all of a skill in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_dist.methods.self_moe.generation.answer_filters import Checked, SelfConsistent
from moe_dist.methods.self_moe.generation.config_filters import FilterSection
from moe_dist.methods.self_moe.generation.filters_base import INSTRUCTION, RESPONSE, Draft, Filter, first_filters
from moe_dist.methods.self_moe.generation.seeds import Seed
from moe_dist.methods.self_moe.judging.answers import AnswerRule
from moe_dist.methods.self_moe.judging.contamination import Contamination, NotInEvaluation
from moe_dist.methods.self_moe.judging.overlap import SimilarTexts, ngrams_of, words_of

RUN = 4  # words
RUNS = 40  # an answer of fewer runs may well repeat itself
DISTINCT = 0.3


class Length:
    """Reasons: instruction_short, instruction_long, response_short, response_long, by words; bounds included."""

    name = "length"

    def __init__(self, stage: str, low: int, high: int):
        self.stage, self.low, self.high = stage, low, high

    def __call__(self, draft: Draft) -> str | None:
        count = len(words_of(_newest(draft, self.stage)))
        if self.low <= count <= self.high:
            return None
        return f"{self.stage}_{'short' if count < self.low else 'long'}"


class NoPrompt:
    """Reasons: instruction_prompt, response_prompt: the text holds a heading of the prompt, so the model went on."""

    name = "no_prompt"

    def __init__(self, stage: str, headings: Sequence[str]):
        self.stage, self.headings = stage, tuple(headings)

    def __call__(self, draft: Draft) -> str | None:
        text = _newest(draft, self.stage)
        return f"{self.stage}_prompt" if any(heading in text for heading in self.headings) else None


class NoCircles:
    """Reasons: response_circles, fewer than 0.3 of its runs of 4 words differ; response_echo, it is the instruction."""

    name = "no_circles"
    stage = RESPONSE

    def __call__(self, draft: Draft) -> str | None:
        runs = ngrams_of(draft.response, RUN)
        if len(runs) >= RUNS and len(set(runs)) < DISTINCT * len(runs):
            return "response_circles"
        return "response_echo" if words_of(draft.response) == words_of(draft.instruction) else None


class NoNearDuplicates:
    """Reasons: seed_like, near_duplicate: Jaccard similarity of the sets of 3-grams of words of two instructions."""

    name = "no_near_duplicates"
    stage = INSTRUCTION

    def __init__(self, seeds: Iterable[Seed], similarity: float):
        self._seeds, self._seen = SimilarTexts(similarity), SimilarTexts(similarity)
        for seed in seeds:
            self._seeds.add(seed.instruction, seed.id)

    def __call__(self, draft: Draft) -> str | None:
        if self._seeds.nearest(draft.instruction):
            return "seed_like"
        if self._seen.nearest(draft.instruction):
            return "near_duplicate"
        self._seen.add(draft.instruction, draft.id)
        return None


def filters_of(section: FilterSection, seeds: Sequence[Seed], *, headings: Sequence[str] = ()) -> list[Filter]:
    """The filters of one skill in the order in which they look: cheap ones first, those that remember after them.

    headings: strings that only the prompts have. Raises UserError for a file of section.evaluation or section.check
    that cannot be read.
    """
    always = first_filters(seeds)
    filters = [test for test in always if test.stage == INSTRUCTION]
    filters += [Length(INSTRUCTION, *section.instruction_words), NoPrompt(INSTRUCTION, headings)]
    if section.evaluation:
        known = Contamination.of_files(section.evaluation, ngram=section.ngram, similarity=section.similarity)
        filters.append(NotInEvaluation(INSTRUCTION, known))
    filters.append(NoNearDuplicates(seeds, section.similarity))
    filters += [test for test in always if test.stage == RESPONSE]
    filters += [Length(RESPONSE, *section.response_words), NoPrompt(RESPONSE, headings), NoCircles()]
    if section.evaluation:
        filters.append(NotInEvaluation(RESPONSE, known))
    if section.samples:
        filters.append(SelfConsistent(AnswerRule(section.answer), section.agreement))
    if section.check:
        filters.append(Checked(section.check))
    return filters


def _newest(draft: Draft, stage: str) -> str:
    return draft.instruction if stage == INSTRUCTION else draft.response
