"""Quality: the upper level has trusted rows of high quality; the lower level is a broad mixture of lower quality.

The model answers a fixed random fraction R of the questions of the lower level itself, G times each (`online`). For the other
methods add --config.method=dynamic, offline or mixing. R and G are online.ratio and online.num_samples.

    python -m bilevel_jax.main --config=configs/quality.py              embedded model, synthetic rows
    python -m bilevel_jax.main --config=configs/quality.py:smollm2      SmolLM2-135M, files in $BILEVEL_JAX_DATA or local/
    python -m bilevel_jax.main --config=configs/quality.py:pythia-1b    the paper's settings, OpenOrca and Alpaca-cleaned
    python -m bilevel_jax.main --config=configs/quality.py:llama3-8b
"""

import os

from bilevel_jax import presets


def get_config(tier: str = ""):
    config = presets.get(tier)
    config.method = "online"
    if not tier:
        config.data.upper, config.data.lower = "synthetic:upper", "synthetic:lower"
        config.data.num_upper = config.data.num_lower = 2200
        config.data.bad_fraction = 0.3
    elif tier == "smollm2":
        folder = os.environ.get("BILEVEL_JAX_DATA", "local")
        config.data.upper, config.data.lower = f"{folder}/quality/upper_orca.jsonl", f"{folder}/quality/lower_alpaca.jsonl"
    else:
        config.data.upper, config.data.lower = "Open-Orca/OpenOrca", "yahma/alpaca-cleaned"
        config.data.num_upper = config.data.num_lower
    return config


def sweep(add):
    """R and G: `python -m experiments.sweep --config=configs/quality.py --workdir=DIR`."""
    for ratio in (0.05, 0.1, 0.2):
        for num_samples in (1, 5):
            add({"online.ratio": ratio, "online.num_samples": num_samples})
