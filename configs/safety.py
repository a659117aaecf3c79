"""Safety: the upper level has trusted safe rows; the lower level has compliance with forbidden requests, wrong answers and garbage.

The embedded model knows how to answer most questions, but not in the style of the trusted rows, and has never refused a request.

The model answers the questions of the rows with the smallest weights itself, and its responses replace theirs (`dynamic`). For the
other methods add --config.method=online (a fixed random mask), offline (selection only) or mixing. R and G are online.ratio and
online.num_samples.

    python -m bilevel_jax.main --config=configs/safety.py              embedded model, synthetic rows
    python -m bilevel_jax.main --config=configs/safety.py:smollm2      SmolLM2-135M, files in $BILEVEL_JAX_DATA or local/
    python -m bilevel_jax.main --config=configs/safety.py:pythia-1b    the paper's settings, BlueOrca and RedOrca from the hub
    python -m bilevel_jax.main --config=configs/safety.py:llama3-8b
"""

import os

from bilevel_jax import presets


def get_config(tier: str = ""):
    config = presets.get(tier)
    config.method = "dynamic"
    if not tier:
        config.model.path = "bilevel_jax/tiny_base"
        config.data.upper, config.data.lower = "synthetic:trusted", "synthetic:mixture"
        config.data.num_upper = config.data.num_lower = 2200
        config.eval.keep = 0.5  # 40% of the rows are right and of use, 13% are right but of no use
    elif tier == "smollm2":
        folder = os.environ.get("BILEVEL_JAX_DATA", "local")
        config.data.upper, config.data.lower = f"{folder}/safety/upper_safe.jsonl", f"{folder}/safety/lower_mixed.jsonl"
        config.data.label = "unsafe"
    else:
        config.data.upper, config.data.lower = "recipe:blueorca", "recipe:redorca"
        config.data.label = "unsafe"
        config.online.slots = 16  # the paper's batch of generations
    return config


def sweep(add):
    """R and G: `python -m experiments.sweep --config=configs/safety.py --workdir=DIR`."""
    for ratio in (0.05, 0.1, 0.2):
        for num_samples in (1, 5):
            add({"online.ratio": ratio, "online.num_samples": num_samples})
