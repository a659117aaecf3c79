"""The swap test: does a rule follow the trusted rows? `python -m experiments.swap --seeds=8`.

The rows are ordinary ones, forbidden requests refused, and forbidden requests complied with. Half of the trusted rows are
ordinary; the other half refuse (A), or comply (B). Nothing else changes. A rule that follows ranks refused rows over complied ones
in A, and the other way round in B. The base either knows both kinds (`tiny`, pretrained on such rows) or neither (`tiny_base`).
Control: trusted rows of A and B with their responses shuffled, which say nothing about requests.
"""

import json
import pathlib
import tempfile

import numpy as np
from absl import flags

from bilevel_jax import cli
from bilevel_jax import selector as selection
from bilevel_jax.data.synthetic import bed as kinds
from bilevel_jax.data.synthetic import tasks
from bilevel_jax.runtime import metrics
from experiments import runs
from experiments.selection import candidates, counterfactual, judgement
from experiments.selection.retraining import Bed

FLAGS = flags.FlagValues()
SEEDS = flags.DEFINE_integer("seeds", 8, "Number of seeds.", lower_bound=1, flag_values=FLAGS)
FIRST = flags.DEFINE_integer("first_seed", 0, "The first seed.", lower_bound=0, flag_values=FLAGS)
WORKDIR = flags.DEFINE_string("workdir", "runs/swap", "Directory of the measurements.", flag_values=FLAGS)

ORDINARY, EACH, TRUSTED = 160, 120, 160
BASES = {"knows both": "tiny", "knows neither": "tiny_base"}
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


def make_bed(base: str, upper: list[dict], mixture: list[dict], folder: pathlib.Path, seed: int) -> Bed:
    config = counterfactual.bed_config(seed)
    config.model.path = f"bilevel_jax/{base}"
    config.optimizer.learning_rate = 2e-3 if base == "tiny" else config.optimizer.learning_rate
    for name, rows in (("upper", upper), ("lower", mixture)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        setattr(config.data, name, str(file))
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
        score = candidates.CANDIDATES[rule].score(bed, seed)
        logits = (score - score.mean()) / max(score.std(), 1e-30)
    weight = np.exp(logits - logits.max())
    return len(weight) * weight / weight.sum()


def measure(bed: Bed, rule: str, swap: str, seed: int) -> dict[str, float]:
    """AUROC of the rows like the trusted ones against their opposites, and the mean weight of each kind."""
    weight, kind = weights_of(bed, rule, seed), np.array([row.fields["kind"] for row in bed.setup.lower.rows])
    like, unlike = ("refused", "complied") if swap == "A" else ("complied", "refused")
    both = np.isin(kind, (like, unlike))
    means = {name: float(weight[kind == name].mean()) for name in ("ordinary", "refused", "complied")}
    return {"auroc": metrics.auroc(weight[both], kind[both] == like), "like": means[like], "unlike": means[unlike], **means}


def main() -> None:
    record = counterfactual.Record(pathlib.Path(WORKDIR.value, "swap.json"))
    seeds = range(FIRST.value, FIRST.value + SEEDS.value)
    lines = []
    for knows, base in BASES.items():
        rows = []
        for rule in RULES:
            entries = [rule]
            for swap, shuffled in (("A", False), ("B", False), ("A", True), ("B", True)):
                values = []
                for seed in seeds:

                    def one(seed=seed, swap=swap, shuffled=shuffled, rule=rule, base=base):
                        with tempfile.TemporaryDirectory() as folder:
                            bed = make_bed(base, *make_rows(base, swap, seed, shuffled), pathlib.Path(folder), seed)
                        return measure(bed, rule, swap, seed)

                    values.append(record.get(f"{base}/{rule}/{swap}/{shuffled}/{seed}", one))
                entries.append(judgement.interval([value["auroc"] for value in values]))
                if not shuffled:
                    entries.append(f"{np.mean([value['like'] for value in values]):.2f}")
            rows.append(entries)
        headings = ["rule", "A", "weight, refused", "B", "weight, complied", "A, shuffled", "B, shuffled"]
        lines += [f"The base {knows}:", "", *runs.markdown(headings, rows), ""]
    judgement.write("swap", "The swap test", [" ".join(__doc__.split("\n\n")[1].split()), "", *lines])


if __name__ == "__main__":
    cli.run(main, FLAGS)
