"""Writes docs/configuration.md from the dataclasses of `bilevel_jax/config.py`: `python docs/configuration.py`."""

import itertools
import pathlib

from bilevel_jax import config_keys

PAGE = pathlib.Path(__file__).with_suffix(".md")
HEAD = """# Configuration

A configuration file in `configs/` changes some of these defaults. `--config.KEY=VALUE` changes any key on the command line:

```
python -m bilevel_jax.main --config=configs/safety.py --config.method=offline --config.selection.optimizer=sgd
```

An unknown key, a wrong type or a combination that is not supported is refused before anything is loaded. `--help` lists all keys.

`python docs/configuration.py` writes this page from `bilevel_jax/config.py`.
"""


def table(keys: list[config_keys.Key]) -> list[str]:
    """The Markdown table of keys."""
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key in keys:
        default = f"`{key.default}`" if key.default != "" else "empty"
        lines.append(f"| `{key.name}` | {default} | {key.comment.replace('|', chr(92) + '|')} |")
    return lines


def page() -> str:
    """The page as Markdown."""
    lines = [HEAD]
    for section, keys in itertools.groupby(config_keys.read(), lambda key: key.section):
        lines += [*(["", f"## {section}", ""] if section else []), *table(list(keys))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
