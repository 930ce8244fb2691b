"""The Python code of a response runs without an exception: its fenced blocks, or all of it where it has none."""

import re

FENCED = re.compile(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)```", re.DOTALL)


def check(instruction: str, response: str) -> bool:
    code = "\n".join(FENCED.findall(response)) or response
    exec(compile(code, "<response>", "exec"), {"__name__": "response"})
    return True
