"""Helpers shared by several test files: a tiny model directory, small data files, a config for runs of seconds."""

import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from bilevel_jax import cli, main, train
from bilevel_jax import config as configuration
from bilevel_jax.data import templates
from bilevel_jax.models import decoder, huggingface, lora
from bilevel_jax.report import page
from bilevel_jax.runtime import distributed, step_log


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)  # a ClosedJaxpr holds its jaxpr
            if hasattr(inner, "eqns"):
                yield from _shapes(inner)


@pytest.fixture
def intermediate_shapes():
    """`f(function, *args)` -> the shapes of all arrays that it computes, inside of loops and calls too."""
    return lambda function, *args: set(_shapes(jax.make_jaxpr(function)(*args).jaxpr))


# --------------------------------------------------------------------------------------------------------------------
# Order
# --------------------------------------------------------------------------------------------------------------------

LONGEST = [  # files, longest first
    "test_train.py",
    "parity/test_evaluate.py",
    "test_mesh.py",
    "parity/test_sampling.py",
    "test_step.py",
    "test_metagradient.py",
    "experiments/test_notebook.py",
    "planning/test_memory.py",
    "test_training_options.py",
    "experiments/test_swap.py",
]


def pytest_collection_modifyitems(items):
    """Starts with the files that take longest: workers take a file each (`--dist loadfile`), and end at about the same time."""
    order = {str(pathlib.Path(__file__).parent / name): index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(str(item.path), len(order)))


# --------------------------------------------------------------------------------------------------------------------
# Compilations
# --------------------------------------------------------------------------------------------------------------------


def pytest_configure():
    """Sets XLA's flags before its first use, also for the processes that tests start.

    The tests compile much and compute little. Without fusion emitters and most optimizations a program compiles four times faster;
    the workers occupy all cores, so that a program in one part compiles faster than one in several.
    """
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), flags)))


@pytest.fixture(autouse=True, scope="session")
def quick_compilation(tmp_path_factory):
    """Few optimizations, and one cache of compiled programs for all workers and for the processes that tests start."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # which the workers share
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(root / "compilations"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        yield


@pytest.fixture(autouse=True, scope="session")
def rows_cache(tmp_path_factory):
    """Prepared rows are not stored in the home directory."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("BILEVEL_JAX_ROWS", str(tmp_path_factory.mktemp("cache") / "rows"))
        yield


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


def make_rows(number: int, seed: int, bad_every: int = 0) -> list[dict]:
    """Sums with their answers; every `bad_every`-th answer is a wrong one, marked, with the right one beside it."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(number):
        a, b = rng.integers(10, 1000, 2)
        truth = f"{a} and {b} make {a + b}" + ", as you can check." * int(rng.integers(3))
        bad = bool(bad_every) and i % bad_every == 0
        response = "Grüße ☃ nothing" if bad else truth
        row = {"question": f"{i}: {a} + {b}?", "response": response, "truth": truth, "bad": bad}
        rows.append(row | {"source": f"sums-{seed}"})
    return rows


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def read_jsonl(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --------------------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------------------

COMMON = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5, "use_parallel_residual": True},
    "llama": {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
}


def make_model(directory, architecture: str):
    """A random model with weights large enough for predictions to differ, and a BPE of all bytes and some merges."""
    import tokenizers
    import transformers

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(COMMON | MODELS[architecture]))
    model = huggingface.read_config(directory)
    leaves, tree = jax.tree.flatten(decoder.init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = tree.unflatten([leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
    huggingface.save_params(directory, model, params)

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=COMMON["vocab_size"], initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    bpe.train_from_iterator((row["truth"] for row in make_rows(50, 0)), trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def neox(tmp_path_factory):
    """Directory of a tiny random GPT-NeoX with its tokenizer."""
    return make_model(tmp_path_factory.mktemp("models") / "neox", "gpt_neox")


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Directory of a tiny random Llama, its head tied to its embedding, with its tokenizer."""
    return make_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@functools.cache
def load(directory, adapter=None):
    """Config, weights, adapter or None, tokenizer."""
    model, base = huggingface.load_model(str(directory))
    tokenizer = templates.load_tokenizer(str(directory))
    model, weights = huggingface.load_adapter(adapter, model) if adapter else (model, None)
    return model, base, weights, tokenizer


_logits = jax.jit(decoder.logits, static_argnums=0)


def response_logits(loaded, question: str, response: str, *, template="human", eos=True) -> tuple[np.ndarray, list[int]]:
    """The float64 logits of each response token, and the tokens; the row alone at the start of a sequence."""
    model, base, adapter, tokenizer = loaded
    text = f"Human: {question}\n\nAssistant: " if template == "human" else question
    prompt = tokenizer(text)["input_ids"]
    answer = tokenizer(response)["input_ids"] + [tokenizer.eos_token_id] * eos
    tokens = prompt + answer
    padded = jnp.array([tokens + [0] * (model.max_positions - len(tokens))])
    return np.asarray(_logits(model, base, adapter, padded), np.float64)[0, len(prompt) - 1 : len(tokens) - 1], answer


def token_log_probs(*row, **options) -> list[float]:
    """Log-probability of each response token by float64 log-softmax; arguments as in `response_logits`."""
    logits, answer = response_logits(*row, **options)
    log_normalizer = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return (logits[np.arange(len(answer)), answer] - log_normalizer).tolist()


# --------------------------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------------------------


def run_command(name: str, arguments) -> str:
    """What `python -m bilevel_jax.NAME ARGUMENTS` prints; it raises what the command raises."""
    command = importlib.import_module(f"bilevel_jax.{name}.__main__")
    for flag in command.FLAGS:
        command.FLAGS[flag].unparse()
    command.FLAGS([name, *arguments])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        command.main()
    return printed.getvalue()


def call_main(monkeypatch, *arguments) -> None:
    """`python -m bilevel_jax.main ARGUMENTS` in this process, in the current directory; errors raise SystemExit."""
    monkeypatch.setattr(distributed, "join", lambda: None)  # JAX has started already
    monkeypatch.setattr(sys, "argv", ["main", *arguments])  # from which ml_collections reads overrides
    for name in [*main.FLAGS]:
        if name.startswith("config."):  # overrides of an earlier call
            delattr(main.FLAGS, name)
        else:
            main.FLAGS[name].unparse()
    for name, module in [*sys.modules.items()]:  # ml_collections executes a config file in the module of the last one
        if "get_config" in getattr(module, "__dict__", {}):
            monkeypatch.delitem(sys.modules, name)
    cli.parse(sys.argv, main.FLAGS)
    cli.call(main.main)


# --------------------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------------------

NUM_UPPER, NUM_LOWER, HELD_OUT = 13, 25, 4
EPOCHS, EPOCH_STEPS = 2, 6  # batches of 4, the last one of 1
EVERYTHING = {
    "log.tensorboard": True,
    "selection.optimizer": "adam",
    "selection.learning_rate": 0.1,
    "selection.baseline": "running",
    "selection.value_function": "tracked",
    "selection.coefficient_at": "current",  # half the compilation
}


def train_without_report(*arguments) -> dict:
    """`train.run` without report.html, whose pictures take a third of the time of a run of seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write", lambda *_: None)
        return train.run(*arguments)


TRAINED = ("adapter/adapter_model.safetensors", *(f"weights/epoch_{k}.parquet" for k in range(1, EPOCHS + 1)))


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def without(event, prefixes):
    return {key: value for key, value in event.items() if not key.startswith(prefixes)}


def stop_at(monkeypatch, at, number=signal.SIGTERM):
    """A signal to this process after step `at`."""
    dispatched = step_log.StepLog.push

    def dispatch(log, done, *rest):
        dispatched(log, done, *rest)
        if done == at:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(step_log.StepLog, "push", dispatch)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Directory of upper.jsonl and lower.jsonl; every fourth lower row is bad."""
    directory = tmp_path_factory.mktemp("data")
    write_jsonl(directory / "upper.jsonl", make_rows(NUM_UPPER, seed=1))
    write_jsonl(directory / "lower.jsonl", make_rows(NUM_LOWER, seed=2, bad_every=4))
    return directory


@pytest.fixture(scope="session")
def make_config(neox, data):
    """`f({"a.b": value, ...})` -> the config of a run of seconds."""

    def make(changes=()) -> ml_collections.ConfigDict:
        config = configuration.default()
        settings = {
            "num_epochs": EPOCHS,
            "model.path": str(neox),
            "data.upper": str(data / "upper.jsonl"),
            "data.lower": str(data / "lower.jsonl"),
            "data.max_length": 96,
            "eval.num_upper": HELD_OUT,
            "eval.num_lower": HELD_OUT,
            "lora.rank": 2,
            "lora.alpha": 4.0,
            "optimizer.learning_rate": 1e-2,
            "batch.size": 4,
            "batch.micro_size": 2,
            "checkpoint.every": 2,
            "log.every": 2,
            "log.tensorboard": False,
            "eval.similar": False,  # a program more to compile
            "selection.cost": "loss",  # the paper's rule, by which most tests know what must come out
        }
        config.update_from_flattened_dict(settings | dict(changes))
        return config

    return make


@pytest.fixture(scope="session")
def finished(make_config, tmp_path_factory):
    """Workdir of a run that was never interrupted. It carries a second adapter and a moving baseline."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train.run(make_config(EVERYTHING), workdir)
    return workdir


@pytest.fixture(scope="session")
def by_source(make_config, data, tmp_path_factory):
    """Config and workdir of a finished run whose rows share a logit with all rows of their source, of which there are three."""
    directory = tmp_path_factory.mktemp("by_source")
    rows = [row | {"source": "abc"[i % 3]} for i, row in enumerate(read_jsonl(data / "lower.jsonl"))]
    changes = {"selection.unit": "domain", "selection.optimizer": "sgd"}
    config = make_config(changes | {"data.lower": str(write_jsonl(directory / "lower.jsonl", rows))})
    train.run(config, directory / "run")
    return config, directory / "run"


AMORTISED = {
    "selection.parameterization": "features",
    "selection.optimizer": "sgd",
    "selection.coefficient_at": "current",
}


@pytest.fixture(scope="session")
def amortised(make_config, tmp_path_factory):
    """Workdir of a finished run whose logits are a function of features."""
    workdir = tmp_path_factory.mktemp("amortised") / "run"
    train.run(make_config(AMORTISED), workdir)
    return workdir


@pytest.fixture(scope="session")
def make_adapter():
    """`make_adapter(directory, out) -> out`: a random PEFT adapter of the model in `directory` that is not zero."""

    def make(directory, out):
        model = huggingface.read_config(directory, "float32")
        start = lora.init_adapter(model, jax.random.key(0), 3, lora.resolve_targets(model, "all-linear"))
        leaves, tree = jax.tree.flatten(start)
        rng = np.random.default_rng(0)
        drawn = tree.unflatten([leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
        huggingface.save_adapter(out, model, drawn, alpha=6.0, base="tiny")
        return out

    return make
