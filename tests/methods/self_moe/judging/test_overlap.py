"""Near-duplicates and runs in common, against comparisons of every pair."""

from __future__ import annotations

import random

import pytest

from moe_dist.methods.self_moe.judging.overlap import SharedRuns, SimilarTexts, ngrams_of, words_of


def test_words_have_one_spelling_and_signs_that_matter():
    assert words_of("What's  3+4, then?") == ["what", "s", "3", "+", "4", "then"]
    assert words_of("\uff13 \uff0b \uff14") == words_of("3 + 4") != words_of("3 - 4")
    assert words_of("水を 飲む") == ["水", "を", "飲", "む"]
    assert words_of("STRASSE ﬁn") == words_of("straße fin")
    assert words_of("?!...") == []


def test_short_text_is_one_run():
    assert len(ngrams_of("a b", 3)) == 1
    assert ngrams_of("a b", 3) != ngrams_of("a c", 3)
    assert ngrams_of("", 3) == []


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.7, 1.0])
def test_finds_what_comparing_all_pairs_finds(similarity):
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcd", k=draw.randint(1, 12))) for _ in range(150)]
    texts += [" ".join([*text.split()[:-1], "e"]) for text in texts[::3]]
    index, found = SimilarTexts(similarity), 0
    for number, text in enumerate(texts):
        mine = set(ngrams_of(text, 3))
        pairs = []
        for earlier in range(number):
            theirs = set(ngrams_of(texts[earlier], 3))
            pairs.append((len(mine & theirs) / len(mine | theirs), -earlier))
        best, which = max(pairs, default=(0.0, 0))
        expected = (str(-which), best) if best >= similarity else None
        assert index.nearest(text) == expected
        found += expected is not None
        index.add(text, str(number))
    assert 10 < found < len(texts) - 10


def test_texts_without_words_are_like_nothing():
    index = SimilarTexts(0.5)
    index.add("...", "a")
    assert index.nearest("...") is None


def test_shared_runs():
    index = SharedRuns(4)
    index.add(["The quick brown fox jumps.", "too short, this"], "fox")
    assert index.find("and then THE QUICK, brown fox slept") == "fox"
    assert index.find("the quick brown dog; fox jumps over") is None
    assert index.find("too short, this") is None
