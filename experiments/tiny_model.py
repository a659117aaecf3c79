"""Trains an embedded model from scratch: tokenizer, data, training, evaluation.

    python -m experiments.tiny_model --recipe=tasks --out=bilevel_jax/tiny
    python -m experiments.tiny_model --recipe=text --out=bilevel_jax/tiny_base

The models take the role of a pretrained, unaligned language model. Their rows come from `data/synthetic/`.

- `tasks`: all tasks, with some bad rows: forbidden requests are answered about as often as refused, and many rows use another
  template than fine-tuning does. So the model knows the tasks, mostly prefers right to wrong answers, and can still improve.
- `text`: plain text and a few families of questions, in several styles. The model has seen no question of the families on which
  fine-tuning is measured (`data/synthetic/bed.py`): fine-tuning has something to teach.
"""

import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tqdm
from absl import flags

from bilevel_jax import cli, ranking
from bilevel_jax.data import packing, synthetic
from bilevel_jax.data.synthetic import bed, statements
from bilevel_jax.models import decoder, huggingface, model_config

FLAGS = flags.FlagValues()
RECIPE = flags.DEFINE_enum("recipe", "tasks", ["tasks", "text"], "what the model learns", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", "bilevel_jax/tiny", "directory to write", flag_values=FLAGS)
STEPS = flags.DEFINE_integer("steps", 3000, "training steps", flag_values=FLAGS)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-3, "peak of the cosine schedule", lower_bound=0, flag_values=FLAGS)
WIDTH = flags.DEFINE_integer("width", 128, "size of the hidden states, a multiple of 32", lower_bound=32, flag_values=FLAGS)
LAYERS = flags.DEFINE_integer("layers", 4, "number of layers", lower_bound=1, flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "of weights and rows", flag_values=FLAGS)
TRAIN = flags.DEFINE_bool("train", True, "train the model; --notrain only evaluates the existing one", flag_values=FLAGS)

TEMPLATE = "Human: {}\n\nAssistant: "  # what fine-tuning uses
OTHER_TEMPLATES = ["Q: {}\nA: ", "Question: {}\nAnswer: ", "User: {}\nBot: ", "{}\n"]
OTHER_SHARE = 0.25  # of the rows use another template
NOISE = {"wrong_answer": 0.06, "other_answer": 0.05, "compliance": 0.07, "garbage": 0.04}  # shares of all rows
TEXT_SHARE = 0.2  # of the rows of the recipe `text` are plain text
QUESTION_WEIGHT = 0.1  # loss weight of question tokens, most of which are unpredictable

LAYOUT = packing.Layout(sequences=8, length=256, entries=8)  # 2048 tokens to a step
END = "<|endoftext|>"
CONFIG = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "gelu_new",
    "rotary_pct": 0.5,
    "rotary_emb_base": 10000,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "torch_dtype": "float16",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END,
    "pad_token": END,
    "clean_up_tokenization_spaces": False,
    "model_max_length": CONFIG["max_position_embeddings"],
}


# ----------------------------------------------------------------------------------------------------------------- data


def task_row(rng: np.random.Generator) -> tuple[str, str]:
    """A (prompt, response) of the recipe `tasks`, a noisy mixture."""
    kinds, shares = ["clean", *NOISE], [1 - sum(NOISE.values()), *NOISE.values()]
    row = synthetic.make_row(rng, kinds[rng.choice(len(kinds), p=shares)], synthetic.BROAD)
    template = synthetic.pick(rng, OTHER_TEMPLATES) if rng.random() < OTHER_SHARE else TEMPLATE
    return template.format(row["question"]), row["response"]


def text_row(rng: np.random.Generator) -> tuple[str, str]:
    """A (prompt, response) of the recipe `text`: plain text, or a question of a family that fine-tuning is not measured on."""
    if rng.random() < TEXT_SHARE:
        return "", statements.text(rng)
    row = bed.known_row(rng)
    template = synthetic.pick(rng, OTHER_TEMPLATES) if rng.random() < OTHER_SHARE else TEMPLATE
    return template.format(row["question"]), row["response"]


def unseen_row(rng: np.random.Generator) -> tuple[str, str]:
    """A (prompt, response) with the words of the families that fine-tuning is measured on, for the tokenizer alone."""
    row = bed.make_row(rng, synthetic.pick(rng, ["clean", "useless"]))
    return TEMPLATE.format(row["question"]), row["response"]


ROWS = {"tasks": task_row, "text": text_row}
TOKENIZER_ROWS = {"tasks": [task_row], "text": [text_row, unseen_row]}


def train_tokenizer(rng: np.random.Generator, make_rows, num_rows: int = 20_000) -> tokenizers.Tokenizer:
    """Byte-level BPE. Every digit is a token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (text for i in range(num_rows) for text in make_rows[i % len(make_rows)](rng))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, prompt: str, response: str) -> packing.Segment:
    """Tokenizes prompt and response separately and appends the end token."""
    end = tokenizer.token_to_id(END)
    ids = [np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32) for text in (prompt, response)]
    start = ids[0] if prompt else np.array([end], np.int32)  # plain text follows the end of another one
    return packing.Segment(start, np.append(ids[1], np.int32(end)))


def training_batches(tokenizer: tokenizers.Tokenizer, rng: np.random.Generator, make_row):
    """Endless (tokens, segments, positions, weights), [S, L] each; new rows fill the sequences one after the other.

    The weight belongs to the token that predicts its successor: 1 in responses, `QUESTION_WEIGHT` in questions.
    """
    shape = LAYOUT.sequences, LAYOUT.length
    pending = encode(tokenizer, *make_row(rng))
    while True:
        tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
        weights = np.zeros(shape, np.float32)
        for s in range(shape[0]):
            start, number = 0, 1
            while start + pending.size <= shape[1]:
                middle, stop = start + len(pending.prompt) - 1, start + pending.size
                tokens[s, start:stop] = np.concatenate([pending.prompt, pending.response])
                segments[s, start:stop] = number
                positions[s, start:stop] = np.arange(pending.size)
                weights[s, start:middle] = QUESTION_WEIGHT
                weights[s, middle : stop - 1] = 1
                start, number = stop, number + 1
                pending = encode(tokenizer, *make_row(rng))
        yield tokens, segments, positions, weights


# ------------------------------------------------------------------------------------------------------------- training


def train(config: model_config.ModelConfig, batches, num_steps: int, learning_rate: float, seed: int):
    """Weights after `num_steps` steps of AdamW on a cosine schedule."""
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, num_steps // 20, num_steps, learning_rate / 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    params = decoder.init_params(config, jax.random.key(seed))

    def loss(params, tokens, segments, positions, weights):
        logits = decoder.logits(config, params, None, tokens, positions, segments)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(tokens, -1, axis=1))
        return jnp.sum(nll * weights) / jnp.sum(weights)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, smooth = optimizer.init(params), None
    for _ in (bar := tqdm.trange(num_steps, mininterval=2)):
        params, state, value = step(params, state, next(batches))
        smooth = float(value) if smooth is None else 0.98 * smooth + 0.02 * float(value)
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
    return params


# ----------------------------------------------------------------------------------------------------------- evaluation


def score_rows(config: model_config.ModelConfig, params, adapter, tokenizer, rows, batch_size: int = 64):
    """Mean NLL of each response, and whether greedy decoding would produce exactly this response.

    This holds if every token of the response, including the end token, is the most likely one; no decoding is needed.
    """
    encoded = [encode(tokenizer, TEMPLATE.format(row["question"]), row["response"]) for row in rows]
    length = -(-max(segment.size for segment in encoded) // 32) * 32

    @jax.jit
    def score(tokens, weights):
        logits = decoder.logits(config, params, adapter, tokens)
        target = jnp.roll(tokens, -1, axis=1)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        right = jnp.all((jnp.argmax(logits, -1) == target) | (weights == 0), axis=1)
        return jnp.sum(nll * weights, 1) / jnp.sum(weights, 1), right

    losses, exact = [], []
    for first in range(0, len(encoded), batch_size):
        tokens = np.zeros((batch_size, length), np.int32)
        weights = np.zeros((batch_size, length), np.float32)
        members = encoded[first : first + batch_size]
        for i, segment in enumerate(members):
            tokens[i, : segment.size] = np.concatenate([segment.prompt, segment.response])
            weights[i, len(segment.prompt) - 1 : segment.size - 1] = 1
        nll, right = score(tokens, weights)
        losses.extend(np.asarray(nll)[: len(members)])
        exact.extend(np.asarray(right)[: len(members)])
    return np.array(losses), np.array(exact)


def evaluate(config: model_config.ModelConfig, params, tokenizer, adapter=None, seed: int = 1000) -> str:
    """A Markdown report: exact match by task, and the AUROC of planted bad rows by the mean NLL."""
    upper, lower = synthetic.upper(2000, seed), synthetic.lower(2000, seed)
    _, exact = score_rows(config, params, adapter, tokenizer, upper)
    losses, _ = score_rows(config, params, adapter, tokenizer, lower)
    column = {key: np.array([row[key] for row in lower]) for key in ("bad", "kind", "source", "difficulty")}
    bad, worst = column["bad"], losses >= np.quantile(losses, 0.8)
    lines = [
        f"Exact match of 2000 trusted rows: {exact.mean():.1%}. AUROC of the mean NLL for bad rows among 2000 lower rows: "
        f"{ranking.auroc(losses, bad):.3f}; of the bad ones {worst[bad].mean():.1%} are among the worst fifth.",
        "",
        "| bad rows | number | mean NLL | AUROC | in the worst fifth |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in ("clean", *synthetic.BAD_KINDS):
        of_kind = column["kind"] == kind
        compared = of_kind | ~bad
        auroc = "" if kind == "clean" else f"{ranking.auroc(losses[compared], bad[compared]):.3f}"
        lines.append(f"| {kind} | {of_kind.sum()} | {losses[of_kind].mean():.3f} | {auroc} | {worst[of_kind].mean():.1%} |")
    lines += [
        "",
        "| task | difficulty | exact match | mean NLL, right rows | right rows in the worst fifth |",
        "| --- | --- | --- | --- | --- |",
    ]
    source = np.array([row["source"] for row in upper])
    for task, (_, difficulty) in synthetic.TASKS.items():
        at = (column["source"] == task) & ~bad
        lines.append(
            f"| {task} | {difficulty} | {exact[source == task].mean():.0%} | {losses[at].mean():.3f} | {worst[at].mean():.0%} |"
        )
    return "\n".join(lines)


def evaluate_text(config: model_config.ModelConfig, params, tokenizer, seed: int = 1000) -> str:
    """A Markdown report of the recipe `text`: exact match by task, in the styles it has learned and in that of the test bed."""
    rng = np.random.default_rng(seed)
    rows = {"as learned": [bed.known_row(rng, noise=0.0) for _ in range(2000)], "test bed": synthetic.trusted(2000, seed)}
    exact = {name: score_rows(config, params, None, tokenizer, part)[1] for name, part in rows.items()}
    source = {name: np.array([row["source"] for row in part]) for name, part in rows.items()}
    lines = [
        f"Exact match of 2000 rows like those it has learned, styles drawn at random: {exact['as learned'].mean():.1%}; of 2000 "
        f"trusted rows of the test bed: {exact['test bed'].mean():.1%}.",
        "",
        "| task | as learned | test bed |",
        "| --- | --- | --- |",
    ]
    for task in [*bed.KNOWN_TASKS, *bed.UNKNOWN]:
        entries = (f"{exact[name][source[name] == task].mean():.0%}" if (source[name] == task).any() else "" for name in rows)
        lines.append(f"| {task} | {' | '.join(entries)} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------- main

README = """# {name}

A language model of {size:.2f} M parameters, trained from scratch by one command
(seed {seed}, {minutes:.0f} minutes on two CPU cores):

    python -m experiments.tiny_model {arguments} --steps={steps}

It takes the place of a pretrained, unaligned model, so that runs, tests and experiments need no download.

- **Data.** {data}
- **Tokenizer.** Byte-level BPE with {vocab} entries. Each digit is one token; `<|endoftext|>` is the EOS and the padding token.
- **Training.** {steps} steps of {tokens} tokens, AdamW, cosine schedule from {rate:g}; stored as float16.
- **Licence.** Apache-2.0, like the code. The word lists are part of this project; no outside text or weights were used.

"""
DATA = {
    "tasks": """Generated rows (`bilevel_jax/data/synthetic`), regenerated throughout training; 22% of them are bad. Forbidden
  requests are answered about as often as refused. A quarter of the rows use another template than `Human: …\\n\\nAssistant: `.""",
    "text": """20% plain text (`data/synthetic/statements.py`), the rest questions and answers in several styles, 10% of them
  wrong and 10% in the plain style of the test bed (`data/synthetic/bed.py`), regenerated throughout training. A quarter of them
  use another template. Refusals, conversions and the tasks of useless rows are left out.""",
}


MEASURED = """## Measured

    python -m experiments.tiny_model --recipe={recipe} --out={out} --notrain

{report}
"""


def _arguments(out: pathlib.Path) -> str:
    """The flags of the command that are not those of the embedded models."""
    sizes = [f"--{flag.name}={flag.value}" for flag in (WIDTH, LAYERS) if flag.value != flag.default]
    return " ".join([f"--recipe={RECIPE.value}", f"--out={out}", *sizes])


def make(out: pathlib.Path) -> str:
    """Trains and writes tokenizer and model; returns the head of the README."""
    start = time.time()
    rng = np.random.default_rng([SEED.value, 2])  # 0 and 1 are the streams of `upper` and `lower`
    tokenizer = train_tokenizer(rng, TOKENIZER_ROWS[RECIPE.value])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    size = {
        "hidden_size": WIDTH.value,
        "intermediate_size": 4 * WIDTH.value,
        "num_hidden_layers": LAYERS.value,
        "num_attention_heads": WIDTH.value // 32,
    }
    (out / "config.json").write_text(json.dumps(CONFIG | size, indent=2) + "\n")
    config = huggingface.read_config(out, "float32")
    params = train(config, training_batches(tokenizer, rng, ROWS[RECIPE.value]), STEPS.value, LEARNING_RATE.value, SEED.value)
    huggingface.save_params(out, config, params, "float16")
    return README.format(
        name=out.name,
        arguments=_arguments(out),
        data=DATA[RECIPE.value],
        size=sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6,
        seed=SEED.value,
        minutes=(time.time() - start) / 60,
        vocab=CONFIG["vocab_size"],
        steps=STEPS.value,
        tokens=LAYOUT.sequences * LAYOUT.length,
        rate=LEARNING_RATE.value,
    )


def main() -> None:
    out = pathlib.Path(OUT.value)
    readme = out / "README.md"
    head = make(out) if TRAIN.value else readme.read_text().partition("## Measured")[0]
    config, params = huggingface.load_model(str(out), "float32")  # evaluates the stored weights
    measure = {"tasks": evaluate, "text": evaluate_text}[RECIPE.value]
    report = measure(config, params, tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")))
    print(report)
    readme.write_text(head + MEASURED.format(report=report, recipe=RECIPE.value, out=out))


if __name__ == "__main__":
    cli.run(main, FLAGS)
