"""Preferences: trusted pairs of a better and a worse response above; below, pairs of which some have their labels flipped.

Both levels learn by DPO, and every pair of the lower level gets a weight (`offline`). With --config.method=online or dynamic the
model answers masked questions itself, and its best response against its worst under a reward takes the pair's place: add
--config.online.reward=likelihood, or another one of `bilevel_jax.rewards`.

The embedded model takes about a minute on two cores; flipped labels end with an AUROC of 0.99, and 5 to 8% of them among the
heaviest 80% of the rows.

    python -m bilevel_jax.main --config=configs/preferences.py              embedded model, generated pairs
    python -m bilevel_jax.main --config=configs/preferences.py:smollm2      SmolLM2-135M, UltraFeedback from the hub
    python -m bilevel_jax.main --config=configs/preferences.py:pythia-1b    the paper's models and batch
    python -m bilevel_jax.main --config=configs/preferences.py:llama3-8b
"""

from bilevel_jax import presets


def get_config(tier: str = ""):
    config = presets.get(tier)
    config.method = "offline"
    config.loss.upper = config.loss.lower = config.online.objective = "dpo"
    config.online.num_samples = 4
    if not tier:
        config.loss.beta = 0.5  # ranks flipped labels better than 0.1
        config.data.upper, config.data.lower = "synthetic:upper", "synthetic:lower"
        config.data.num_upper = config.data.num_lower = 2200
    else:
        config.data.upper = "argilla/ultrafeedback-binarized-preferences-cleaned"
        config.data.lower = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"
        config.data.num_upper = 2000
    return config


def sweep(add):
    """Objectives: `python -m experiments.sweep --config=configs/preferences.py --workdir=DIR`."""
    for loss in ("dpo", "ipo"):
        for beta in (0.1, 0.5):
            add({"loss.upper": loss, "loss.lower": loss, "online.objective": loss, "loss.beta": beta})
