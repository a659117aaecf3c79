"""Table 5: zero-shot accuracies after the quality task: `python -m experiments.table5 --tier=tiny --seeds=4`."""

from bilevel_jax import cli
from experiments import tables
from experiments.paper import zero_shot

PAPER = {  # Llama-3-8B: BoolQ, PIQA, HellaSwag, WinoGrande, ARC-easy
    "mixing, ρ=0.5": ("0.848", "0.797", "0.689", "0.691", "0.801"),
    "mixing, ρ=1": ("0.858", "0.797", "0.692", "0.673", "0.802"),
    "offline": ("0.863", "0.798", "0.689", "0.703", "0.804"),
    "online, R=10%": ("0.871", "0.812", "0.692", "0.703", "0.814"),
}
EFFECTS = zero_shot.effects(PAPER)
CONTROLS = ("uniform ω, offline", "online, r ≡ 1", "online, stale", "bds, Adam 1e-4")
CLAIMS = (
    ("offline", "mixing, ρ=0.5"),
    ("offline", "mixing, ρ=1"),
    ("online, R=10%", "offline"),
    ("offline", "uniform ω, offline"),
    ("online, R=10%", "online, r ≡ 1"),
    ("online, R=10%", "online, stale"),
)


def main() -> None:
    zero_shot.table("table5", "Table 5: accuracy after the quality task", "quality", PAPER, CONTROLS, CLAIMS, EFFECTS)


if __name__ == "__main__":
    cli.run(main, tables.FLAGS)
