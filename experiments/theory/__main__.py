"""The paper's statements on problems whose solutions are known: `python -m experiments.theory`. Under a minute on one core."""

import pathlib
import sys
import textwrap

from absl import flags

from bilevel_jax import cli

OUT = flags.DEFINE_string("out", "experiments/results/theory", "Directory of the figures; the page is OUT.md beside it.")

PROBLEMS = """Unless said otherwise, θ is a point of the plane and a row's loss half its squared distance to a box: minimiser
sets are boxes, so optima are known exactly. Such a loss is the NLL of a softmax policy of two words whose right word has
probability e^-ℓ. Zero loss takes a logit of -∞; with finite logits Assumption 1 never holds, so all that rests on it is
about that limit."""


def prose(text: str) -> str:
    """Paragraphs filled again, since numbers have taken the places of their names; tables as they are."""
    fill = textwrap.TextWrapper(130, break_long_words=False, break_on_hyphens=False).fill
    return "\n\n".join(part if part.startswith("|") else fill(part) for part in text.split("\n\n"))


def main() -> None:
    import matplotlib
    import tqdm
    from matplotlib.figure import Figure

    from bilevel_jax import workspace
    from experiments.theory import lemma6, lemma7, lemma8, lemma9, theorem1, theorem2, theorem3, theorem4

    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m experiments.theory", *(a for a in sys.argv[1:] if not a.startswith("--out"))])
    lines, verdicts = [], ["| statement | verdict |", "| --- | --- |"]
    for module in tqdm.tqdm((lemma7, theorem1, theorem2, theorem3, theorem4, lemma6, lemma8, lemma9), unit="statement"):
        name = module.__name__.rpartition(".")[2]
        found = module.measure()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
            figure = Figure(figsize=(8, 3.2), layout="constrained")
            module.draw(figure, found)
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        verdicts.append(f"| {module.TITLE} | {module.VERDICT} |")
        lines += [f"## {module.TITLE}", "", f"Verdict: **{module.VERDICT}**.", "", prose(module.paragraph(found)), ""]
        lines += [f"![{module.TITLE}]({out.name}/{name}.svg)", ""]
    head = ["# The paper's statements on small problems", "", f"`{command}`", "", prose(PROBLEMS), "", *verdicts, ""]
    workspace.write_atomically(out.parent / f"{out.name}.md", "\n".join([*head, *lines]).rstrip() + "\n")
    print("\n".join(verdicts))


if __name__ == "__main__":
    cli.run(main)
