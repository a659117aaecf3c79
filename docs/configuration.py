"""Writes docs/configuration.md from the dataclasses of `bilevel_jax/config.py`: `python docs/configuration.py`."""

import ast
import dataclasses
import inspect
import pathlib

from bilevel_jax import config

PAGE = pathlib.Path(__file__).with_suffix(".md")
HEAD = """# Configuration

A configuration file in `configs/` changes some of these defaults. `--config.KEY=VALUE` changes any key on the command line:

```
python -m bilevel_jax.main --config=configs/safety.py --config.method=offline --config.selection.optimizer=sgd
```

An unknown key, a wrong type or a combination that is not supported is refused before anything is loaded.

`python docs/configuration.py` writes this page from `bilevel_jax/config.py`.
"""


def comments(cls) -> dict[str, str]:
    """The comment of each field: the lines above it, and the one behind it."""
    lines = inspect.getsource(cls).splitlines()
    fields = [node for node in ast.parse("\n".join(lines)).body[0].body if isinstance(node, ast.AnnAssign)]
    texts = {}
    for node in fields:
        first = node.lineno - 1
        while lines[first - 1].strip().startswith("#"):
            first -= 1
        above = [line.strip().lstrip("# ") for line in lines[first : node.lineno - 1]]
        behind = lines[node.end_lineno - 1][node.end_col_offset :].strip().lstrip("# ")
        texts[node.target.id] = " ".join([*above, behind]).strip()
    return texts


def table(cls, prefix: str) -> list[str]:
    """The Markdown table of the keys of one section; subsections are left out."""
    meaning = comments(cls)
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(field.type):
            default = f"`{field.default}`" if field.default != "" else "empty"
            lines.append(f"| `{prefix}{field.name}` | {default} | {meaning[field.name].replace('|', chr(92) + '|')} |")
    return lines


def page() -> str:
    """The page as Markdown."""
    lines = [HEAD, *table(config.Config, "")]
    for field in dataclasses.fields(config.Config):
        if dataclasses.is_dataclass(field.type):
            lines += ["", f"## {field.name}", "", *table(field.type, f"{field.name}.")]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
