"""Does a schedule, clipping and keeping the best adapter help? `python -m experiments.training --seeds=5`.

Runs of the config with `method=offline`. One has a constant learning rate, the other one a linear
schedule with warmup, clipping, and `eval.keep_best`. Each has its own learning rate, the best of a grid on other seeds than
those reported. A third one has the constant rate of the config. The trusted loss is that of rows that the run has not seen, so
that choosing an adapter by held-out rows does not bias it.

Runs are in WORKDIR, and finished ones are not repeated.
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np
from absl import flags

from bilevel_jax import cli, config_files, files, scoring, sharding
from bilevel_jax.data import rows as data_rows
from bilevel_jax.data import sources, templates
from bilevel_jax.models import huggingface
from bilevel_jax.runtime import workdir as workdirs
from experiments import runs
from experiments.selection import judgement

FLAGS = flags.FlagValues()
SEEDS = flags.DEFINE_integer("seeds", 5, "Number of reported seeds.", lower_bound=2, flag_values=FLAGS)
CONFIG = flags.DEFINE_string("config", "configs/safety.py", "Config file and tier.", flag_values=FLAGS)
WORKDIR = flags.DEFINE_string("workdir", "runs/training", "Directory of the runs.", flag_values=FLAGS)
NUM_UPPER = flags.DEFINE_integer("num_upper", 400, "Trusted rows of a run, with the held-out ones.", 1, flag_values=FLAGS)
NUM_LOWER = flags.DEFINE_integer("num_lower", 800, "Rows to select from, with the held-out ones.", 1, flag_values=FLAGS)
RATES = flags.DEFINE_multi_float(
    "rate", [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], "A learning rate to choose from.", flag_values=FLAGS
)
NUM_TUNING = flags.DEFINE_integer("tuning_seeds", 2, "Seeds 100, ... that choose the learning rates.", 1, flag_values=FLAGS)
NUM_TEST = flags.DEFINE_integer("num_test", 2000, "Rows of the trusted loss.", 1, flag_values=FLAGS)
SET = flags.DEFINE_multi_string("set", [], "key=value, a config override for every run.", flag_values=FLAGS)
PAGE = flags.DEFINE_string("page", "training", "Name of the page in experiments/results.", flag_values=FLAGS)

TEST_SEED = 900  # + the seed of the run
FIRST_TUNING_SEED = 100
WEIGHTS = "adapter_model.safetensors"
COMMON = {
    "method": "offline",
    "eval.num_upper": 200,
    "eval.num_lower": 100,
    "log.tensorboard": False,
    "checkpoint.keep": 1,
}
CONSTANT: dict[str, object] = {}
TUNED = {
    "optimizer.schedule": "linear",
    "optimizer.warmup": 0.05,
    "optimizer.clip_norm": 1.0,
    "eval.every": 10,
    "eval.keep_best": True,
}
TUNED_ADAPTERS = {"last": "last", "best": "left"}  # of `test_losses`


def test_losses(workdir: pathlib.Path, seed: int) -> dict[str, float]:
    """The trusted loss on new rows of the source: of the adapter that a finished run left, and of that of its last step."""
    config = workdirs.read_finished(workdir)

    def draw(seed: int, num_rows: int) -> list[data_rows.Row]:
        return sources.open_source(config.data.upper, seed=seed, num_rows=num_rows, bad_fraction=0.0)[0]

    seen = {data_rows.content_of(row.id) for row in draw(seed, config.data.num_upper)}
    rows = [row for row in draw(TEST_SEED + seed, NUM_TEST.value) if data_rows.content_of(row.id) not in seen]
    directory = huggingface.locate(config.model.path)
    model, base = huggingface.load_model(str(directory))
    encoded = templates.encode(rows, templates.load_tokenizer(str(directory)), template=config.data.template)
    _, examples, _ = templates.fit(encoded, rows, config.data.max_length)
    shape = config.batch.micro_size, config.data.max_length, sharding.make_mesh(1)

    def score(model, *arguments):
        return scoring.make_scorer(model, *shape)(*arguments)

    def loss(adapter: pathlib.Path) -> float:
        adapted, weights = huggingface.load_adapter(adapter, model)
        return scoring.mean_loss(*score(adapted, base, weights, scoring.example_segments(examples), "new trusted rows"))

    last = max((workdir / "adapters").iterdir(), key=lambda path: int(path.name.removeprefix("step_")))
    left = workdir / "adapter"
    weights = [(folder / WEIGHTS).read_bytes() for folder in (left, last)]
    return {"left": (of_left := loss(left)), "last": of_left if weights[0] == weights[1] else loss(last)}


def measure(settings: Mapping[str, object], rate: float, seed: int) -> dict[str, float]:
    """The `test_losses` of one run, which is made if it is not there."""
    shared = COMMON | {"data.num_upper": NUM_UPPER.value, "data.num_lower": NUM_LOWER.value}
    overrides = runs.overrides(SET.value)
    settings = shared | {"seed": seed, "optimizer.learning_rate": rate} | settings | overrides
    name = runs.slug(" ".join(f"{key}={value}" for key, value in settings.items() if key not in shared | overrides))
    cell = runs.make(CONFIG.value, pathlib.Path(WORKDIR.value, name), settings)
    result = runs.run_cell(cell)
    if isinstance(result, str):
        raise RuntimeError(f"{cell.workdir}: {result}")
    file = pathlib.Path(cell.workdir, "test_losses.json")
    if not file.exists():
        files.write_atomically(file, json.dumps(test_losses(pathlib.Path(cell.workdir), seed)))
    return json.loads(file.read_text())


def choose(settings: Mapping[str, object]) -> dict[float, float]:
    """Mean trusted loss by learning rate on the seeds that are not reported."""
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + NUM_TUNING.value)
    return {rate: float(np.mean([measure(settings, rate, seed)["left"] for seed in seeds])) for rate in RATES.value}


def main() -> None:
    tuning = {"constant rate": choose(CONSTANT), "linear schedule": choose(TUNED)}
    rates = {name: min(by_rate, key=by_rate.get) for name, by_rate in tuning.items()}
    rates["constant rate of the config"] = config_files.load(CONFIG.value).optimizer.learning_rate
    seeds = range(SEEDS.value)
    constant = ("constant rate", "constant rate of the config")
    losses = {f"{name}, last adapter": {k: measure(CONSTANT, rates[name], k)["left"] for k in seeds} for name in constant}
    tuned = {seed: measure(TUNED, rates["linear schedule"], seed) for seed in seeds}
    schedule = {f"linear schedule, {name} adapter": {k: tuned[k][key] for k in seeds} for name, key in TUNED_ADAPTERS.items()}
    claims = [(f"{name} below {other}", schedule[name], losses[other]) for other in losses for name in schedule]
    losses |= schedule
    overridden = {key: value for key, value in runs.overrides(SET.value).items() if key in TUNED}
    described = ", ".join(f"`{key}={value}`" for key, value in (TUNED | overridden).items())
    lines = [
        " ".join(__doc__.split("\n\n")[1].split()),
        "",
        f"The other run has {described}. {NUM_UPPER.value} trusted rows, {NUM_LOWER.value} to select from, with the held-out ones. "
        f"{NUM_TEST.value} rows are drawn for the trusted loss; those that the run has seen are left out.",
        "",
        f"{SEEDS.value} seeds, means with 95% intervals:",
        "",
        *runs.markdown(
            ["setting", "learning rate", "trusted loss"],
            [
                [name, f"{rates[name.partition(',')[0]]:g}", judgement.interval(list(values.values()))]
                for name, values in losses.items()
            ],
        ),
        "",
        "Claims, one-sided, Holm-corrected:",
        "",
        *judgement.claims_table(claims),
        "",
        "Choice of the learning rate, mean trusted loss over the seeds from "
        f"{FIRST_TUNING_SEED} to {FIRST_TUNING_SEED + NUM_TUNING.value - 1}:",
        "",
        *runs.markdown(
            ["setting", *(f"{rate:g}" for rate in RATES.value)],
            [[name, *(f"{loss:.4f}" for loss in by_rate.values())] for name, by_rate in tuning.items()],
        ),
    ]
    judgement.write("training", "Training with and without a schedule", lines, PAGE.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)
