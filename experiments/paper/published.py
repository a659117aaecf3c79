"""The runs of the paper's tables and figures: two tasks, the methods of the paper, and additional controls.

A cell is one setting on one task, run with several seeds. Tables share cells; each cell is run once, by the first table that
needs it.
"""

import pathlib

from experiments import runs

CONFIGS = {"quality": "configs/quality.py", "safety": "configs/safety.py"}
BED = "bed"  # the test bed: rows and base model of `configs/safety.py`, for both tasks
TIERS = ("tiny", BED, "smollm2", "pythia-1b", "llama3-8b")
GENERATED = ("tiny", BED)  # tiers whose right answers are known


def _online(ratio: float, num_samples: int = 1, **more) -> dict:
    return {"method": "online", "online.ratio": ratio, "online.num_samples": num_samples, **more}


def _dynamic(**more) -> dict:
    return {"method": "dynamic", "online.ratio": 0.1, "online.num_samples": 1, **more}


UNIFORM = {"selection.rule": "uniform"}  # ω is frozen; the ρ-schedule is the same
ADAM = {  # the paper's selector, with b2 as in the published code
    "selection.optimizer": "adam",
    "selection.learning_rate": 1e-4,
    "selection.b2": 0.95,
    "selection.baseline": "none",
}
NO_RATIO = {"online.response_weight": "none"}
STALE = {"online.refresh_every": 10**6}  # K_gen = ∞: responses are generated only before the first step
# Of the embedded model's 189 steps: generated once, at step 95, because nothing is masked before the weights have moved
STALE_DYNAMIC = {"online.refresh_every": 95}

BY_KIND = {"online.normalization": "eq7"}  # the means over masked and over other rows, apart

METHODS = {  # of the paper; the selector is that of the tier, which is the paper's own for the paper's models
    "mixing, ρ=1": {"method": "mixing", "mixing.rho": 1.0},
    "mixing, ρ=0.5": {"method": "mixing", "mixing.rho": 0.5},
    "offline": {"method": "offline"},
    "online, R=5%": _online(0.05),
    "online, R=10%": _online(0.1),
    "online, R=20%": _online(0.2),
    "online, R=10%, G=2": _online(0.1, 2),
    "online, R=10%, G=5": _online(0.1, 5),
    "dynamic": _dynamic(),
}
CONTROLS = {
    "mixing, ρ=0": {"method": "mixing", "mixing.rho": 0.0},  # the trusted rows only
    "mixing, ρ=0.2": {"method": "mixing", "mixing.rho": 0.2},
    "mixing, ρ=0.1": {"method": "mixing", "mixing.rho": 0.1},
    "uniform ω, offline": {"method": "offline", **UNIFORM},
    "uniform ω, online": _online(0.1, **UNIFORM),
    "online, r ≡ 1": _online(0.1, **NO_RATIO),
    "online, stale": _online(0.1, **STALE),
    "dynamic, r ≡ 1": _dynamic(**NO_RATIO),
    "dynamic, stale": _dynamic(**STALE_DYNAMIC),
    "online, R=10%, eq. (7)": _online(0.1, **BY_KIND),
    "dynamic, eq. (7)": _dynamic(**BY_KIND),
    "dynamic, Adam 1e-4": _dynamic(**ADAM),
}
SELECTORS = {  # rules and optimizers of ω, offline
    "bds, Adam 1e-4": {"method": "offline", **ADAM},
    "bds, SGD 30": {
        "method": "offline",
        "selection.optimizer": "sgd",
        "selection.learning_rate": 30.0,
        "selection.baseline": "none",
    },
    "bmo, τ=1": {
        "method": "offline",
        "selection.rule": "bmo",
        "selection.tau": 1.0,
        "selection.learning_rate": 0.5,
        "selection.baseline": "none",
    },
}
BMO_ORDERS = {  # of `experiments.bmo_order`: D7 of docs/paper.md
    "bmo, θ first": {**SELECTORS["bmo, τ=1"], "selection.coefficient_at": "current"},
    "bmo, ω first (as printed)": {**SELECTORS["bmo, τ=1"], "selection.coefficient_at": "current", "selection.order": "paper"},
}
FURTHER = {  # selectors that are not in the paper
    "tracked v(ω)": {"method": "offline", "selection.value_function": "tracked"},
    "features": {
        "method": "offline",
        "selection.parameterization": "features",
        "selection.rule": "bmo",
        "selection.optimizer": "adam",
        "selection.learning_rate": 1e-2,
    },
}


def _by_source(**more) -> dict:
    """Rows whose sources have different shares of bad rows."""
    return {"method": "offline", "data.lower": "synthetic:domains", **more}


BY_SOURCE = {"selection.unit": "domain", "selection.optimizer": "adam", "selection.learning_rate": 1e-2}
SOURCES = {  # of `experiments.domains`
    "sources, uniform ω": _by_source(**UNIFORM),
    "a logit per row": _by_source(),
    "a logit per source": _by_source(**BY_SOURCE),
    "a logit per source, tracked v(ω)": _by_source(**BY_SOURCE, **{"selection.value_function": "tracked"}),
}


def _by_word(**more) -> dict:
    """Rows of which half have some bad words."""
    return {"method": "offline", "data.lower": "synthetic:tokens", "data.bad_fraction": 0.5, **more}


WORDS = {  # of `experiments.tokens`
    "words, uniform ω": _by_word(**UNIFORM),
    "a weight per row": _by_word(),
    "a weight per row and word": _by_word(**{"selection.unit": "token"}),
}
COMPARED = {  # objectives for the G responses to a masked question; rewards are the likelihood, which needs no labels, or the truth
    "online, R=10%, G=4": _online(0.1, 4),
    **{
        f"online, R=10%, G=4, {name}": _online(0.1, 4, **{"online.objective": objective, "online.reward": "likelihood"})
        for name, objective in (("best of G", "best_of"), ("DPO", "dpo"), ("REINFORCE", "reinforce"))
    },
    "online, R=10%, G=4, DPO, truth as reward": _online(0.1, 4, **{"online.objective": "dpo", "online.reward": "truth"}),
}
OBJECTIVES = {"best-of-G": "best_of", "RWR": "rwr", "DPO": "dpo", "REINFORCE": "reinforce"}
REUSED = {  # line -> objective, importance ratios
    "best-of-G": ("best_of", "none"),
    "DPO": ("dpo", "none"),
    "REINFORCE": ("reinforce", "none"),
    "REINFORCE with ratios": ("reinforce", "sequence"),
}


def _lengths(reward: str, objective: str, refresh_every: int, num_lower: int, num_epochs: int, ratios: str = "none") -> dict:
    """All questions are masked, and the trusted level has a twentieth of the loss, so the model learns the reward."""
    return {
        **_online(1.0, 4),
        **UNIFORM,
        "penalty.rho_init": 0.95,
        "penalty.rho_step": 0.0,
        "online.objective": objective,
        "online.reward": f"experiments.length_rewards:{reward}",
        "online.reward_temperature": 10.0,  # characters
        "online.temperature": 1.0,
        "online.max_new_tokens": 64,
        "online.response_weight": ratios,
        "online.refresh_every": refresh_every,
        "batch.size": 16,
        "data.num_lower": num_lower + 20,
        "eval.num_lower": 20,
        "num_epochs": num_epochs,
        "checkpoint.every": 0,
    }


LENGTHS = {  # of the study of Tajwar et al. 2024 on a language model, `experiments.lengths`
    **{
        f"{kind}, {name}, {source}": _lengths(reward, objective, refresh_every, 640, 1)
        for kind, reward in (("min", "shortest"), ("mode", "typical"), ("skew", "rare"))
        for name, objective in OBJECTIVES.items()
        for source, refresh_every in (("on-policy", 2), ("off-policy", 10**6))
    },
    **{
        f"reuse, {name}, {passes} pass{'es' * (passes > 1)}": _lengths("shortest", objective, 4 * passes, 64, 8 * passes, ratios)
        for name, (objective, ratios) in REUSED.items()
        for passes in (1, 4)
    },
}
DEFAULT = {"selection.cost": "influence"}
METAGRADIENT = {"metagradient, offline": {"method": "offline", "selection.rule": "metagradient"}}
DEFAULTS = {  # the default selector
    "default, offline": {"method": "offline", **DEFAULT},
    "default, online, R=10%": _online(0.1, **DEFAULT),
    "default, dynamic, R=10%": _dynamic(**DEFAULT),
    "default, dynamic, R=30%": _dynamic(**DEFAULT) | {"online.ratio": 0.3},
}
WITH_DEFAULT = {  # cell of the paper -> the same with the default selector; shown beside it on the test bed
    "offline": "default, offline",
    "online, R=10%": "default, online, R=10%",
    "dynamic": "default, dynamic, R=10%",
}
OF_PAPER = {default: cell for cell, default in WITH_DEFAULT.items()}
CELLS = METHODS | CONTROLS | SELECTORS | BMO_ORDERS | FURTHER | DEFAULTS | METAGRADIENT | SOURCES | WORDS | COMPARED | LENGTHS
OF_QUALITY = ("mixing, ρ=0.2", "uniform ω, offline", "uniform ω, online", "online, r ≡ 1", "online, stale", *SELECTORS)
OF_SAFETY = (
    *("mixing, ρ=0.1", "uniform ω, offline", "dynamic, r ≡ 1", "dynamic, stale", "bds, Adam 1e-4", "dynamic, Adam 1e-4"),
    *("online, R=10%, eq. (7)", "dynamic, eq. (7)"),
)
USED, USED_DATA = "eval/used_loss", "eval/used_data_loss"  # rows in use, and the same rows with the responses of the data
IN_USE = {"rows in use": USED, "the same rows, as in the data": USED_DATA, "generated share of them": "eval/used_generated"}
COLUMNS = runs.COLUMNS | IN_USE | {"ESS/N": "selector/ess", "correction rate": "online/correction_rate"}


def has_cost(cell: str) -> bool:
    """Whether the rows of a cell have weights that follow from a cost."""
    return CELLS[cell]["method"] != "mixing" and CELLS[cell].get("selection.rule") != "uniform"


def make(root: pathlib.Path, task: str, tier: str, cell: str, seed: int, changes: dict) -> runs.Cell:
    """The run of a cell with a seed.

    Args:
      root: parent of the directories of all runs.
      task: key of `CONFIGS`.
      tier: one of `TIERS`.
      cell: key of `CELLS`.
      seed: of the run.
      changes: config keys and values that override those of the cell.
    """
    task = "safety" if tier == BED else task
    config = CONFIGS[task] + ("" if tier in GENERATED else f":{tier}")
    workdir = root / tier / task / runs.slug(cell) / f"seed_{seed}"
    paper = {"selection.cost": "loss"}  # (10b), which is not the default
    if tier == "tiny" and task == "safety":  # the rows of these tables; the config's own are those of the test bed
        paper |= {"model.path": "bilevel_jax/tiny", "data.upper": "synthetic:upper", "data.lower": "synthetic:lower"}
    if tier == BED:  # 66 steps
        paper |= {"data.num_upper": 900, "data.num_lower": 900, "online.refresh_every": 12}
    if tier == "smollm2":
        paper["selection.learning_rate"] = 1.0  # for losses in nats, which are larger than those of the embedded model
    return runs.make(config, workdir, {"seed": seed, "log.tensorboard": False} | paper | CELLS[cell] | changes)
