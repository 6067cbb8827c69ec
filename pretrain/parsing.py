"""JSON and YAML of others: whatever is wrong with a text becomes a ValueError of one sentence.

Parsers raise more than their own errors: for thousands of nested brackets, for numbers of thousands of digits, for an
object as a key. In YAML a few lines of anchors can stand for billions of values. The content is not judged here.
"""

import json
from typing import Any

import yaml

MAX_YAML_NODES = 100_000  # with every alias written out; configurations have hundreds, their lists thousands
_MAX_DEPTH = 100


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text (bytes: UTF-8, -16 or -32).

    Raises:
        ValueError: it is no JSON, nests too deeply, or has a number that is too long.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0].partition("; use sys.")[0]) from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, of plain values only: a tag that would make an object is an error.

    Raises:
        ValueError: it is no YAML, has a tag, nests too deeply, or its anchors stand for more than `MAX_YAML_NODES`.
    """
    check_yaml(text)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # the latter: dates, keys and numbers
        raise ValueError(_first_line(error)) from error


def check_yaml(text: str) -> None:
    """Refuse a YAML text that would not be read as few plain values; errors as of `parse_yaml`."""
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(_first_line(error)) from error
    if root is not None and _count(root, {}, 0) > MAX_YAML_NODES:
        raise ValueError(f"its anchors stand for more than {MAX_YAML_NODES:,} values")


def _count(node: yaml.Node, known: dict[int, int | None], depth: int) -> int:
    """Nodes below and with this one, aliases written out."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if known[id(node)] is None:
            raise ValueError("an anchor holds itself")
        return known[id(node)]
    if depth > _MAX_DEPTH:
        raise ValueError("it nests too deeply")
    known[id(node)] = None
    parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_count(part, known, depth + 1) for part in parts)
    return known[id(node)]


def _first_line(error: Exception) -> str:
    """A parser's error in one line, with its place."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300] or type(error).__name__
