"""Tiers of a task, from a laptop to the paper's size: model, batch, learning rates and generation, without the data."""

from bilevel_jax import config as configuration

TIERS = ("", "smollm2", "pythia-1b", "llama3-8b")


def get(tier: str):
    """The config of a tier, without its data.

    Raises:
      ValueError: the tier is unknown.
    """
    if tier not in TIERS:
        raise ValueError(f"no tier '{tier}'; leave it out or choose {', '.join(TIERS[1:])}")
    config = configuration.default()
    if not tier:  # the embedded model, 1M parameters
        config.optimizer.learning_rate = 2e-3
        config.selection.learning_rate = 3.0
        config.data.max_length = 256
        config.batch.micro_size = 2  # the rows of a step fill about 17 sequences: with 4, the last micro-batch is mostly empty
        config.online.refresh_every = 30
        config.online.max_new_tokens = 128
        return config
    if tier == "smollm2":  # 135M parameters; third_party/README.md says how to download it
        config.model.path = "local/smollm2"
        config.optimizer.learning_rate = 2e-4
        config.selection.learning_rate = 3.0
        config.data.max_length = 512
        config.batch.micro_size = 1  # 2 is no faster on a CPU, and the last micro-batch would often be half empty
        config.online.refresh_every = 100
        config.online.max_new_tokens = 256
        config.online.slots = 16
        return config
    # The paper's settings (appendix F.1). Its batch is 32 rows in micro-batches of 8; packed, this is about five sequences of 2048
    # tokens per level.
    config.model.path = {"pythia-1b": "EleutherAI/pythia-1b", "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct"}[tier]
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 5e-6
    config.selection.cost = "loss"
    config.selection.optimizer = "adam"
    config.selection.learning_rate = 1e-4
    config.selection.b2 = config.optimizer.b2 = 0.95  # as in the published code
    config.selection.baseline = "none"
    config.data.learn = "last"
    config.data.num_lower = {"pythia-1b": 9600, "llama3-8b": 56000}[tier]
    config.eval.num_upper = config.eval.num_lower = 1000
    config.batch.micro_size = 2  # its activations need less memory than a refresh, so `remat` would not lower the peak
    return config
