"""Writes pages of statements: modules with TITLE, VERDICT, measure(), paragraph(values) and draw(figure, values)."""

import pathlib
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType

import numpy as np


def prose(text: str) -> str:
    """Wraps the paragraphs again, since inserted numbers change their line lengths; tables are left as they are."""
    fill = textwrap.TextWrapper(130, break_long_words=False, break_on_hyphens=False).fill
    return "\n\n".join(part if part.startswith("|") else fill(part) for part in text.split("\n\n"))


def write(out: pathlib.Path, package: str, title: str, problems: str, modules: Sequence[ModuleType]) -> dict[str, dict]:
    """Writes the page OUT.md with its figures in OUT/, and prints the verdicts.

    Args:
      out: the directory of the figures.
      package: package of the command that the page shows, followed by the flags of this process.
      problems: description of the problems, above the verdicts.
      modules: one for each statement.

    Returns:
      The result of each `measure()`, by module name.
    """
    import matplotlib
    import tqdm
    from matplotlib.figure import Figure

    from bilevel_jax import files

    out.mkdir(parents=True, exist_ok=True)
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--out")]
    command = " ".join([f"python -m {package}", *arguments])
    measured, sections, verdicts = {}, [], ["| statement | verdict |", "| --- | --- |"]
    for module in tqdm.tqdm(modules, unit="statement"):
        name = module.__name__.rpartition(".")[2]
        values = measured[name] = module.measure()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
            figure = Figure(figsize=(8, 3.2), layout="constrained")
            module.draw(figure, values)
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        verdicts.append(f"| {module.TITLE} | {module.VERDICT} |")
        sections += [f"## {module.TITLE}", "", f"Verdict: **{module.VERDICT}**.", "", prose(module.paragraph(values)), ""]
        sections += [f"![{module.TITLE}]({out.name}/{name}.svg)", ""]
    head = [f"# {title}", "", f"`{command}`", "", prose(problems), "", *verdicts, ""]
    files.write_atomically(out.parent / f"{out.name}.md", "\n".join([*head, *sections]).rstrip() + "\n")
    print("\n".join(verdicts))
    return measured


def plain(value):
    """Converts to JSON types: floats rounded to four digits, without `curves`, which only the figures use."""
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if key != "curves"}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    return float(f"{value:.4g}") if isinstance(value, (float, np.floating)) else value
