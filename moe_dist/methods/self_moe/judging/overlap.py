"""How much texts have in common: near-duplicates by their word n-grams, and long runs of words in common.

Both are exact and do not depend on hashing or order of insertion, so that the same records are kept on any machine.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from hashlib import blake2b

# Chinese, Japanese and Korean write no spaces: there a character is a word. Signs such as + and < tell sums and
# programs apart and are words; marks of punctuation are not.
_SPACELESS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+|[^\w\s.,;:!?'\"`()\[\]{{}}]")


def words_of(text: str) -> list[str]:
    """The words of a text, in one spelling: compatibility forms unified (NFKC), case folded, no punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams_of(text: str, n: int) -> list[int]:
    """A 64-bit number for each run of `n` words, in order; a shorter text with words is one run of all of them."""
    words = words_of(text)
    count = max(1, len(words) - n + 1) if words else 0
    return [
        int.from_bytes(blake2b(" ".join(words[i : i + n]).encode(), digest_size=8).digest(), "little")
        for i in range(count)
    ]


class SimilarTexts:
    """Texts that a further one can be compared with by the Jaccard similarity of their sets of word n-grams.

    similarity: at least so much, above 0 and at most 1. Every pair that reaches it is found: of two such sets, ordered
    alike, the first |A| - ceil(similarity·|A|) + 1 elements have one in common, so only those are indexed.
    """

    def __init__(self, similarity: float, *, n: int = 3):
        assert 0 < similarity <= 1
        self.similarity, self.n = similarity, n
        self._sets: list[frozenset[int]] = []
        self._keys: list[str] = []
        self._index: dict[int, list[int]] = {}

    def add(self, text: str, key: str) -> None:
        """Keep a text under a name for reports. A text without words is like no other."""
        grams = frozenset(ngrams_of(text, self.n))
        for gram in self._head(grams):
            self._index.setdefault(gram, []).append(len(self._sets))
        self._sets.append(grams)
        self._keys.append(key)

    def nearest(self, text: str) -> tuple[str, float] | None:
        """(key, similarity) of the kept text most like this one, the earlier of two; None if none is like enough."""
        grams = frozenset(ngrams_of(text, self.n))
        candidates = sorted({number for gram in self._head(grams) for number in self._index.get(gram, ())})
        best = None
        for number in candidates:
            other = self._sets[number]
            common = len(grams & other)
            found = common / (len(grams) + len(other) - common)
            if found >= self.similarity and (best is None or found > best[1]):
                best = (self._keys[number], found)
        return best

    def _head(self, grams: frozenset[int]) -> list[int]:
        # A little less than the bound: rounding must not shorten the head.
        return sorted(grams)[: len(grams) - math.ceil(self.similarity * len(grams) - 1e-9) + 1] if grams else []


class SharedRuns:
    """Texts that a further one can share a run of `n` words with. Texts of fewer words have no such run."""

    def __init__(self, n: int):
        self.n = n
        self._keys: dict[int, str] = {}

    def add(self, texts: Iterable[str], key: str) -> None:
        """Keep texts under one name for reports."""
        for text in texts:
            for gram in self._runs(text):
                self._keys.setdefault(gram, key)

    def find(self, text: str) -> str | None:
        """The key of a kept text that has a run of words in common with this one, by its first such run."""
        return next((self._keys[gram] for gram in self._runs(text) if gram in self._keys), None)

    def _runs(self, text: str) -> list[int]:
        return ngrams_of(text, self.n) if len(words_of(text)) >= self.n else []
