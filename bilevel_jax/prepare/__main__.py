"""Prepares the rows of a run ahead: `python -m bilevel_jax.prepare --config=configs/safety.py[:TIER] [--config.KEY=VALUE ...]`.

Reads and tokenizes both levels into the cache, `data.cache`, in as many processes as there are processors, and checks what is
there. Runs with the same data, tokenizer and settings then start in seconds.
"""

from absl import flags
from ml_collections import config_flags

from bilevel_jax import cli, config_files
from bilevel_jax.text import say

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A config of the package, such as finetune, or a file; optionally with a tier: FILE:TIER. Its keys can be changed.",
    flag_values=FLAGS,
)
FLAGS["config"].parser = config_files.Parser("config")  # finds the package's configs from any directory
flags.mark_flag_as_required("config", flag_values=FLAGS)


def main() -> None:
    """Runs the command."""
    from bilevel_jax import checks
    from bilevel_jax.config import ConfigError
    from bilevel_jax.data import levels, templates
    from bilevel_jax.data.prepared import cache, sequences
    from bilevel_jax.models import huggingface

    config = checks.build(CONFIG.value)
    if config.data.cache == cache.OFF:
        raise ConfigError("data.cache=off stores nothing; name a directory, or take auto")
    tokenizer = templates.load_tokenizer(str(huggingface.locate(config.model.path)))
    for name, level in zip(("upper", "lower"), levels.load_levels(config, tokenizer)):
        rows = level.rows
        if not isinstance(rows, sequences.StoredRows):
            say(f"data.{name}: not stored; a run reads it at its start")
            continue
        rows.store.verify()
        say(f"data.{name}: {len(rows.store)} rows in {rows.store.folder}, {rows.store.num_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main, FLAGS)
