"""Weights learned with a small model, used to train a larger one: `python -m experiments.proxy --seeds=10`.

The rows are those of the test bed. The larger model is `tiny_base`; the small one, the proxy, is pretrained on the same text, by
`python -m experiments.tiny_model --recipe=text --width=64 --layers=2 --out=runs/proxy/base`.

Weights are learned jointly with each of them, by the default rule. The larger model is then trained from its start on all rows,
with fixed weights: equal ones, those of the proxy, its own, and, as a control, those of the proxy in random order. The trusted loss
is that of rows that no rule has seen. Measurements are kept in WORKDIR/seed_K.json, so the same command continues.
"""

import pathlib
import time

import jax
import numpy as np
import scipy.stats
from absl import flags

from bilevel_jax import cli
from bilevel_jax.errors import RunError
from experiments import runs
from experiments.selection import candidates, counterfactual, judgement
from experiments.selection.retraining import Bed

FLAGS = flags.FlagValues()
SEEDS = flags.DEFINE_integer("seeds", 10, "Number of seeds.", lower_bound=1, flag_values=FLAGS)
FIRST = flags.DEFINE_integer("first_seed", 0, "The first seed.", lower_bound=0, flag_values=FLAGS)
WORKDIR = flags.DEFINE_string("workdir", "runs/proxy", "Directory of the measurements.", flag_values=FLAGS)
PROXY = flags.DEFINE_string("proxy", "runs/proxy/base", "The small base model.", flag_values=FLAGS)

EQUAL, OWN, OTHER, SHUFFLED = "equal", "its own", "of the proxy", "of the proxy, in random order"


def learned_logits(bed: Bed) -> np.ndarray:
    """ω of a joint run by the default rule, [N]."""
    return np.asarray(bed.select("influence", candidates.MIRROR, 0).selector.logits, float)


def num_parameters(bed: Bed) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(bed.setup.base))


def make_bed(seed: int, path: str = "") -> Bed:
    config = counterfactual.bed_config(seed)
    config.model.path = path or config.model.path
    return Bed(config, counterfactual.NUM_STEERING)


def measure_seed(seed: int) -> dict:
    """Of one seed: trusted loss and share of right answers by weights, agreement of the weights, cost of the proxy."""
    record = counterfactual.Record(pathlib.Path(WORKDIR.value, f"seed_{seed}.json"))
    bed, proxy = make_bed(seed), make_bed(seed, PROXY.value)
    logits = {
        name: np.array(record.get(f"logits/{name}", lambda of=of: learned_logits(of).tolist()))
        for name, of in ((OWN, bed), (OTHER, proxy))
    }
    order = np.random.default_rng([seed, 79]).permutation(bed.N)
    weights = {EQUAL: np.ones(bed.N)} | {name: np.exp(value - value.max()) for name, value in logits.items()}
    weights[SHUFFLED] = weights[OTHER][order]

    def measured(weight_N) -> list[float]:
        result = bed.measure(bed.train(weight_N, 0))
        return [result.loss, result.right]

    return {
        "trained": {name: record.get(name, lambda weight_N=weight_N: measured(weight_N)) for name, weight_N in weights.items()},
        "correlation": float(scipy.stats.spearmanr(logits[OWN], logits[OTHER]).statistic),
        "aurocs": {name: counterfactual.aurocs(bed, value) for name, value in logits.items()},
        "seconds": record.get("seconds", lambda: [seconds_of_selection(proxy), seconds_of_selection(bed)]),
        "parameters": [num_parameters(proxy), num_parameters(bed)],
    }


def seconds_of_selection(bed: Bed) -> float:
    """Time of a joint run that is compiled and packed already."""
    learned_logits(bed)
    bed.order(1, separate=True)
    began = time.perf_counter()
    jax.block_until_ready(bed.select("influence", candidates.MIRROR, 1))
    return time.perf_counter() - began


def page(results: list[dict]) -> list[str]:
    small, large = results[0]["parameters"]
    ratio = judgement.interval([result["seconds"][0] / result["seconds"][1] for result in results])
    agreement = judgement.interval([result["correlation"] for result in results])
    trained = {
        name: [{k: result["trained"][name][i] for k, result in enumerate(results)} for i in (0, 1)]
        for name in (EQUAL, OTHER, SHUFFLED, OWN)
    }
    rows = [[name, *(judgement.interval(list(values.values())) for values in both)] for name, both in trained.items()]
    pairs = [(OTHER, EQUAL), (OTHER, SHUFFLED), (OWN, EQUAL), (OWN, OTHER)]
    kinds = [*counterfactual.KINDS, "implausible"]
    by_kind = [
        [name, *(judgement.interval([result["aurocs"][name][kind] for result in results]) for kind in kinds)]
        for name in (OTHER, OWN)
    ]
    return [
        " ".join(" ".join(__doc__.split("\n\n")[1:]).split()),
        "",
        f"The proxy has {small / 1e6:.2f} M parameters, the larger model {large / 1e6:.2f} M. A joint run of the proxy takes "
        f"{ratio} of the time of one of the larger model. The rank correlation of their weights is {agreement}.",
        "",
        f"{len(results)} seeds, {counterfactual.NUM_LOWER} rows, {counterfactual.NUM_TRUSTED} trusted rows; means with 95% "
        "intervals:",
        "",
        *runs.markdown(["weights of the larger model's training", "trusted loss", "answered right"], rows),
        "",
        "Claims, one-sided, Holm-corrected:",
        "",
        *judgement.claims_table(
            [(f"weights {a}: trusted loss below that with weights {b}", trained[a][0], trained[b][0]) for a, b in pairs]
        ),
        "",
        "AUROC of each kind of rows against clean ones, by the weights:",
        "",
        *runs.markdown(["weights", *kinds], by_kind),
    ]


def main() -> None:
    if not pathlib.Path(PROXY.value, "config.json").exists():
        raise RunError(
            f"{PROXY.value}: no such model; make it by "
            f"`python -m experiments.tiny_model --recipe=text --width=64 --layers=2 --out={PROXY.value}`"
        )
    results = [measure_seed(seed) for seed in range(FIRST.value, FIRST.value + SEEDS.value)]
    judgement.write("proxy", "Weights learned with a smaller model", page(results))


if __name__ == "__main__":
    cli.run(main, FLAGS)
