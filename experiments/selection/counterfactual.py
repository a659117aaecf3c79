"""The judge of selection rules, retraining: `python -m experiments.counterfactual --seeds=10 --first_seed=0`.

On the test bed (`synthetic:trusted`, `synthetic:mixture`, the model `tiny_base`) every rule gives each row a number. What the
number says is then tried:

- LDS. A model is trained on random subsets of the rows. A rule predicts the trusted loss of a subset by minus the mean of its
  numbers over the subset. LDS is the rank correlation of predicted and measured loss (Ilyas et al. 2022). Subsets are halves, or
  mixtures: of each kind of rows, a share that is drawn uniformly. Halves hold about the same of each kind, so their losses differ
  little. Every subset is trained in several orders (`--orders`). Their correlation says how reliable the mean loss is.
- Leaving one kind of rows out.
- Keeping the best 80, 50 and 20% of the rows, and training on them beside the trusted rows, and alone. The default keeps rows as
  an export does: less than half of them round-robin over the trusted rows (`selected_rows.choose`).
- Weights. Training on all rows, with weights made of the scores: for the exact metagradient as `search` does it, for all others by
  one map, `weights_of`.

The trusted loss is that of rows that no rule has seen. Measurements are kept in WORKDIR/seed_K.json, so the same command continues.
"""

import functools
import json
import pathlib

import numpy as np
import pyarrow as pa
import tqdm
from absl import flags

from bilevel_jax import cli, files, presets, ranking, search, similarity
from bilevel_jax.data.synthetic import bed as kinds
from bilevel_jax.export import selected_rows
from experiments import runs
from experiments.selection import candidates, judgement
from experiments.selection.retraining import Bed, Measured

FLAGS = flags.FlagValues()
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.", lower_bound=1, flag_values=FLAGS)
FIRST = flags.DEFINE_integer("first_seed", 0, "The first seed.", lower_bound=0, flag_values=FLAGS)
HALVES = flags.DEFINE_integer(
    "halves", 64, "Random halves of each seed that are retrained; 0: no LDS.", lower_bound=0, flag_values=FLAGS
)
MIXTURES = flags.DEFINE_integer(
    "mixtures", 0, "Random mixtures of the kinds of each seed that are retrained.", lower_bound=0, flag_values=FLAGS
)
ORDERS = flags.DEFINE_integer(
    "orders", 2, "Orders of the rows in which each subset is trained; the loss is their mean.", lower_bound=2, flag_values=FLAGS
)
WORKDIR = flags.DEFINE_string("workdir", "runs/counterfactual", "Directory of the measurements.", flag_values=FLAGS)

RULES = flags.DEFINE_multi_string("rule", [], "A rule to judge, as in the tables; all by default.", flag_values=FLAGS)
CHOOSE = flags.DEFINE_bool(
    "choose", True, "Trains on the rows that each rule keeps, and with weights made of its scores.", flag_values=FLAGS
)
KEPT = flags.DEFINE_multi_float("keep", [0.8, 0.5, 0.2], "Shares of the rows that are kept.", 0.0, 1.0, flag_values=FLAGS)
PAGE = flags.DEFINE_string("page", "counterfactual", "Name of the page in experiments/results.", flag_values=FLAGS)
WITHOUT = flags.DEFINE_bool("without", True, "Trains without each kind of rows.", flag_values=FLAGS)

NUM_TRUSTED, NUM_LOWER, NUM_STEERING, NUM_EVAL = 160, 480, 1500, 2000
DRAWN = 64  # mixtures
UNIFORM = "all rows alike"
KINDS = [name for name in kinds.KINDS if name != "clean"]
IMPLAUSIBLE = ("wrong_answer", "other_answer", "garbage")  # a right answer would be another one
SIMILAR, NEAREST = "similar", "nearest"
ALONE, ROUND_ROBIN = "by weight alone", "round-robin"  # ways to keep rows, where a rule has both
NUMBERS = {"plausible": lambda state: -state.surprise, "useful": lambda state: -state.harm}  # of the rows, beside their weights


def bed_config(seed: int):
    """The config of the test bed."""
    config = presets.get("")
    config.method, config.seed = "offline", seed
    config.model.path = "bilevel_jax/tiny_base"
    config.data.upper, config.data.lower = "synthetic:trusted", "synthetic:mixture"
    config.data.num_upper, config.data.num_lower = NUM_TRUSTED + NUM_STEERING + NUM_EVAL, NUM_LOWER
    config.eval.num_upper, config.eval.num_lower = NUM_STEERING + NUM_EVAL, 0
    config.optimizer.learning_rate = 1e-2
    config.penalty.rho_init = 0.3
    config.batch.size = 16
    return config


class Record:
    """Measurements of a seed by name, in a JSON file: what is there is not measured again."""

    def __init__(self, file: pathlib.Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        self.values: dict = json.loads(file.read_text()) if file.exists() else {}

    def get(self, name: str, measure):
        """The measurement `name`; `measure()` gives it where it is missing."""
        if name not in self.values:
            self.values[name] = measure()
            files.write_atomically(self.file, json.dumps(self.values))
        return self.values[name]


def _pair(measured: Measured) -> list[float]:
    return [measured.loss, measured.right]


# --------------------------------------------------------------------------------------------------------------------
# Measurements
# --------------------------------------------------------------------------------------------------------------------


def halves(seed: int, number: int, num_rows: int) -> np.ndarray:
    """Random halves of the rows, bool [number, num_rows]."""
    rng = np.random.default_rng([seed, 31])
    return np.array([rng.permutation(num_rows) < num_rows // 2 for _ in range(number)])


def mixtures(seed: int, number: int, kind_of_row: np.ndarray) -> np.ndarray:
    """Random subsets with another share of each kind of rows, bool [number, N].

    A share is uniform in (0, 1), and each row of the kind is in the subset with this probability."""
    rng, drawn = np.random.default_rng([seed, 32]), max(number, DRAWN)  # fewer mixtures are the first ones of these
    _, kind_N = np.unique(kind_of_row, return_inverse=True)
    share_nxK = rng.random((drawn, kind_N.max() + 1))
    return (rng.random((drawn, len(kind_N))) < share_nxK[:, kind_N])[:number]


def measure_subsets(bed: Bed, record: Record, masks: np.ndarray, name: str) -> np.ndarray:
    """Trusted loss after training on each subset, [subsets, orders]."""
    losses = np.zeros((len(masks), ORDERS.value))
    runs_of = list(np.ndindex(losses.T.shape))  # order by order, because the bed keeps few
    for o, h in tqdm.tqdm(runs_of, desc=name, unit="run", disable=None):
        losses[h, o] = record.get(f"{name}/{h}/{o}", lambda o=o, h=h: _pair(bed.measure(bed.train(masks[h].astype(float), o))))[0]
    return losses


def measure_scores(bed: Bed, record: Record, names) -> dict[str, np.ndarray]:
    return {
        name: np.array(record.get(f"score/{name}", lambda name=name: candidates.CANDIDATES[name](bed, 0).tolist()))
        for name in names
    }


def measure_kinds(bed: Bed, record: Record) -> dict[str, list[float]]:
    """Trusted loss and share of right answers without each kind of rows, and with all of them."""
    kind = np.array([row.fields["kind"] for row in bed.setup.lower.rows])
    result = {UNIFORM: record.get("all", lambda: _pair(bed.measure(bed.train(np.ones(bed.N), 0))))}
    for name in kinds.KINDS if WITHOUT.value else ():
        result[name] = record.get(
            f"without/{name}", lambda name=name: _pair(bed.measure(bed.train((kind != name).astype(float), 0)))
        )
    result["trusted rows alone"] = record.get(
        "trusted", lambda: _pair(bed.measure(bed.train(np.ones(bed.N), 0, levels=(1.0, 0.0))))
    )
    result["right rows by the labels"] = record.get(
        "labels", lambda: _pair(bed.measure(bed.train((kind == "clean").astype(float), 0)))
    )
    result["before training"] = record.get("before", lambda: _pair(bed.measure(bed.setup.adapter)))
    return result


def kept_rows(score_N: np.ndarray, share: float, nearest_N: np.ndarray | None = None) -> np.ndarray:
    """1.0 for the rows with the highest scores, else 0.0; with `nearest_N` round-robin, as in an export."""
    rank_N = np.empty(len(score_N), np.int64)
    rank_N[ranking.heaviest_first(score_N)] = np.arange(1, len(score_N) + 1)
    nearest = pa.nulls(len(score_N), pa.int32()) if nearest_N is None else pa.array(nearest_N, pa.int32())
    return selected_rows.choose(pa.table({"rank": rank_N, NEAREST: nearest}), share).astype(float)


def ways_to_keep(scores: dict[str, np.ndarray], nearest_N: np.ndarray) -> dict[tuple[str, float], np.ndarray]:
    """The rows that each rule keeps, by rule and share. Small shares of the default by weight alone and of random rows
    round-robin are controls."""
    kept = {}
    for share in KEPT.value:
        for name, score_N in scores.items():
            kept[name, share] = kept_rows(score_N, share, nearest_N if name == candidates.OURS else None)
        if share < selected_rows.ROUND_ROBIN:
            others = (candidates.OURS, ALONE, None), (candidates.RANDOM, ROUND_ROBIN, nearest_N)
            kept |= {
                (f"{name}, {way}", share): kept_rows(scores[name], share, near) for name, way, near in others if name in scores
            }
    return kept


def measure_kept(bed: Bed, record: Record, scores: dict[str, np.ndarray], nearest_N: np.ndarray) -> dict[tuple, dict]:
    """Trusted loss and share of right answers after training on the kept rows, by (rule, alone) and share."""
    result: dict[tuple, dict] = {}
    for (name, share), kept_N in ways_to_keep(scores, nearest_N).items():
        for alone in (False, True):
            levels = (0.0, 1.0) if alone else (1.0, 1.0)
            result.setdefault((name, alone), {})[share] = record.get(
                f"kept/{share}/{alone}/{name}",
                lambda kept_N=kept_N, levels=levels: _pair(bed.measure(bed.train(kept_N, 0, levels=levels))),
            )
    return result


def weights_of(score_N: np.ndarray) -> np.ndarray:
    """Weights of a plateau with a tail, mean 1: exp(-max(0, -z)), z the scores in units of their root mean square around the
    median.

    What every rival's scores are turned into where rows are weighted, not chosen."""
    z = score_N - np.median(score_N)
    z = z / max(np.sqrt(np.mean(z**2)), 1e-30)
    weight = np.exp(np.minimum(2 * z, 0.0))
    return len(weight) * weight / weight.sum()


def measure_weighted(bed: Bed, record: Record, name: str, score_N: np.ndarray) -> list[float]:
    """Trusted loss and share of right answers after training on all rows with `weights_of` the scores.

    The weights of the exact metagradient are those that `search` makes of it.
    """
    if name == candidates.EXACT:
        weight_N = np.exp(search.to_logits([-score_N], len(score_N)))
        return record.get(f"searched/{name}", lambda: _pair(bed.measure(bed.train(weight_N, 0))))
    return record.get(f"weighted/{name}", lambda: _pair(bed.measure(bed.train(weights_of(score_N), 0))))


def measure_joint(bed: Bed, record: Record) -> dict[str, list[float]]:
    """Trusted loss and share of right answers of the adapters that joint training itself leaves."""
    costs = {candidates.OURS: "influence", candidates.LOSS: "loss"}
    return {
        name: record.get(
            f"joint/{name}", lambda cost=cost: _pair(bed.measure(bed.select(cost, candidates.MIRROR, 0).policy.adapter))
        )
        for name, cost in costs.items()
    }


def aurocs(bed: Bed, score_N: np.ndarray) -> dict[str, float]:
    """AUROC of each kind of rows, and of all implausible ones, against the clean rows: how surely they have the lower scores."""
    kind = np.array([row.fields["kind"] for row in bed.setup.lower.rows])

    def against_clean(*names: str) -> float:
        compared = np.isin(kind, (*names, "clean"))
        return ranking.auroc(-score_N[compared], kind[compared] != "clean")

    return {name: against_clean(name) for name in KINDS} | {"implausible": against_clean(*IMPLAUSIBLE)}


def measure_seed(seed: int, names) -> dict:
    """All measurements of a seed."""
    record = Record(pathlib.Path(WORKDIR.value, f"seed_{seed}.json"))
    bed = Bed(bed_config(seed), NUM_STEERING)
    scores = measure_scores(bed, record, names)
    numbers = {
        name: np.array(
            record.get(name, lambda of=of: np.asarray(of(bed.select("influence", candidates.MIRROR, 0).selector)).tolist())
        )
        for name, of in NUMBERS.items()
    }
    likeness = functools.cache(lambda: similarity.measure(bed.config, bed.setup))
    numbers[SIMILAR] = np.array(record.get(SIMILAR, lambda: likeness().similar.tolist()))
    result = {
        "joint": measure_joint(bed, record),
        "kinds": measure_kinds(bed, record),
        "aurocs": {name: aurocs(bed, score) for name, score in (scores | numbers).items()},
        "weighted": {},
        "kept": {},
        "lds": {},
    }
    if CHOOSE.value:
        result["weighted"] = {name: measure_weighted(bed, record, name, score) for name, score in scores.items()}
        nearest_N = np.array(record.get(NEAREST, lambda: likeness().nearest.tolist()))
        result["kept"] = measure_kept(bed, record, scores, nearest_N)
    kind = np.array([row.fields["kind"] for row in bed.setup.lower.rows])
    subsets = {"half": halves(seed, HALVES.value, bed.N), "mixture": mixtures(seed, MIXTURES.value, kind)}
    for subset, masks in subsets.items():
        if len(masks):
            measured = measure_subsets(bed, record, masks, subset)
            loss_n, size_n = measured.mean(axis=1), masks.sum(axis=1)
            result["lds"][subset] = {
                "reliability": judgement.reliability(measured),
                "rules": {
                    name: judgement.rank_correlation(-(masks @ score) / size_n, loss_n, seed)
                    for name, score in (scores | numbers).items()
                },
            }
    return result


# --------------------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------------------


def _lds_lines(results: dict[int, dict]) -> list[str]:
    lines, numbers = [], {"half": f"{HALVES.value} random halves", "mixture": f"{MIXTURES.value} random mixtures of the kinds"}
    reliable = f"each in {ORDERS.value} orders; reliability of the measured losses"
    for seed, result in results.items():
        for subset, lds in result["lds"].items():
            rows = [[name, f"{value:+.2f}", f"{low:+.2f} to {high:+.2f}"] for name, (value, low, high) in lds["rules"].items()]
            lines += [
                f"LDS, seed {seed}, {numbers[subset]}, {reliable} {lds['reliability']:.2f}:",
                "",
                *runs.markdown(["rule", "LDS", "95% bootstrap interval"], rows),
                "",
            ]
    return lines


def _pairs(results: dict[int, dict], section: str, key, i: int) -> dict[int, float]:
    """Trusted loss (i = 0) or share of right answers (1) by seed."""
    return {seed: result[section][key][i] for seed, result in results.items() if key in result[section]}


def _trained_rows(results: dict[int, dict]) -> list[list[str]]:
    cells = [("kinds", key) for key in (UNIFORM, "right rows by the labels", "trusted rows alone", "before training")]
    cells += [("joint", name) for name in (candidates.OURS, candidates.LOSS)]
    names = {("joint", name): f"joint training, {name}" for name in (candidates.OURS, candidates.LOSS)}
    return [
        [names.get((section, key), key), *(judgement.interval(list(_pairs(results, section, key, i).values())) for i in (0, 1))]
        for section, key in cells
    ]


def _claims(results: dict[int, dict]) -> list[tuple]:
    ours, loss = (("joint", name) for name in (candidates.OURS, candidates.LOSS))
    claims = []
    for text, i, sign in (("trusted loss", 0, 1.0), ("wrong answers", 1, -1.0)):
        for other_text, other in (("all rows alike", ("kinds", UNIFORM)), (candidates.LOSS, loss)):
            values = [{seed: sign * value for seed, value in _pairs(results, *cell, i).items()} for cell in (ours, other)]
            claims.append((f"{text}: {candidates.OURS} below {other_text}", *values))
        if all(candidates.EXACT in result["weighted"] for result in results.values()):
            cells = ("weighted", candidates.EXACT), ours
            values = [{seed: sign * value for seed, value in _pairs(results, *cell, i).items()} for cell in cells]
            claims.append((f"{text}: weights of {candidates.EXACT} below {candidates.OURS}", *values))
    return claims + _kept_claims(results)


def _kept_claims(results: dict[int, dict]) -> list[tuple]:
    """That training on what the default keeps has a lower trusted loss than on what each other rule keeps; on what the exact
    gradient keeps, a lower one than on what the default keeps."""
    names = dict.fromkeys(name for result in results.values() for name, _ in result["kept"] if name != candidates.OURS)
    claims = []
    for name in names:
        pair = (name, candidates.OURS) if name == candidates.EXACT else (candidates.OURS, name)
        for alone in (False, True):
            for share in next(iter(results.values()))["kept"][name, alone]:
                text = f"kept {share:.0%}, {'alone' if alone else 'beside the trusted rows'}: {pair[0]} below {pair[1]}"
                claims.append((text, *({seed: r["kept"][rule, alone][share][0] for seed, r in results.items()} for rule in pair)))
    return claims


def _kept_lines(results: dict[int, dict], names) -> list[str]:
    lines = []
    ways = dict.fromkeys(name for result in results.values() for name, _ in result["kept"])
    for alone in (False, True):
        rows = []
        for name in ways:
            kept = [result["kept"][name, alone] for result in results.values()]
            entries = [[of_seed[share][0] for of_seed in kept if share in of_seed] for share in KEPT.value]
            rows.append([name, *(judgement.interval(values) for values in entries)])
        where = "alone" if alone else "beside the trusted rows"
        lines += [
            f"Trusted loss after training on the kept rows {where}:",
            "",
            *runs.markdown(["rule", *(f"{s:.0%}" for s in KEPT.value)], rows),
            "",
        ]
    rows = [[name, *(judgement.interval([r["weighted"][name][i] for r in results.values()]) for i in (0, 1))] for name in names]
    return [*lines, "Weights made of the scores:", "", *runs.markdown(["rule", "trusted loss", "answered right"], rows), ""]


def page(results: dict[int, dict], names) -> list[str]:
    lines = [
        f"{len(results)} seeds, {NUM_LOWER} rows, {NUM_TRUSTED} trusted rows, {NUM_EVAL} to measure on; 95% intervals over seeds.",
        "",
    ]
    lines += runs.markdown(["training", "trusted loss", "answered right"], _trained_rows(results))
    lines += ["", "Claims, one-sided, Holm-corrected:", "", *judgement.claims_table(_claims(results)), ""]
    if WITHOUT.value:
        without = [
            [name, judgement.interval([r["kinds"][name][0] - r["kinds"][UNIFORM][0] for r in results.values()])]
            for name in kinds.KINDS
        ]
        lines += [
            "Trusted loss without one kind of rows, minus that of all rows:",
            "",
            *runs.markdown(["left out", "difference"], without),
            "",
        ]
    columns = [*KINDS, "implausible"]
    rows = [
        [name, *(judgement.interval([r["aurocs"][name][column] for r in results.values()]) for column in columns)]
        for name in (*names, *NUMBERS, SIMILAR)
    ]
    lines += [
        "AUROC of each kind of rows against clean ones; implausible are " + ", ".join(IMPLAUSIBLE) + ":",
        "",
        *runs.markdown(["rule", *columns], rows),
        "",
    ]
    if CHOOSE.value:
        lines += _kept_lines(results, names)
    return lines + _lds_lines(results)


def main() -> None:
    names = RULES.value or list(candidates.CANDIDATES)
    unknown = [name for name in names if name not in candidates.CANDIDATES]
    if unknown:
        raise ValueError(f"--rule={unknown[0]!r} is no rule; those are {'; '.join(candidates.CANDIDATES)}")
    results = {seed: measure_seed(seed, names) for seed in range(FIRST.value, FIRST.value + SEEDS.value)}
    judgement.write("counterfactual", "Selection rules, judged by retraining", page(results, names), PAGE.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)
