"""Finds config files from any directory: `finetune`, `configs/finetune.py`, or any path; optionally with a tier, NAME:TIER."""

import difflib
import importlib.util
import pathlib

from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

PACKAGE = pathlib.Path(__file__).parent
FOLDERS = PACKAGE / "configs", PACKAGE.parent / "configs"  # in an installed package; in a copy of the repository


def names() -> list[str]:
    """The configs that come with the package."""
    return sorted({file.stem for folder in FOLDERS for file in folder.glob("*.py") if file.stem != "__init__"})


def resolve(name: str) -> str:
    """The path of a config file, with its tier.

    Args:
      name: a path, which takes precedence; or `NAME`, `NAME.py` or `configs/NAME.py` of a config that comes with the package.

    Raises:
      ValueError: it is neither; one line with the nearest name.
    """
    file, colon, tier = name.partition(":")
    path = pathlib.Path(file)
    if path.exists() and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"the config {file!r} is not a regular file; write its content to a file first")
        return name
    if path.parts[:-1] in ((), ("configs",)):
        for folder in FOLDERS:
            packaged = (folder / path.name).with_suffix(".py")
            if path.suffix in ("", ".py") and packaged.exists():
                return f"{packaged}{colon}{tier}"
    near = difflib.get_close_matches(path.stem, names(), 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"there is no config {file!r}{hint}; choose {', '.join(names())}, or name a file")


def load(name: str) -> ConfigDict:
    """The config of a file.

    Args:
      name: as for `resolve`.

    Raises:
      ValueError: there is no such config or tier.
    """
    file, _, tier = resolve(name).partition(":")
    spec = importlib.util.spec_from_file_location(f"bilevel_jax_config_{pathlib.Path(file).stem}", file)
    assert spec and spec.loader  # of a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*[tier] if tier else [])


class Parser(config_flags.ConfigFileFlagParser):
    """Parses the value of a config flag: finds the file, then does what ml_collections does."""

    def parse(self, path: str) -> ConfigDict:
        return super().parse(resolve(path))
