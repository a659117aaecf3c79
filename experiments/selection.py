"""Rules x optimizers of the selector, and the controls, on one task: `python -m experiments.selection --seeds=4`."""

from bilevel_jax import cli
from experiments import cells, runs

MIXING = {f"mixing, ρ={rho:g}": {"method": "mixing", "mixing.rho": rho} for rho in (1.0, 0.5)}
OFFLINE = {
    "uniform ω, same ρ-schedule": {"selection.rule": "uniform"},
    "bds, Adam 1e-4 (the paper)": {
        "selection.optimizer": "adam",
        "selection.learning_rate": 1e-4,
        "selection.baseline": "none",
    },
    "bds, Adam 1e-2": {"selection.optimizer": "adam", "selection.learning_rate": 1e-2},
    "bds, SGD as (10b), lr 30": {
        "selection.optimizer": "sgd",
        "selection.learning_rate": 30.0,
        "selection.baseline": "none",
    },
    "bds, mirror, no baseline": {"selection.baseline": "none"},
    "bds, mirror, batch baseline": {"selection.baseline": "batch"},
    "bds, mirror, running baseline (default)": {},
    "bmo, as (48), lr 0.5": {"selection.rule": "bmo", "selection.learning_rate": 0.5, "selection.baseline": "none"},
}
CELLS = MIXING | {name: {"method": "offline"} | cell for name, cell in OFFLINE.items()}
COLUMNS = cells.COLUMNS | {"ESS/N": "selector/ess"}


if __name__ == "__main__":
    cli.run(lambda: runs.table("selection", CELLS, COLUMNS))
