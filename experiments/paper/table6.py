"""Table 6: zero-shot accuracies after the safety task: `python -m experiments.table6 --tier=tiny --seeds=4`."""

from bilevel_jax import cli
from experiments import tables
from experiments.paper import zero_shot

PAPER = {  # Llama-3-8B: BoolQ, PIQA, HellaSwag, WinoGrande, ARC-easy
    "mixing, ρ=0.5": ("0.838", "0.761", "0.639", "0.663", "0.765"),
    "mixing, ρ=1": ("0.821", "0.761", "0.632", "0.630", "0.755"),
    "offline": ("0.849", "0.789", "0.673", "0.697", "0.781"),
    "dynamic": ("0.852", "0.789", "0.678", "0.708", "0.785"),
}
EFFECTS = zero_shot.effects(PAPER)
CONTROLS = ("uniform ω, offline", "dynamic, r ≡ 1", "dynamic, stale", "bds, Adam 1e-4")
CLAIMS = (
    ("offline", "mixing, ρ=0.5"),
    ("offline", "mixing, ρ=1"),
    ("dynamic", "offline"),
    ("offline", "uniform ω, offline"),
    ("dynamic", "dynamic, r ≡ 1"),
    ("dynamic", "dynamic, stale"),
)


def main() -> None:
    zero_shot.table("table6", "Table 6: accuracy after the safety task", "safety", PAPER, CONTROLS, CLAIMS, EFFECTS)


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)
