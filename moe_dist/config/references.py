"""`${section.key}` in a configuration: a reference to another value of the same file, and nothing else.

Resolvers (`${oc.env:NAME}` and the like) are refused: a shared recipe must not be able to read the environment of
whoever runs it, where API keys live.
"""

import re
from typing import Any

from moe_dist.errors import UserError

MAX_TEXT = 100_000
_REFERENCE = re.compile(r"\$\{([A-Za-z0-9_.-]+)\}")


def resolve(tree: dict[str, Any], *, origin: str) -> dict[str, Any]:
    """`tree` with every reference replaced by the value that it names.

    A text that is one reference takes the type of the value; otherwise the value is written into the text. Raises
    UserError for resolvers, unknown keys, circles, references to whole sections, and results above MAX_TEXT.
    """
    done: dict[str, Any] = {}

    def value_at(path: str, asked: tuple[str, ...]) -> Any:
        if path in done:
            return done[path]
        if path in asked:
            raise UserError(f"{origin}: {' -> '.join([*asked, path])}: these values refer to each other in a circle")
        node: Any = tree
        for step in path.split("."):
            if isinstance(node, dict) and step in node:
                node = node[step]
            elif isinstance(node, list) and step.isdecimal() and int(step) < len(node):
                node = node[int(step)]
            else:
                raise UserError(f"{origin}: {asked[-1]}: ${{{path}}} refers to a key that does not exist")
        if isinstance(node, (dict, list)):
            raise UserError(f"{origin}: {asked[-1]}: ${{{path}}} refers to a whole section, not to a value")
        done[path] = expand(node, (*asked, path))
        return done[path]

    def expand(value: Any, asked: tuple[str, ...]) -> Any:
        if not isinstance(value, str) or "${" not in value:
            return value
        if "${" in _REFERENCE.sub("", value):
            raise UserError(
                f"{origin}: {asked[-1]}: only ${{section.key}} may be referred to; the environment and other "
                "resolvers cannot be read from a configuration"
            )
        whole = _REFERENCE.fullmatch(value)
        if whole:
            return value_at(whole[1], asked)
        text = _REFERENCE.sub(lambda match: str(value_at(match[1], asked)), value)
        if len(text) > MAX_TEXT:
            raise UserError(f"{origin}: {asked[-1]}: longer than {MAX_TEXT:,} characters once references are resolved")
        return text

    def walk(node: Any, place: str) -> Any:
        if isinstance(node, dict):
            return {name: walk(value, f"{place}.{name}" if place else name) for name, value in node.items()}
        if isinstance(node, list):
            return [walk(value, f"{place}.{index}") for index, value in enumerate(node)]
        return expand(node, (place,))

    return walk(tree, "")
