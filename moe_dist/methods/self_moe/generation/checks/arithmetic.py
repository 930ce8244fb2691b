"""Every equation of numbers in a response, such as 3 * (4 + 5) = 27, is right to the digits that are written.

A response without an equation passes.
"""

import re

NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
TERM = rf"[-+(\s$]*{NUMBER}[)\s%]*"
END = r"(?![\w%]|[.,]\d|\s*[-+*/x×÷^(]\s*[\d$(])"  # noqa: RUF001 - the right side is a whole number and nothing more
EQUATION = re.compile(rf"(?<![\w.)=])({TERM}(?:[-+*/x×÷]{TERM})+)=\s*([-+]?\s*\$?{NUMBER}){END}")  # noqa: RUF001
LONGEST = 200  # characters


def check(instruction: str, response: str) -> bool:
    for left, right in EQUATION.findall(response):
        shown = re.sub(r"[\s$,]", "", right)
        left = re.sub(r"[\s$,]", "", left).replace("%", "/100").replace("÷", "/")
        left = re.sub(r"[x×]", "*", left)  # noqa: RUF001
        if len(left) > LONGEST or left.count("(") != left.count(")") or "**" in left:
            continue  # part of something else
        decimals = len(shown.partition(".")[2])
        try:
            if abs(eval(left) - float(shown)) > 0.5000001 * 10**-decimals:
                return False
        except (SyntaxError, ZeroDivisionError):
            continue
    return True
