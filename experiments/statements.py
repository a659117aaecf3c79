"""Pages of statements: each a module with TITLE, VERDICT, measure(), paragraph(found) and draw(figure, found)."""

import pathlib
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType

import numpy as np


def prose(text: str) -> str:
    """Paragraphs filled again, since numbers have taken the places of their names; tables as they are."""
    fill = textwrap.TextWrapper(130, break_long_words=False, break_on_hyphens=False).fill
    return "\n\n".join(part if part.startswith("|") else fill(part) for part in text.split("\n\n"))


def write(out: pathlib.Path, package: str, title: str, problems: str, modules: Sequence[ModuleType]) -> dict[str, dict]:
    """Writes the page OUT.md, its figures into OUT/, and prints the verdicts.

    Args:
      out: the directory of the figures.
      package: of the command that is printed at the top, with this process's flags.
      problems: what the problems are, above the verdicts.

    Returns:
      what each module measured, by its name.
    """
    import matplotlib
    import tqdm
    from matplotlib.figure import Figure

    from bilevel_jax import files

    out.mkdir(parents=True, exist_ok=True)
    command = " ".join([f"python -m {package}", *(a for a in sys.argv[1:] if not a.startswith("--out"))])
    measured, lines, verdicts = {}, [], ["| statement | verdict |", "| --- | --- |"]
    for module in tqdm.tqdm(modules, unit="statement"):
        name = module.__name__.rpartition(".")[2]
        found = measured[name] = module.measure()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
            figure = Figure(figsize=(8, 3.2), layout="constrained")
            module.draw(figure, found)
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        verdicts.append(f"| {module.TITLE} | {module.VERDICT} |")
        lines += [f"## {module.TITLE}", "", f"Verdict: **{module.VERDICT}**.", "", prose(module.paragraph(found)), ""]
        lines += [f"![{module.TITLE}]({out.name}/{name}.svg)", ""]
    head = [f"# {title}", "", f"`{command}`", "", prose(problems), "", *verdicts, ""]
    files.write_atomically(out.parent / f"{out.name}.md", "\n".join([*head, *lines]).rstrip() + "\n")
    print("\n".join(verdicts))
    return measured


def plain(value):
    """For JSON, floats to four digits; without `curves`, which are for the figures."""
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items() if key != "curves"}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    return float(f"{value:.4g}") if isinstance(value, (float, np.floating)) else value
