"""Whether a response about words is right: filters.check of the recipe. What it does not understand is not right."""

import re


def check(instruction: str, response: str) -> bool:
    found = re.fullmatch(r"(Double|Invert) the word (\w+)\.", instruction)
    if found is None:
        return False
    kind, word = found.groups()
    return response == (f"{word} {word}" if kind == "Double" else word[::-1])
