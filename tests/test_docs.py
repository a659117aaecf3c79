"""The documents against the code: links, anchors, commands, flags and configuration keys."""

import importlib
import importlib.util
import json
import pathlib
import re
import shlex
import sys

import pytest
from absl import flags

from bilevel_jax import checks, config
from bilevel_jax.__main__ import MODULES

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/README.md", "bilevel_jax/tiny/README.md")
    ),
    *sorted((ROOT / "experiments").glob("*/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
KEYS = set(checks.keys(config.default()))
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}
PLACEHOLDERS = {"bilevel_jax.NAME", "KEY"}
PARAMETERS = {"model.embed_tokens", "model.layers", "model.norm"}  # of Hugging Face models, not keys of the section `model`
NOT_FLAGS = {"help", "verbosity"}  # absl's

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_outside_code(page: pathlib.Path) -> str:
    """The page without fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S))


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: pathlib.Path) -> list[str]:
    """The relative targets of links and images."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text_outside_code(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def commands(page: pathlib.Path) -> list[tuple[str, list[str]]]:
    """The `python -m MODULE ...` and `bilevel-jax NAME ...` commands of a page: (module, arguments)."""
    text = re.sub(r"\s*\\\n\s*", " ", page.read_text())  # joins continued lines
    text = re.sub(r"`([^`\n]*)\n([^`\n]*)`", r"`\1 \2`", text)  # and code spans over two lines
    result = re.findall(r"python -m ([\w.]+)([^`\n]*)", text)
    result += [
        (MODULES.get(name, f"bilevel_jax.{name}"), rest) for name, rest in re.findall(r"bilevel-jax ([\w-]+)([^`\n]*)", text)
    ]
    return [(module, arguments(rest)) for module, rest in result if module not in PLACEHOLDERS]


def arguments(rest: str) -> list[str]:
    """The words of a command line, up to a comment, a pipe or prose."""
    words = shlex.split(rest.replace("...", ""), comments=True) if rest.count("'") % 2 == 0 else rest.split()
    return [word for word in words if word.startswith("--")]


def flags_of(module: str) -> set[str]:
    """The names of the flags that a command defines, its config's keys left out."""
    spec = importlib.util.find_spec(module)
    name = f"{module}.__main__" if spec.submodule_search_locations is not None else module
    source = pathlib.Path(importlib.util.find_spec(name).origin).read_text()
    if options := re.findall(r'add_argument\("--([\w-]+)"', source):  # argparse, for what needs PyTorch
        return set(options)
    holders = [value for value in vars(importlib.import_module(name)).values() if isinstance(value, flags.FlagValues)]
    for imported in re.findall(r"cli\.run\(main, (.*)\)", source):  # such as `tables.FLAGS`
        for expression in imported.split(","):
            holder = sys.modules[name]
            for part in expression.strip().lstrip("*").split("."):
                holder = getattr(holder, part)
            holders.append(holder)
    return {flag for holder in holders if isinstance(holder, flags.FlagValues) for flag in holder}


@pages
def test_every_relative_link_and_anchor_exists(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.relative_to(ROOT)}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.relative_to(ROOT)}: {target} is no heading of {linked.name}"


@pages
def test_every_command_exists_and_has_the_flags_that_are_shown(page):
    for module, words in commands(page):
        if module == "pytest":
            continue
        assert importlib.util.find_spec(module), f"{page.relative_to(ROOT)}: python -m {module}"
        names = [re.match(r"--([\w-]+)", word)[1] for word in words]
        if names:
            known = flags_of(module) | NOT_FLAGS
            known |= {"no" + name for name in known}
            assert set(names) <= known, f"{page.relative_to(ROOT)}: python -m {module}: {sorted(set(names) - known)}"


@pages
def test_every_configuration_key_exists(page):
    text = page.read_text()
    named = re.findall(r"--config\.([\w.]+)=", text)
    named += re.findall(r"--set[= ]\"?([\w.]+)=", text)
    spans = re.findall(r"`([a-z_]+\.[a-z_]+)(?:=[^`]*)?`", text)
    named += [span for span in spans if span.split(".")[0] in SECTIONS and not is_code(span)]
    unknown = set(named) - KEYS - PLACEHOLDERS - PARAMETERS
    assert not unknown, f"{page.relative_to(ROOT)}: {sorted(unknown)}"


def test_the_options_of_other_libraries_are_mapped_to_keys():
    """In the tables of docs/coming_from.md whose last column is `here`, its code names keys, flags, commands, values or fields."""
    text = (ROOT / "docs" / "coming_from.md").read_text()
    tables = re.findall(r"^\|.*\| here \|\n\|[-| ]+\|\n((?:\|.*\|\n)+)", text, flags=re.M)
    spans = [span for table in tables for line in table.splitlines() for span in re.findall(r"`([^`]+)`", line.split(" | ")[-1])]
    named = {span.partition("=")[0] for span in spans if re.fullmatch(r"[a-z_]+(\.[a-z_]+)*(=.*)?", span)}
    values = {
        "auto",
        "finetune",
        "adamw",
        "sgd",
        "all-linear",
        "near",
        "ipo",
        "model",
        "linear",
        "cosine",
    }  # of keys, and an argument of `select`
    assert named - values <= KEYS, sorted(named - values - KEYS)
    assert len(tables) == 4 and len(named & KEYS) > 25


def is_code(span: str) -> bool:
    """Whether `online.masked_rows` and the like names something in a module that is called as a section is."""
    module, _, name = span.partition(".")
    path = f"bilevel_jax.{module}"
    if importlib.util.find_spec(path) is None:
        return False
    return name == "py" or hasattr(importlib.import_module(path), name)


@pages
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"(?:`|^ {4})make ([a-z][\w-]*)", page.read_text(), flags=re.M))
    assert named <= targets, f"{page.relative_to(ROOT)}: {sorted(named - targets)}"


def test_the_configuration_page_is_current():
    spec = importlib.util.spec_from_file_location("configuration_page", ROOT / "docs" / "configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "configuration.md").read_text() == module.page(), "run `python docs/configuration.py`"


def test_the_checks_see_something():
    readme, hardware = ROOT / "README.md", ROOT / "docs" / "hardware.md"
    assert len(links(readme)) > 20 and "experiments/selection/README.md#which-ranking-to-use-when" in links(readme)
    assert ("bilevel_jax.main", ["--config=configs/safety.py:llama3-8b", "--plan"]) in [
        (module, words[:2]) for module, words in commands(hardware)
    ]
    assert {"config", "workdir", "plan", "compile"} <= flags_of("bilevel_jax.main") and "tier" in flags_of("experiments.table3")
    assert "which-ranking-to-use-when" in anchors(ROOT / "experiments" / "selection" / "README.md")
    assert is_code("online.masked_rows") and not is_code("online.ratio")


def test_the_table_of_compiled_memory_is_current():
    spec = importlib.util.spec_from_file_location("hardware_page", ROOT / "docs" / "hardware.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = module.table(json.loads(module.RESULTS.read_text()))
    assert f"{module.BEGIN}\n{table}\n{module.END}" in module.PAGE.read_text(), "run `python docs/hardware.py --table`"
