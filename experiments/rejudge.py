"""Judges the claims of pages again, from the values that their JSON files store, without any run: `python -m experiments.rejudge`.

It replaces the table of claims and the rule above it, in every page of `experiments/results` that has one, and the claims of the
JSON file. All other text stays, with the commits of the runs.
"""

import importlib
import json
import pathlib
from collections.abc import Sequence

from absl import flags

from bilevel_jax import cli, files
from experiments import comparing, tables

FLAGS = flags.FlagValues()
RESULTS = flags.DEFINE_string("results", "experiments/results", "Directory of the pages.", flag_values=FLAGS)

COMMANDS = {"rivals": "baselines", "table3-bed": "bed"}  # pages whose command has another name
HEAD = "| claim | difference |"
RULE_START = "Claims: differences are paired over seeds"
NOTE = "Verdicts from the stored values, by `python -m experiments.rejudge`."


def read_results(record: dict) -> list[comparing.Results]:
    """The results of each task in the JSON file of a page."""

    def runs(by_seed: dict) -> dict[int, comparing.Run]:
        return {int(seed): comparing.Run(pathlib.Path(), values) for seed, values in by_seed.items()}

    return [
        comparing.Results(task, {cell: runs(by_seed) for cell, by_seed in by_cell.items()}, {}, [], record["commits"])
        for task, by_cell in record["cells"].items()
    ]


def claims_of(module, record: dict, results: Sequence[comparing.Results]) -> list[list[comparing.Claim]]:
    """The claims of each table of claims on a page: those in its JSON file, or else those that its command makes by task."""
    if record["claims"]:
        return [[comparing.Claim(**{key: claim[key] for key in comparing.Claim._fields}) for claim in record["claims"]]]
    return [list(module.claims_of(group)) for group in results]


def rejudged(page: str, tables_of_claims: Sequence[Sequence[str]]) -> str:
    """The page with these tables of claims, in their order, and the current rule.

    Raises:
      ValueError: the page has another number of tables of claims.
    """
    lines, kept, count = page.split("\n"), [], 0
    inside = False
    for line in lines:
        if line.startswith(HEAD):
            if count < len(tables_of_claims):
                kept += tables_of_claims[count]
            count, inside = count + 1, True
        elif line.startswith(RULE_START):
            kept.append(f"{comparing.RULE} {NOTE}" if NOTE in line or not line.startswith(comparing.RULE) else line)
        elif not (inside and line.startswith("|")):
            inside = False
            kept.append(line)
    if count != len(tables_of_claims):
        raise ValueError(f"the page has {count} tables of claims, its JSON file {len(tables_of_claims)}")
    return "\n".join(kept)


def judge_again(file: pathlib.Path, record: dict, results: Sequence[comparing.Results]) -> list[list[str]]:
    """The tables of claims of a page, given its JSON file and what that holds."""
    module = command_of(file)
    paper = getattr(module, "EFFECTS", None)
    return [comparing.verdicts(group, listed, paper) for group, listed in zip(results, claims_of(module, record, results))]


def command_of(file: pathlib.Path):
    """The module of the command that made a page."""
    name = file.stem if file.stem in COMMANDS else file.stem.partition("-")[0]
    return importlib.import_module(f"experiments.{COMMANDS.get(name, name)}")


def rejudge(file: pathlib.Path) -> bool:
    """Judges the claims of a page again, given its JSON file; returns whether it has any."""
    page, record = file.with_suffix(".md"), json.loads(file.read_text())
    if not page.exists() or HEAD not in page.read_text():
        return False
    results = read_results(record)
    files.write_atomically(page, rejudged(page.read_text(), judge_again(file, record, results)))
    if record["claims"]:
        module = command_of(file)
        [claims] = claims_of(module, record, results)
        record["claims"] = tables.tested_claims(results[0], claims, getattr(module, "EFFECTS", None))
        files.write_atomically(file, json.dumps(record, indent=1, allow_nan=True) + "\n")
    return True


def main() -> None:
    for file in sorted(pathlib.Path(RESULTS.value).glob("*.json")):
        if rejudge(file):
            print(file.with_suffix(".md"))


if __name__ == "__main__":
    cli.run(main, FLAGS)
