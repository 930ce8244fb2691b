"""Whether a response about letters is right: filters.check of the recipe. What it does not understand is not right."""

import re


def check(instruction: str, response: str) -> bool:
    found = re.fullmatch(r"(Reverse|Sort) the letters ([a-z ]+)\.", instruction)
    if found is None:
        return False
    kind, letters = found[1], found[2].split()
    return response == f"They are {' '.join(letters[::-1] if kind == 'Reverse' else sorted(letters))}"
