"""Compares answers with others: `python -m bilevel_jax.judge --prompts=FILE --answers=FILE.jsonl ...`.

    --outputs=model_outputs.json                                    what `alpaca_eval --model_outputs` reads
    --endpoint=https://HOST/v1 --judge=MODEL --out=verdicts.jsonl   a win rate by any endpoint that speaks OpenAI's protocol

Answers are what `sample` wrote for the same prompts; of several samples the first counts. They are judged against another such file
(`--against`), or against the responses of the prompts file. Nothing is asked before the number of requests and their cost are told
and agreed to. Every verdict is appended to `--out` when it arrives, as `{"request", "id", "first", "judge", "winner", "reply",
"tokens"}` (`first` and `winner`: `answers`, `against`, or `tie`; `winner` null: none could be read), and the same command asks only
for those that are missing. How verdicts become a win rate: `judging.py`.
"""

import json
import os
import pathlib
import sys
import threading

from absl import flags

from bilevel_jax import cli

FLAGS = flags.FlagValues()
PROMPTS = flags.DEFINE_string(
    "prompts", None, "The rows that were answered: a file or hub data set.", required=True, flag_values=FLAGS
)
ANSWERS = flags.DEFINE_string("answers", None, "What `sample` wrote for them.", required=True, flag_values=FLAGS)
OUTPUTS = flags.DEFINE_string("outputs", None, "JSON file to write the answers to in AlpacaEval's format.", flag_values=FLAGS)
GENERATOR = flags.DEFINE_string(
    "generator", None, "Name of what gave the answers, for --outputs; else the name of their file.", flag_values=FLAGS
)
AGAINST = flags.DEFINE_string(
    "against", None, "What `sample` wrote with another model; else the responses of the prompts file.", flag_values=FLAGS
)
ENDPOINT = flags.DEFINE_string(
    "endpoint", None, "What comes before /chat/completions: https://HOST/v1, http://localhost:8000/v1.", flag_values=FLAGS
)
JUDGE = flags.DEFINE_string("judge", None, "The model to ask there.", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "JSONL file of verdicts; those in it are not asked for again.", flag_values=FLAGS)
SUMMARY = flags.DEFINE_string("summary", None, "JSON file to write the win rate and what else is measured to.", flag_values=FLAGS)
OPTIONS = flags.DEFINE_string(
    "options", '{"temperature": 0, "max_tokens": 256}', "More fields of a request, as JSON.", flag_values=FLAGS
)
KEY_VARIABLE = flags.DEFINE_string(
    "key_variable", "OPENAI_API_KEY", "Environment variable that holds the key; empty for no key.", flag_values=FLAGS
)
PRICE_IN = flags.DEFINE_float("price_in", None, "Price of a million tokens of the requests.", lower_bound=0, flag_values=FLAGS)
PRICE_OUT = flags.DEFINE_float("price_out", None, "Price of a million tokens of the replies.", lower_bound=0, flag_values=FLAGS)
YES = flags.DEFINE_bool("yes", False, "Ask without waiting for a person to agree to the cost.", flag_values=FLAGS)
LIMIT = flags.DEFINE_integer(
    "limit", 0, "Judge a random part of this many pairs, the same every time; 0 for all.", lower_bound=0, flag_values=FLAGS
)
CONCURRENCY = flags.DEFINE_integer("concurrency", 8, "Requests at a time.", lower_bound=1, flag_values=FLAGS)
TIMEOUT = flags.DEFINE_float(
    "timeout", 120.0, "Seconds of silence after which a request is repeated.", lower_bound=0.01, flag_values=FLAGS
)
BACKOFF = flags.DEFINE_float(
    "backoff", 1.0, "Seconds before a request is repeated for the first time; doubles.", lower_bound=0, flag_values=FLAGS
)


def cost(sent: int, received: int) -> str:
    """The cost of tokens, for a person."""
    if PRICE_IN.value is None or PRICE_OUT.value is None:
        return "--price_in and --price_out would tell the cost"
    total = (sent * PRICE_IN.value + received * PRICE_OUT.value) / 1e6
    return f"cost {total:.4g} at {PRICE_IN.value:g} and {PRICE_OUT.value:g} a million"


def estimate(asks, options: dict) -> str:
    """What requests may take, for a person: tokens in at 4 characters each, tokens out at their limit, nothing repeated."""
    sent = sum(len(ask.body["messages"][0]["content"]) for ask in asks) // 4
    limit = options.get("max_completion_tokens", options.get("max_tokens"))
    if not isinstance(limit, int):
        return f"about {sent} tokens in (4 characters each), tokens out without a limit and not counted; {cost(sent, 0)}"
    received = limit * len(asks)
    return f"about {sent} tokens in (4 characters each), at most {received} out, if none is repeated; {cost(sent, received)}"


def read_options(text: str) -> dict:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--options is not JSON ({error})") from error
    if not isinstance(options, dict) or options.keys() & {"model", "messages", "stream", "n"}:
        raise ValueError("--options must be an object without model, messages, stream and n")
    return options


def read_pairs(prompts, answers: list[str], against: str | None) -> list:
    """A `judging.Pair` for every prompt that has something to be compared with."""
    from bilevel_jax.data import rows
    from bilevel_jax.judge import verdicts as judging

    others = judging.answers_to(prompts, against) if against else [prompt.response.strip() for prompt in prompts]
    pairs = [
        judging.Pair(prompt.id, judging.conversation(prompt), answer, other)
        for prompt, answer, other in zip(prompts, answers, others)
        if against or other
    ]
    if not pairs:
        raise rows.DataError(f"{PROMPTS.value} holds no responses to compare with; give --against")
    if len(pairs) < len(prompts):
        print(f"{len(prompts) - len(pairs)} prompts have no response to compare with and are left out")
    return pairs


def agreed() -> bool:
    """Whether the person at the terminal wants to go on."""
    if YES.value:
        return True
    if not sys.stdin.isatty():
        raise ValueError("there is no terminal to agree to the cost; give --yes")
    print("go on? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def collect(asks, verdicts: dict, size: int, chat_options: dict) -> None:
    """Asks, and adds every verdict to `verdicts` and to the file, behind its first `size` bytes."""
    import tqdm

    from bilevel_jax.judge import endpoint
    from bilevel_jax.judge import verdicts as judging

    stop = threading.Event()
    with open(OUT.value, "ab") as file, tqdm.tqdm(total=len(asks), desc="judging", unit="verdict") as bar:
        file.truncate(size)

        def keep(verdict: dict) -> None:
            file.write(json.dumps(verdict).encode() + b"\n")
            file.flush()
            verdicts[verdict["request"]] = verdict
            bar.update()

        ask = endpoint.make_chat(
            ENDPOINT.value, **chat_options, stop=stop, notice=lambda trouble: bar.set_postfix_str(trouble[:40])
        )
        judging.judge_all(asks, ask, keep, stop=stop, concurrency=CONCURRENCY.value)


def judge(pairs) -> None:
    """Asks for the verdicts that are missing and prints the result."""
    from bilevel_jax import files
    from bilevel_jax.judge import endpoint
    from bilevel_jax.judge import verdicts as judging

    options = read_options(OPTIONS.value)
    key = os.environ.get(KEY_VARIABLE.value, "").strip() or None
    endpoint.check_endpoint(ENDPOINT.value, key)
    verdicts, size = judging.read_verdicts(pathlib.Path(OUT.value))
    both = [judging.make_asks(pair, JUDGE.value, options) for pair in pairs]
    asks = {ask.request: ask for orders in both for ask in orders}
    missing = [ask for request, ask in asks.items() if request not in verdicts]
    print(f"{len(pairs)} pairs, {len(asks)} verdicts, {len(asks) - len(missing)} of them in {OUT.value}")
    if missing:
        whose = f"with the key in {KEY_VARIABLE.value}" if key else "without a key"
        print(f"{len(missing)} requests to {JUDGE.value} at {ENDPOINT.value} {whose}")
        print(estimate(missing, options), flush=True)
        if not agreed():
            return
        collect(missing, verdicts, size, {"key": key, "timeout": TIMEOUT.value, "backoff": BACKOFF.value})
    winners = [tuple(verdicts[ask.request]["winner"] for ask in orders) or (judging.TIE,) * 2 for orders in both]
    sent, received = (sum(verdicts[request]["tokens"][place] for request in asks) for place in (0, 1))
    print(f"\n{ANSWERS.value} against {AGAINST.value or 'the responses of ' + PROMPTS.value}, judged by {JUDGE.value}")
    found = judging.summarize(pairs, winners)
    print(judging.table(found))
    if SUMMARY.value:
        told = {key: None if value != value else value for key, value in found.items()}  # JSON has no NaN
        files.write_atomically(pathlib.Path(SUMMARY.value), json.dumps(told, indent=2) + "\n")
    print(f"  {'tokens in and out, says the endpoint':<40}{f'{sent}, {received}':>20}; {cost(sent, received)}")


def main() -> None:
    from bilevel_jax import files
    from bilevel_jax.data import rows
    from bilevel_jax.judge import verdicts as judging

    wanted = [flag.value for flag in (ENDPOINT, JUDGE, OUT)]
    if any(wanted) and not all(wanted):
        raise ValueError("--endpoint, --judge and --out belong together")
    if SUMMARY.value and not all(wanted):
        raise ValueError("--summary goes with --endpoint, --judge and --out")
    if not any(wanted) and not OUTPUTS.value:
        raise ValueError("give --outputs for AlpacaEval's file, or --endpoint, --judge and --out for verdicts")
    prompts, report = rows.read_rows(PROMPTS.value, questions_only=True)
    if report.rejections:
        print("\n".join(report.summary()))
    answers = judging.answers_to(prompts, ANSWERS.value)
    if OUTPUTS.value:
        generator = GENERATOR.value or pathlib.Path(ANSWERS.value).stem
        outputs = judging.alpaca_eval_outputs(prompts, answers, generator)
        files.write_atomically(pathlib.Path(OUTPUTS.value), json.dumps(outputs, indent=2) + "\n")
        print(f"{OUTPUTS.value}: {len(outputs)} answers of {generator}, {answers.count('')} of them empty")
    if any(wanted):
        pairs = read_pairs(prompts, answers, AGAINST.value)
        judge(sorted(pairs)[: LIMIT.value] if LIMIT.value else pairs)  # ids are hashes: their order is random


if __name__ == "__main__":
    cli.run(main, FLAGS)
