"""How much of the measured influence of a row is noise: `python -m experiments.influence_noise --run=WORKDIR ...`.

`useful` of a row is minus the mean of its harms h so far, so the tables of two epochs give the harm at the last visit. The
influence of a row changes little from one epoch to the next, and the noise of two visits is independent. So the correlation of
the harms at two visits is the share of their variance which is not noise. `influence.RELIABILITY` is that of the first two
visits, when it matters most: of later ones there is a mean. No label is read.

The runs need one weights table per epoch, and a mixture that is visited once an epoch, without self-refining (`method=offline`).
"""

import pathlib

import numpy as np
from absl import flags

from bilevel_jax import cli
from bilevel_jax.errors import RunError
from bilevel_jax.runtime import weight_table
from experiments import runs
from experiments.selection import judgement

FLAGS = flags.FlagValues()
RUN = flags.DEFINE_multi_string("run", [], "Working directory of a finished run; one or more.", flag_values=FLAGS)


def harms(useful_KxN: np.ndarray) -> np.ndarray:
    """The harm at each of K visits [K, N], of `useful` after each."""
    total_KxN = -useful_KxN * np.arange(1, len(useful_KxN) + 1)[:, None]
    return np.diff(total_KxN, axis=0, prepend=0.0)


def read_useful(workdir: pathlib.Path) -> np.ndarray:
    """`useful` after each epoch, [K, N]."""
    epochs = weight_table.epoch_files(workdir)
    if len(epochs) < 2:
        raise RunError(f"{workdir}: has {len(epochs)} tables of weights, and two epochs are needed")
    tables = [weight_table.read(epochs[epoch]) for epoch in sorted(epochs)]
    visits = [table["visits"].to_numpy() for table in tables]
    if any((of_epoch != k).any() for k, of_epoch in enumerate(visits, 1)):
        raise RunError(f"{workdir}: not every row is visited once an epoch; take a run with --config.method=offline")
    return np.array([table["useful"].to_numpy() for table in tables], float)


def main() -> None:
    if not RUN.value:
        raise RunError("--run: name the working directory of a finished run")
    table = []
    for workdir in RUN.value:
        correlations = np.corrcoef(harms(read_useful(pathlib.Path(workdir))))
        table.append([workdir, *(f"{value:.2f}" for value in np.diag(correlations, 1)[:2])])
    lines = [" ".join(__doc__.split("\n\n")[1].split()), ""]
    lines += runs.markdown(["run", "first and second visit", "second and third"], table)
    judgement.write("influence_noise", "Noise of the influence of a row", lines)


if __name__ == "__main__":
    cli.run(main, FLAGS)
