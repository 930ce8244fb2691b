"""YAML for people: plain scalars mean what they look like, and hostile files are refused early.

PyYAML follows YAML 1.1, where `no` is false, `1:30` is ninety and `1e-4` is text. The loader here resolves plain
scalars by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema) and additionally refuses
duplicate keys, tags, large files, deep nesting and aliases that would expand to a large document.
"""

import re
from typing import Any, ClassVar

import yaml

from moe_dist.errors import UserError

MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_NODES = 100_000


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


_SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
]
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    text = loader.construct_scalar(node)
    for prefix, base in (("0o", 8), ("0x", 16)):
        if text.startswith(prefix):
            return int(text[2:], base)
    return int(text, 10)  # "010" is ten in YAML 1.2, not eight


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    seen = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        name = key_node.value
        if not isinstance(name, str):
            raise UserError(f"line {key_node.start_mark.line + 1}: a key has to be a word, not a list or a mapping")
        if name in seen:
            raise UserError(f"line {key_node.start_mark.line + 1}: key {name!r} was given before in line {seen[name]}")
        seen[name] = key_node.start_mark.line + 1
    loader.flatten_mapping(node)
    # Keys stay text: layer `3` and key `on` are names, whatever their scalars would mean as values.
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse(text: str, *, origin: str) -> Any:
    """The value of a YAML document: dicts with text keys, lists, str, int, float, bool, None.

    origin: what to call the text in messages (a path, or the override that it came from).
    Raises UserError with the line for anything that is not plain, small YAML.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise UserError(f"{origin}: larger than {MAX_BYTES:,} bytes; this is no configuration")
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: {str(error).splitlines()[0]}") from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, origin)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{origin}, line {mark.line + 1}" if mark else origin
        raise UserError(f"{place}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: {error}") from None
    except RecursionError:
        raise UserError(f"{origin}: nested too deeply") from None
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(origin) else f"{origin}, {message}") from None
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None
    finally:
        loader.dispose()


def _check_size(root: yaml.Node, origin: str) -> None:
    """Refuse documents that are deep, circular, or large once their aliases are expanded."""
    expanded: dict[int, int] = {}  # node id -> number of nodes under it with every alias written out
    path: set[int] = set()

    def count(node: yaml.Node, depth: int) -> int:
        line = node.start_mark.line + 1
        if depth > MAX_DEPTH:
            raise UserError(f"{origin}, line {line}: nested deeper than {MAX_DEPTH} levels")
        if id(node) in path:
            raise UserError(f"{origin}, line {line}: an alias refers to what contains it")
        if id(node) in expanded:
            return expanded[id(node)]
        path.add(id(node))
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        total = 1 + sum(count(child, depth + 1) for child in children)
        path.discard(id(node))
        if total > MAX_NODES:
            raise UserError(f"{origin}, line {line}: more than {MAX_NODES:,} values once aliases are expanded")
        expanded[id(node)] = total
        return total

    count(root, 0)
