"""Preferences: the upper level has trusted pairs of responses; in the lower level, some pairs have flipped labels.

Both levels use the DPO loss, and every pair of the lower level has a weight (`offline`). With --config.method=online or dynamic the
model answers masked questions itself. Its best and worst response under a reward replace the pair: add
--config.online.reward=likelihood, or another reward of `bilevel_jax.rewards`.

The embedded model takes about a minute on two cores. The AUROC for flipped labels is 0.99, and 5 to 8% of the flipped pairs are
among the 80% with the largest weights.

    python -m bilevel_jax.main --config=configs/preferences.py              embedded model, synthetic pairs
    python -m bilevel_jax.main --config=configs/preferences.py:smollm2      SmolLM2-135M, UltraFeedback from the hub
    python -m bilevel_jax.main --config=configs/preferences.py:pythia-1b    the paper's models and batch size
    python -m bilevel_jax.main --config=configs/preferences.py:llama3-8b
"""

from bilevel_jax import presets


def get_config(tier: str = ""):
    config = presets.get(tier)
    config.method = "offline"
    config.selection.cost = "loss"  # by which the AUROC above was measured
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
    """Objectives and β: `python -m experiments.sweep --config=configs/preferences.py --workdir=DIR`."""
    for loss in ("dpo", "ipo"):
        for beta in (0.1, 0.5):
            add({"loss.upper": loss, "loss.lower": loss, "online.objective": loss, "loss.beta": beta})
