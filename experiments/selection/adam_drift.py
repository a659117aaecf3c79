"""How far Adam carries the weights of rows between their visits: `python -m experiments.adam_drift`.

`selector.update` alone, on made-up costs: 15% of the rows are bad and cost 0.4 nats more on average, every visit adds noise.
Every row is visited once an epoch, 32 rows a step, three epochs, γ as in the paper. The gradient (10b) of ω is dense: each step
pulls the logits of all other rows up a little. Adam divides by the root of the mean square of a logit's gradients. A row that
waits for its first visit has only these small ones, so with b2 near 1 it rises by about a full learning rate a step, and rows
seen late end higher than rows seen early.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import tqdm
from absl import flags

from bilevel_jax import cli, ranking
from bilevel_jax import selector as selection
from bilevel_jax.data import shuffle
from experiments import runs
from experiments.selection import judgement

FLAGS = flags.FlagValues()
SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds.", lower_bound=1, flag_values=FLAGS)
SIZES = flags.DEFINE_multi_integer("rows", [2000, 8600, 55000], "Numbers of rows.", lower_bound=32, flag_values=FLAGS)

BATCH, EPOCHS = 32, 3
BAD_SHARE, BAD_EXCESS, SPREAD, NOISE = 0.15, 0.4, 0.5, 0.3  # of costs, nats
MEAN_COST = 2.0
RATES, SECOND_DECAYS = (1e-4, 1e-3, 5e-3), (0.95, 0.999)
SELECTORS = {
    (rate, b2): selection.Selector(optimizer="adam", learning_rate=rate, b2=b2, baseline="none")
    for rate in RATES
    for b2 in SECOND_DECAYS
} | {"mirror descent": selection.Selector()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(selector: selection.Selector, num_rows: int, row_SxB, cost_SxB, gamma_S):
    """ω [N] after steps on the given rows and costs; entries beyond the last row of an epoch are N."""

    def step(state, inputs):
        row_B, cost_B, gamma = inputs
        share_B = jnp.where(row_B < num_rows, 1.0, 0.0)
        number = jnp.sum(share_B)
        return selection.update(selector, state, row_B, share_B / number, number, cost_B, gamma), None

    state, _ = jax.lax.scan(step, selection.init(selector, num_rows), (row_SxB, cost_SxB, gamma_S))
    return state.logits


def make_visits(num_rows: int, seed: int):
    """Rows, costs and γ of all steps; whether each row is bad; the step of its first visit."""
    rng = np.random.default_rng([seed, num_rows])
    bad = rng.random(num_rows) < BAD_SHARE
    cost = MEAN_COST + BAD_EXCESS * bad + SPREAD * rng.standard_normal(num_rows)
    epoch_steps = shuffle.steps_per_epoch(num_rows, BATCH)
    rows = np.full((EPOCHS * epoch_steps, BATCH), num_rows, np.int32)
    for k in range(len(rows)):
        of_step = shuffle.lower_rows(seed, num_rows, BATCH, k)
        rows[k, : len(of_step)] = of_step
    costs = np.append(cost, 0.0)[rows] + NOISE * rng.standard_normal(rows.shape)
    rho = 0.1 * (1 + np.arange(len(rows)) // epoch_steps)
    first = np.zeros(num_rows)
    first[rows[:epoch_steps][rows[:epoch_steps] < num_rows]] = np.repeat(np.arange(epoch_steps), BATCH)[:num_rows]
    return rows, costs.astype(np.float32), (rho / (1 - rho)).astype(np.float32), bad, first


def measure(selector: selection.Selector, num_rows: int, seed: int) -> tuple[float, float, float]:
    """AUROC of bad rows; rank correlation of ω with the step of the first visit; ESS/N."""
    rows, costs, gamma, bad, first = make_visits(num_rows, seed)
    logits = np.asarray(train(selector, num_rows, rows, costs, gamma), float)
    weight = np.exp(logits - logits.max())
    drift = scipy.stats.spearmanr(logits, first).statistic
    return ranking.auroc(-logits, bad), float(drift), float(selection.effective_sample_size(weight / weight.sum()))


def main() -> None:
    cells = [(key, size) for key in SELECTORS for size in SIZES.value]
    measured = {
        (key, size): np.array([measure(SELECTORS[key], size, seed) for seed in range(SEEDS.value)])
        for key, size in tqdm.tqdm(cells, unit="cell", disable=None)
    }
    lines = [" ".join(__doc__.split("\n\n")[1].split()), "", f"{SEEDS.value} seeds, means with 95% intervals.", ""]
    for i, title in enumerate(("AUROC of bad rows", "Rank correlation of ω with the step of the first visit", "ESS/N")):
        table = []
        for key in SELECTORS:
            name = key if isinstance(key, str) else f"Adam {key[0]:g}, β₂ = {key[1]:g}"
            table.append([name, *(judgement.interval(measured[key, size][:, i]) for size in SIZES.value)])
        lines += [f"{title}:", "", *runs.markdown(["selector", *(f"N = {size}" for size in SIZES.value)], table), ""]
    judgement.write("adam_drift", "Adam's second decay and the drift of the weights", lines)


if __name__ == "__main__":
    cli.run(main, FLAGS)
