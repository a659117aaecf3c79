"""The judge of selection rules, retraining: `python -m experiments.counterfactual --seeds=10 --first_seed=0`.

On the test bed (`synthetic:trusted`, `synthetic:mixture`, the model `tiny_base`) every rule gives each row a number. What the number says
is then tried:

- LDS. A model is trained on random halves of the rows. A rule predicts the trusted loss of a half by minus the sum of its numbers over the
  half. LDS is the rank correlation of predicted and measured loss (Ilyas et al. 2022). Every half is trained in two orders; the
  correlation of the two measurements says how reliable one is.
- Leaving one kind of rows out.
- Keeping the best 80, 50 and 20% of the rows, and training on them beside the trusted rows, and alone.
- Weights. Training on all rows, weighted by the rule's own weights.

The trusted loss is that of rows that no rule has seen. Measurements are kept in WORKDIR/seed_K.json, so the same command continues.
"""

import json
import pathlib

import numpy as np
import scipy.stats
import tqdm
from absl import flags

from bilevel_jax import cli, files, presets
from bilevel_jax import selector as selection
from bilevel_jax.data.synthetic import bed as kinds
from bilevel_jax.runtime import metrics
from experiments.selection import candidates
from experiments.selection.retraining import Bed, Measured

FLAGS = flags.FlagValues()
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.", lower_bound=1, flag_values=FLAGS)
FIRST = flags.DEFINE_integer("first_seed", 0, "The first seed.", lower_bound=0, flag_values=FLAGS)
HALVES = flags.DEFINE_integer(
    "halves", 64, "Random halves of each seed that are retrained; 0: no LDS.", lower_bound=0, flag_values=FLAGS
)
WORKDIR = flags.DEFINE_string("workdir", "runs/counterfactual", "Directory of the measurements.", flag_values=FLAGS)

NUM_TRUSTED, NUM_LOWER, NUM_STEERING, NUM_EVAL = 200, 800, 2000, 5000
KEPT = (0.8, 0.5, 0.2)
ORDERS = (0, 1)
UNIFORM = "all rows alike"


def bed_config(seed: int):
    """The config of the test bed."""
    config = presets.get("")
    config.method, config.seed = "offline", seed
    config.model.path = "bilevel_jax/tiny_base"
    config.data.upper, config.data.lower = "synthetic:trusted", "synthetic:mixture"
    config.data.num_upper, config.data.num_lower = NUM_TRUSTED + NUM_STEERING + NUM_EVAL, NUM_LOWER
    config.eval.num_upper, config.eval.num_lower = NUM_STEERING + NUM_EVAL, 0
    config.optimizer.learning_rate = 1e-2
    config.batch.size = 16
    return config


class Record:
    """Measurements of a seed by name, in a JSON file: what is there is not measured again."""

    def __init__(self, file: pathlib.Path):
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


def measure_halves(bed: Bed, record: Record, masks: np.ndarray) -> np.ndarray:
    """Trusted loss after training on each half, [halves, orders]."""
    losses = np.zeros((len(masks), len(ORDERS)))
    for h, mask in enumerate(tqdm.tqdm(masks, desc="halves", unit="half", disable=None)):
        for o in ORDERS:
            losses[h, o] = record.get(f"half/{h}/{o}", lambda: _pair(bed.measure(bed.train(2.0 * mask, o))))[0]
    return losses


def measure_scores(bed: Bed, record: Record, names) -> dict[str, np.ndarray]:
    return {
        name: np.array(record.get(f"score/{name}", lambda: candidates.CANDIDATES[name].score(bed, 0).tolist())) for name in names
    }


def measure_kinds(bed: Bed, record: Record) -> dict[str, list[float]]:
    """Trusted loss and share of right answers without each kind of rows, and with all of them."""
    kind = np.array([row.fields["kind"] for row in bed.setup.lower.rows])
    result = {UNIFORM: record.get("all", lambda: _pair(bed.measure(bed.train(np.ones(bed.N), 0))))}
    for name in kinds.KINDS:
        result[name] = record.get(f"without/{name}", lambda: _pair(bed.measure(bed.train((kind != name).astype(float), 0))))
    result["trusted rows alone"] = record.get(
        "trusted", lambda: _pair(bed.measure(bed.train(np.ones(bed.N), 0, levels=(1.0, 0.0))))
    )
    result["right rows by the labels"] = record.get(
        "labels", lambda: _pair(bed.measure(bed.train((kind == "clean").astype(float), 0)))
    )
    result["before training"] = record.get("before", lambda: _pair(bed.measure(bed.setup.adapter)))
    return result


def kept_rows(score_N: np.ndarray, share: float) -> np.ndarray:
    """1.0 for the rows with the highest scores, else 0.0."""
    kept = np.zeros(len(score_N))
    kept[metrics.keep_order(score_N)[: round(share * len(score_N))]] = 1.0
    return kept


def measure_kept(bed: Bed, record: Record, name: str, score_N: np.ndarray, alone: bool) -> dict[float, list[float]]:
    """Trusted loss and share of right answers after training on the kept rows, by share."""
    levels = (0.0, 1.0) if alone else (1.0, 1.0)
    return {
        share: record.get(
            f"kept/{share}/{alone}/{name}", lambda: _pair(bed.measure(bed.train(kept_rows(score_N, share), 0, levels=levels)))
        )
        for share in KEPT
    }


def weights_of(score_N: np.ndarray) -> np.ndarray:
    """Weights of a plateau with a tail, mean 1: exp(-max(0, -z)), z the scores in units of their root mean square around the median.

    What every rival's scores are turned into where rows are weighted, not chosen."""
    z = score_N - np.median(score_N)
    z = z / max(np.sqrt(np.mean(z**2)), 1e-30)
    weight = np.exp(np.minimum(2 * z, 0.0))
    return len(weight) * weight / weight.sum()


def measure_weighted(bed: Bed, record: Record, name: str, score_N: np.ndarray) -> list[float]:
    """Trusted loss and share of right answers after training on all rows with `weights_of` the scores."""
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
    """AUROC of each kind of rows against the clean ones: how surely its rows have the lower scores."""
    kind = np.array([row.fields["kind"] for row in bed.setup.lower.rows])
    return {
        name: metrics.auroc(-score_N[np.isin(kind, (name, "clean"))], kind[np.isin(kind, (name, "clean"))] == name)
        for name in kinds.KINDS
        if name != "clean"
    }


def measure_seed(seed: int, names) -> dict:
    """All measurements of a seed."""
    record = Record(pathlib.Path(WORKDIR.value, f"seed_{seed}.json"))
    bed = Bed(bed_config(seed), NUM_STEERING)
    scores = measure_scores(bed, record, names)
    masks = halves(seed, HALVES.value, bed.N)
    plausible = -np.array(
        record.get("loss of rows", lambda: np.asarray(bed.select("influence", candidates.MIRROR, 0).selector.loss).tolist())
    )
    return {
        "scores": scores,
        "masks": masks,
        "halves": measure_halves(bed, record, masks),
        "kinds": measure_kinds(bed, record),
        "joint": measure_joint(bed, record),
        "weighted": {name: measure_weighted(bed, record, name, score) for name, score in scores.items()},
        "kept": {
            (name, alone): measure_kept(bed, record, name, score, alone)
            for name, score in scores.items()
            for alone in (False, True)
        },
        "aurocs": {name: aurocs(bed, score) for name, score in (scores | {"plausible": plausible}).items()},
    }
