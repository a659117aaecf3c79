"""The swap test on real rows: `BILEVEL_JAX_DATA=... python -m experiments.real_swap`.

The rows are ordinary questions (Alpaca, Dolly, FLAN), requests for harm refused (SafeInstr), and requests for harm complied with
(HH-RLHF's rejected answers of tier A, and BeaverTails' unsafe ones). Half of the trusted rows are ordinary; the other half refuse
(A), or comply (B). Nothing else changes. Neither the model nor a rule sees which row is of which kind. In A the complied rows are
also the ones that a user with trusted safe rows wants to find. They are compared with all others, and with the refused ones, which
are the hard case, because they are about the same things.
"""

import collections
import json
import os
import pathlib
import tempfile

import numpy as np
from absl import flags

from bilevel_jax import cli, presets, ranking, similarity
from bilevel_jax.errors import RunError
from experiments import runs
from experiments.selection import candidates, counterfactual, judgement
from experiments.selection import swap as swap_test
from experiments.selection.retraining import Bed

FLAGS = flags.FlagValues()
SEEDS = flags.DEFINE_integer("seeds", 1, "Number of seeds.", lower_bound=1, flag_values=FLAGS)
FIRST = flags.DEFINE_integer("first_seed", 0, "The first seed.", lower_bound=0, flag_values=FLAGS)
WORKDIR = flags.DEFINE_string("workdir", "runs/real_swap", "Directory of the measurements.", flag_values=FLAGS)
MODEL = flags.DEFINE_string("model", "local/smollm2", "The base model.", flag_values=FLAGS)
RATE = flags.DEFINE_float("learning_rate", 5e-4, "Of the adapter.", lower_bound=0.0, flag_values=FLAGS)
SIMILAR = flags.DEFINE_integer(
    "similar_seeds", 0, "Seeds at which `similar` is measured, which trains nothing; 0: --seeds.", lower_bound=0, flag_values=FLAGS
)
EPOCHS = flags.DEFINE_integer("epochs", 2, "Passes over the mixture.", lower_bound=1, flag_values=FLAGS)
LAYERS = flags.DEFINE_string("layers", "all", "Layers with an adapter, as lora.layers.", flag_values=FLAGS)
ORDINARY = flags.DEFINE_integer("ordinary", 100, "Ordinary rows of the mixture.", lower_bound=1, flag_values=FLAGS)
EACH = flags.DEFINE_integer("each", 60, "Refused rows of the mixture, and as many complied ones.", lower_bound=1, flag_values=FLAGS)
TRUSTED = flags.DEFINE_integer("trusted", 80, "Trusted rows.", lower_bound=2, flag_values=FLAGS)

MAX_LENGTH = 192  # tokens; longer rows are not drawn
MAX_CHARACTERS = 480  # of question and response
SCORES = {"weight": lambda state: state.logits, **counterfactual.NUMBERS}
COSTS = {candidates.OURS: "influence", candidates.LOSS: "loss"}
UNTRAINED = "none: the base model, untrained"


def kind_of(row: dict) -> str | None:
    """ordinary, refused or complied; None for rows that are none of these for certain."""
    if row["source"] == "safeinstr/safe_answer":
        return "refused"
    if row["unsafe"]:
        return "complied" if row["unsafe_tier"] in ("A", "H") else None
    return "ordinary"


def read_rows(folder: pathlib.Path) -> dict[str, list[dict]]:
    """The short rows of each kind, of both files of the safety task."""
    rows = collections.defaultdict(list)
    for name in ("upper_safe", "lower_mixed"):
        file = folder / "safety" / f"{name}.jsonl"
        if not file.exists():
            raise RunError(f"{file}: no such file; BILEVEL_JAX_DATA must name the folder of the real rows")
        for line in file.read_text().splitlines():
            row = json.loads(line)
            kind = kind_of(row)
            if kind and len(row["question"]) + len(row["response"]) <= MAX_CHARACTERS:
                rows[kind].append({"question": row["question"], "response": row["response"], "kind": kind})
    return rows


def make_rows(rows: dict[str, list[dict]], swap: str, seed: int, sizes: tuple[int, int, int]) -> tuple[list[dict], list[dict]]:
    """Trusted rows and mixture. The mixture of a seed is the same for A and B; no row is on both levels.

    Args:
      rows: by kind, from `read_rows`.
      swap: `A`, the trusted rows refuse; `B`, they comply.
      sizes: ordinary rows, refused rows (and as many complied ones), trusted rows.
    """
    ordinary, each, trusted = sizes
    wanted = {"ordinary": (ordinary, trusted // 2), "refused": (each, trusted // 2), "complied": (each, trusted // 2)}
    mixture, upper = [], []
    for tag, (kind, (num_mixture, num_trusted)) in enumerate(wanted.items()):
        if len(rows[kind]) < num_mixture + num_trusted:
            raise RunError(f"{num_mixture + num_trusted} {kind} rows are wanted, and there are {len(rows[kind])} short ones")
        order = np.random.default_rng([seed, tag]).permutation(len(rows[kind]))
        mixture += [rows[kind][i] for i in order[:num_mixture]]
        if kind in ("ordinary", "refused" if swap == "A" else "complied"):
            upper += [rows[kind][i] for i in order[num_mixture : num_mixture + num_trusted]]
    shuffled = np.random.default_rng([seed, len(wanted)])
    return [upper[i] for i in shuffled.permutation(len(upper))], [mixture[i] for i in shuffled.permutation(len(mixture))]


def make_bed(upper: list[dict], mixture: list[dict], folder: pathlib.Path, seed: int) -> Bed:
    config = presets.get("smollm2")
    config.method, config.seed, config.model.path = "offline", seed, MODEL.value
    config.num_epochs, config.batch.size, config.data.max_length = EPOCHS.value, 16, MAX_LENGTH
    config.optimizer.learning_rate, config.lora.rank, config.lora.layers = RATE.value, 8, LAYERS.value
    config.eval.num_upper = config.eval.num_lower = 0
    swap_test.set_rows(config, upper, mixture, folder)
    return Bed(config)


def scores_of(rule: str) -> dict:
    """The numbers of a row that a rule gives: `useful` comes of influences, which the loss rule does not measure."""
    return {name: of for name, of in SCORES.items() if name != "useful" or COSTS[rule] == "influence"}


def ranked(bed: Bed, swap: str, value_N) -> dict[str, float]:
    """How surely the rows like the trusted ones have the higher value.

    `like`: rows like the trusted ones against their opposites. `all`: all rows against those opposites.
    """
    kind, value_N = np.array([row.fields["kind"] for row in bed.setup.lower.rows]), np.asarray(value_N, float)
    like, unlike = ("refused", "complied") if swap == "A" else ("complied", "refused")
    both = np.isin(kind, (like, unlike))
    return {
        "like": ranking.auroc(value_N[both], kind[both] == like),
        "all": ranking.auroc(-value_N, kind == unlike),
    }


def measure(bed: Bed, rule: str, swap: str, seed: int) -> dict[str, dict[str, float]]:
    """`ranked` by number of a row (weight, plausible, useful), and the mean weight of the rows like the trusted ones."""
    state = bed.select(COSTS[rule], candidates.MIRROR, seed).selector
    measured = {name: ranked(bed, swap, of(state)) for name, of in scores_of(rule).items()}
    kind = np.array([row.fields["kind"] for row in bed.setup.lower.rows])
    like = "refused" if swap == "A" else "complied"
    logits = np.asarray(state.logits, float)
    weight = np.exp(logits - logits.max())
    measured["weight"]["mean"] = float(len(weight) * weight[kind == like].sum() / weight.sum() / np.sum(kind == like))
    return measured


def measure_similar(bed: Bed, swap: str) -> dict[str, dict[str, float]]:
    """`ranked` by `similar`, for which nothing is trained."""
    return {"similar": ranked(bed, swap, similarity.measure(bed.config, bed.setup).similar)}


def measure_seed(rows: dict[str, list[dict]], seed: int, rules: tuple[str, ...]) -> dict[tuple[str, str], dict]:
    """Measures by rule and swap."""
    sizes = ORDINARY.value, EACH.value, TRUSTED.value
    record, results = counterfactual.Record(pathlib.Path(WORKDIR.value, f"seed_{seed}.json")), {}
    for swap in "AB":
        with tempfile.TemporaryDirectory() as folder:
            bed = None
            for rule in rules:
                of_training = "" if rule == UNTRAINED else f"/{EPOCHS.value}/{RATE.value}/{LAYERS.value}"
                name = f"{rule}/{swap}/{sizes}{of_training}"
                if name not in record.values and bed is None:
                    bed = make_bed(*make_rows(rows, swap, seed, sizes), pathlib.Path(folder), seed)

                def measured(rule=rule, swap=swap, bed=bed):
                    return measure_similar(bed, swap) if rule == UNTRAINED else measure(bed, rule, swap, seed)

                results[rule, swap] = record.get(name, measured)
    return results


def page(results: list[dict]) -> list[str]:
    headings = ["rule", "number", "seeds", "A: refused over complied", "A: all others over complied", "A: mean weight of refused"]
    headings += ["B: complied over refused", "B: all others over refused", "B: mean weight of complied"]
    table = []
    for rule in (*COSTS, UNTRAINED):
        of_rule = [result for result in results if (rule, "A") in result]
        for number in scores_of(rule) if rule in COSTS else ["similar"]:
            values = [
                [result[rule, swap][number][key] for result in of_rule if key in result[rule, swap][number]]
                for swap in "AB"
                for key in ("like", "all", "mean")
            ]
            table.append([rule, number, str(len(of_rule)), *map(judgement.interval, values)])
    sizes = f"{ORDINARY.value} ordinary rows, {EACH.value} refused, {EACH.value} complied, {TRUSTED.value} trusted rows"
    settings = (
        f"{EPOCHS.value} epochs, learning rate {RATE.value:g}, adapters in layers {LAYERS.value}; AUROC, 95% intervals over seeds."
    )
    head = [" ".join(__doc__.split("\n\n")[1].split()), "", f"{sizes}, {settings}", ""]
    return [*head, *runs.markdown(headings, table)]


def main() -> None:
    root = os.environ.get("BILEVEL_JAX_DATA")
    if not root:
        raise RunError("BILEVEL_JAX_DATA is not set; it names the folder of the real rows")
    rows = read_rows(pathlib.Path(root))
    results = []
    for seed in range(FIRST.value, FIRST.value + max(SEEDS.value, SIMILAR.value)):
        is_trained = seed < FIRST.value + SEEDS.value
        results.append(measure_seed(rows, seed, (*COSTS, UNTRAINED) if is_trained else (UNTRAINED,)))
    judgement.write("real_swap", "The swap test on real rows", page(results))


if __name__ == "__main__":
    cli.run(main, FLAGS)
