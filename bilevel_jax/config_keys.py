"""The configuration keys with their comments, read from the source of `config.py`.

The source is parsed and not imported, so that `--help` does not wait for JAX.
"""

import ast
import pathlib
from typing import NamedTuple

SOURCE = pathlib.Path(__file__).with_name("config.py")


class Key(NamedTuple):
    """A configuration key."""

    section: str  # "" for the keys outside of sections
    name: str  # full name
    type: str
    default: object
    comment: str


def _comment(lines: list[str], node: ast.AnnAssign) -> str:
    """The comment of a field: the lines above it, and the one behind it."""
    assert node.end_lineno is not None  # of source that was parsed
    first = node.lineno - 1
    while lines[first - 1].strip().startswith("#"):
        first -= 1
    above = [line.strip().lstrip("# ") for line in lines[first : node.lineno - 1]]
    behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip().lstrip("# ")  # offsets are of bytes
    return " ".join([*above, behind]).strip()


def read() -> list[Key]:
    """All keys, in the order of `config.Config`: first those outside of sections."""
    text = SOURCE.read_text(encoding="utf-8")
    lines = text.splitlines()
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}

    def keys(name: str, section: str) -> list[Key]:
        fields = [node for node in classes[name].body if isinstance(node, ast.AnnAssign)]
        direct, nested = [], []
        for node in fields:
            field = ast.unparse(node.target)
            if (kind := ast.unparse(node.annotation)) in classes:
                nested += keys(kind, field)
            else:
                assert node.value is not None  # every key has a default
                full_name = f"{section}.{field}".lstrip(".")
                direct.append(Key(section, full_name, kind, ast.literal_eval(node.value), _comment(lines, node)))
        return direct + nested

    return keys("Config", "")


def listing() -> str:
    """One line for each key as a flag, with type, default and comment, for `--help`."""
    return "\n".join(f"--config.{key.name}={key.default!r} ({key.type}): {key.comment}" for key in read())
