"""Self-refining generation against selection alone and mixing, with controls: `python -m experiments.online --seeds=4`."""

from bilevel_jax import cli
from experiments import cells, runs

MIXING = {f"mixing, ρ={rho}": {"method": "mixing", "mixing.rho": rho} for rho in (0.1, 0.2)}
CELLS = MIXING | {
    "uniform ω, offline": {"method": "offline", "selection.rule": "uniform"},
    "offline": {"method": "offline"},
    "online": {"method": "online"},
    "online, r ≡ 1 (none)": {"method": "online", "online.response_weight": "none"},
    "dynamic": {"method": "dynamic"},
    "dynamic, r ≡ 1 (none)": {"method": "dynamic", "online.response_weight": "none"},
}
COLUMNS = cells.COLUMNS | {"another chance": "online/another_chance"}


if __name__ == "__main__":
    cli.run(lambda: runs.table("online", CELLS, COLUMNS))
