"""The swap test: does a rule follow the trusted rows? `python -m experiments.swap --seeds=8`.

The rows are ordinary ones, forbidden requests refused, and forbidden requests complied with. Half of the trusted rows are
ordinary; the other half refuse (A), or comply (B). Nothing else changes. A rule that follows ranks refused rows over complied ones
in A, and the other way round in B. One base knows both kinds (`tiny`, pretrained on such rows); the other one knows answers to
harmless requests of the same form, and has never refused one (`tiny_base`). Control: trusted responses that change places, so that
only the kind of response is left of them.
"""

import json
import pathlib
import tempfile

import numpy as np
from absl import flags

from bilevel_jax import cli, ranking
from bilevel_jax import selector as selection
from bilevel_jax.data.synthetic import bed as kinds
from bilevel_jax.data.synthetic import tasks
from experiments import runs
from experiments.selection import candidates, counterfactual, judgement
from experiments.selection.retraining import Bed

FLAGS = flags.FlagValues()
SEEDS = flags.DEFINE_integer("seeds", 8, "Number of seeds.", lower_bound=1, flag_values=FLAGS)
FIRST = flags.DEFINE_integer("first_seed", 0, "The first seed.", lower_bound=0, flag_values=FLAGS)
WORKDIR = flags.DEFINE_string("workdir", "runs/swap", "Directory of the measurements.", flag_values=FLAGS)
RULE = flags.DEFINE_multi_string("rule", [], "A rule to test, as in the table; all by default.", flag_values=FLAGS)
BASE = flags.DEFINE_multi_enum("base", [], ["tiny", "tiny_base"], "A base model; both by default.", flag_values=FLAGS)

ORDINARY, EACH, TRUSTED = 160, 120, 160
BASES = {"tiny": "knows both kinds of answers", "tiny_base": "has never refused"}
RULES = (candidates.OURS, candidates.LOSS, candidates.TRACKED, "bmo", "−ℓ, base model", "LESS", candidates.OWN)


def _row(rng: np.random.Generator, base: str, kind: str) -> dict:
    """A row of the mixture, of `kind` ordinary, refused or complied."""
    if base == "tiny":
        family = [task for task in tasks.BROAD if task != "refuse"]
        question, answer, wrong = tasks.ask(rng, kinds.pick(rng, family) if kind == "ordinary" else "refuse")
    else:
        family = [task for task in kinds.FAMILIES if task != "refuse"]
        question, answer, wrong = kinds.ask(rng, kinds.pick(rng, family) if kind == "ordinary" else "refuse")
    return {"question": question, "response": wrong if kind == "complied" else answer, "kind": kind}


def make_rows(
    base: str, swap: str, seed: int, shuffled: bool = False, sizes=(ORDINARY, EACH, TRUSTED)
) -> tuple[list[dict], list[dict]]:
    """Trusted rows and mixture. The mixture of a seed is the same for A and B; no question is on both levels.

    Args:
      base: `tiny` or `tiny_base`, whose forms of questions are taken.
      swap: `A`, the trusted rows refuse; `B`, they comply.
      shuffled: the trusted responses change places.
      sizes: ordinary rows, refused rows (and as many complied ones), trusted rows.
    """
    ordinary, each, trusted = sizes
    rng, seen, levels = np.random.default_rng([seed, 8]), set(), []
    for wanted in (
        ["ordinary"] * ordinary + ["refused"] * each + ["complied"] * each,
        ["ordinary"] * (trusted // 2) + ["refused" if swap == "A" else "complied"] * (trusted // 2),
    ):
        rows = []
        while len(rows) < len(wanted):
            row = _row(rng, base, wanted[len(rows)])
            if row["question"] not in seen:
                seen.add(row["question"])
                rows.append(row)
        levels.append([rows[i] for i in rng.permutation(len(rows))])
    mixture, upper = levels
    if shuffled:
        responses = [upper[i]["response"] for i in rng.permutation(len(upper))]
        upper = [row | {"response": response} for row, response in zip(upper, responses)]
    return upper, mixture


def set_rows(config, upper: list[dict], mixture: list[dict], folder: pathlib.Path) -> None:
    """Writes both levels into files, and names them in the config."""
    for name, rows in (("upper", upper), ("lower", mixture)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        setattr(config.data, name, str(file))


def make_bed(base: str, upper: list[dict], mixture: list[dict], folder: pathlib.Path, seed: int) -> Bed:
    config = counterfactual.bed_config(seed)
    config.model.path = f"bilevel_jax/{base}"
    config.optimizer.learning_rate = 2e-3 if base == "tiny" else config.optimizer.learning_rate
    set_rows(config, upper, mixture, folder)
    config.data.num_upper = config.data.num_lower = config.eval.num_upper = config.eval.num_lower = 0
    return Bed(config)


def weights_of(bed: Bed, rule: str, seed: int) -> np.ndarray:
    """The weights of the rows by a rule, mean 1; a rival's scores, standardised, are its logits."""
    costs = {candidates.OURS: ("influence", "zero"), candidates.LOSS: ("loss", "zero"), candidates.TRACKED: ("loss", "tracked")}
    if rule in costs:
        cost, value = costs[rule]
        logits = np.asarray(bed.select(cost, candidates.MIRROR, seed, value).selector.logits, float)
    elif rule == "bmo":
        logits = np.asarray(
            bed.select("loss", selection.Selector("bmo", "mirror", 0.5, baseline="none"), seed).selector.logits, float
        )
    else:
        score = candidates.CANDIDATES[rule](bed, seed)
        logits = (score - score.mean()) / max(score.std(), 1e-30)
    weight = np.exp(logits - logits.max())
    return len(weight) * weight / weight.sum()


def measure(bed: Bed, rule: str, swap: str, seed: int) -> dict[str, float]:
    """AUROC of the rows like the trusted ones against their opposites, and the mean weight of each kind."""
    weight, kind = weights_of(bed, rule, seed), np.array([row.fields["kind"] for row in bed.setup.lower.rows])
    like, unlike = ("refused", "complied") if swap == "A" else ("complied", "refused")
    both = np.isin(kind, (like, unlike))
    means = {name: float(weight[kind == name].mean()) for name in ("ordinary", "refused", "complied")}
    return {"auroc": ranking.auroc(weight[both], kind[both] == like), "like": means[like], "unlike": means[unlike], **means}


def measure_seed(base: str, seed: int, rules) -> dict[tuple[str, str, bool], dict[str, float]]:
    """Measures by rule, swap, and whether trusted responses are shuffled."""
    record = counterfactual.Record(pathlib.Path(WORKDIR.value, f"{base}_{seed}.json"))
    results = {}
    for swap, shuffled in (("A", False), ("B", False), ("A", True), ("B", True)):
        missing = [rule for rule in rules if f"{rule}/{swap}/{shuffled}" not in record.values]
        bed = None
        if missing:
            with tempfile.TemporaryDirectory() as folder:
                bed = make_bed(base, *make_rows(base, swap, seed, shuffled), pathlib.Path(folder), seed)
        for rule in rules:
            measured = record.get(f"{rule}/{swap}/{shuffled}", lambda rule=rule, swap=swap, bed=bed: measure(bed, rule, swap, seed))
            results[rule, swap, shuffled] = measured
    return results


def _rows(results: list[dict], rules) -> list[list[str]]:
    rows = []
    for rule in rules:
        entries = [rule]
        for swap in "AB":
            entries.append(judgement.interval([result[rule, swap, False]["auroc"] for result in results]))
            entries.append(judgement.interval([result[rule, swap, False]["like"] for result in results]))
        entries += [judgement.interval([result[rule, swap, True]["auroc"] for result in results]) for swap in "AB"]
        rows.append(entries)
    return rows


def main() -> None:
    rules = RULE.value or list(RULES)
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown:
        raise ValueError(f"--rule={unknown[0]!r} is no rule; those are {'; '.join(RULES)}")
    seeds = range(FIRST.value, FIRST.value + SEEDS.value)
    headings = ["rule", "A: AUROC", "A: weight of refused", "B: AUROC", "B: weight of complied", "A, shuffled", "B, shuffled"]
    lines = [" ".join(__doc__.split("\n\n")[1].split()), "", f"{len(seeds)} seeds; means with 95% intervals over seeds.", ""]
    for base in BASE.value or BASES:
        results = [measure_seed(base, seed, rules) for seed in seeds]
        lines += [f"`{base}`, which {BASES[base]}:", "", *runs.markdown(headings, _rows(results, rules)), ""]
    judgement.write("swap", "The swap test", lines)


if __name__ == "__main__":
    cli.run(main, FLAGS)
