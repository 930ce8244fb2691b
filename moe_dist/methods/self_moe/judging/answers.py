"""The answer in a response, found by a regular expression, and when two answers are the same."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from decimal import Decimal

from moe_dist.errors import UserError

# The last number of a text, as answers of sums are usually graded. After a word a sign is no sign: 5-3 ends in 3.
LAST_NUMBER = r"(?<![\w.])[-+]?\$?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(r"([-+]?)\$?(\d{1,3}(?:,\d{3})+|\d+)?(\.\d*)?([eE][-+]?\d{1,4})?(%?)")
MAGNITUDE = 60  # powers of ten up to which a number is written out


def check_pattern(pattern: str, place: str) -> re.Pattern[str]:
    """Compile a regular expression of the user's. Raises UserError that names the key."""
    try:
        return re.compile(pattern, re.MULTILINE)
    except (re.error, OverflowError) as error:
        raise UserError(f"{place}={pattern!r}: no regular expression: {error}") from None


class AnswerRule:
    """How the answer is found in a text: the last match of `pattern`, its group 1 where it has one; "" is all of it."""

    def __init__(self, pattern: str):
        self._pattern = check_pattern(pattern, "answer") if pattern else None

    def find(self, text: str) -> str | None:
        """The answer, normalised; None where the pattern does not occur."""
        if self._pattern is not None:
            found = deque(self._pattern.finditer(text), maxlen=1)
            if not found:
                return None
            text = found[0].group(1 if self._pattern.groups else 0) or ""
        return normalise(text)

    def same(self, answer: str | None, targets: Iterable[str]) -> bool:
        """Whether an answer that `find` gave is one of the targets, which are searched by the rule themselves.

        A target without a match of the pattern counts as a whole.
        """
        return answer is not None and any(answer == (self.find(t) or normalise(t)) for t in targets)


def normalise(text: str) -> str:
    """One spelling for answers that mean the same: numbers by value (1,234.50 is 1234.5, $3 is 3, 50% stays a
    percentage), other text in lower case with single spaces and without a full stop at the end."""
    text = " ".join(text.split()).strip()
    bare = text.rstrip(".")
    found = _NUMBER.fullmatch(bare)
    if found and (found[2] or len(found[3] or "") > 1):
        value = Decimal(f"{found[1]}{(found[2] or '0').replace(',', '')}{found[3] or ''}{found[4] or ''}")
        if not value:
            return f"0{found[5]}"
        if abs(value.adjusted()) <= MAGNITUDE:
            whole, point, rest = f"{value:f}".partition(".")  # unlike `normalize`, this rounds nothing
            rest = rest.rstrip("0")
            return f"{whole}{point if rest else ''}{rest}{found[5]}"
    return bare.casefold().strip()
