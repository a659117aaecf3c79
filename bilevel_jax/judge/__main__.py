"""Compares responses with others, by a judge at an OpenAI-compatible endpoint or for AlpacaEval.

    python -m bilevel_jax.judge --prompts=FILE --answers=FILE.jsonl --outputs=model_outputs.json
    python -m bilevel_jax.judge --prompts=FILE --answers=FILE.jsonl --endpoint=https://HOST/v1 --judge=MODEL --out=verdicts.jsonl

`--answers` is a file of `sample` for the same questions; of several samples the first counts. `--out` has one row per verdict. The
same command requests only the missing verdicts.
"""

import itertools
import json
import math
import os
import pathlib
import sys
import threading

from absl import flags

from bilevel_jax import cli
from bilevel_jax.text import say

FLAGS = flags.FlagValues()
PROMPTS = flags.DEFINE_string("prompts", None, "The prompts: files, folders or hub data sets.", required=True, flag_values=FLAGS)
COLUMNS = flags.DEFINE_string(
    "columns", "", "Other names of columns, for example question:query,response:answer.", flag_values=FLAGS
)
ANSWERS = flags.DEFINE_string("answers", None, "File of `sample` for these prompts.", required=True, flag_values=FLAGS)
OUTPUTS = flags.DEFINE_string("outputs", None, "JSON file for the responses in AlpacaEval's format.", flag_values=FLAGS)
GENERATOR = flags.DEFINE_string(
    "generator", None, "Name of the model in --outputs; by default the name of the --answers file.", flag_values=FLAGS
)
AGAINST = flags.DEFINE_string(
    "against", None, "File of `sample` to compare with; by default the responses of --prompts.", flag_values=FLAGS
)
ENDPOINT = flags.DEFINE_string(
    "endpoint", None, "URL before /chat/completions: https://HOST/v1, http://localhost:8000/v1.", flag_values=FLAGS
)
JUDGE = flags.DEFINE_string("judge", None, "Model that judges.", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "JSONL file of verdicts; those in it are not requested again.", flag_values=FLAGS)
SUMMARY = flags.DEFINE_string("summary", None, "JSON file for the win rate and the other metrics.", flag_values=FLAGS)
OPTIONS = flags.DEFINE_string(
    "options", '{"temperature": 0, "max_tokens": 256}', "More fields of a request, as JSON.", flag_values=FLAGS
)
KEY_VARIABLE = flags.DEFINE_string(
    "key_variable", "OPENAI_API_KEY", "Environment variable that holds the key; empty for no key.", flag_values=FLAGS
)
PRICE_IN = flags.DEFINE_float("price_in", None, "Price of a million request tokens.", lower_bound=0, flag_values=FLAGS)
PRICE_OUT = flags.DEFINE_float("price_out", None, "Price of a million reply tokens.", lower_bound=0, flag_values=FLAGS)
YES = flags.DEFINE_bool("yes", False, "Start without a confirmation of the cost.", flag_values=FLAGS)
LIMIT = flags.DEFINE_integer(
    "limit", 0, "Judge a fixed random subset of this many pairs; 0 for all.", lower_bound=0, flag_values=FLAGS
)
CONCURRENCY = flags.DEFINE_integer("concurrency", 8, "Parallel requests.", lower_bound=1, flag_values=FLAGS)
TIMEOUT = flags.DEFINE_float("timeout", 120.0, "Seconds until a request is repeated.", lower_bound=0.01, flag_values=FLAGS)
BACKOFF = flags.DEFINE_float(
    "backoff", 1.0, "Seconds before the first repetition of a request; doubles each time.", lower_bound=0, flag_values=FLAGS
)


OF_JUDGE = ("against", "limit", "options", "price_in", "price_out", "concurrency", "timeout", "backoff", "key_variable", "yes")


def cost(sent: int, received: int) -> str:
    """The cost of tokens, as text."""
    if PRICE_IN.value is None or PRICE_OUT.value is None:
        return "give --price_in and --price_out for the cost"
    total = (sent * PRICE_IN.value + received * PRICE_OUT.value) / 1e6
    return f"cost {total:.4g} at {PRICE_IN.value:g} and {PRICE_OUT.value:g} a million"


def estimate(requests, options: dict) -> str:
    """An upper estimate of the cost of requests, as text: 4 characters per request token, all replies of maximum length."""
    from bilevel_jax.judge import endpoint

    sent = sum(len(request.body["messages"][0]["content"]) for request in requests) // 4
    limit = options.get("max_completion_tokens", options.get("max_tokens"))
    if not endpoint.is_count(limit):
        return f"about {sent} tokens in (4 characters each), tokens out without a limit and not counted; {cost(sent, 0)}"
    received = limit * len(requests)
    return f"about {sent} tokens in (4 characters each), at most {received} out, if none is repeated; {cost(sent, received)}"


def read_options(text: str) -> dict:
    def refuse(constant: str):
        raise ValueError(f"{constant} is no number of JSON")

    try:
        options = json.loads(text, parse_constant=refuse)
        json.dumps(options, allow_nan=False)  # 1e999 is read as infinite
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--options is not JSON ({error})") from error
    if not isinstance(options, dict) or options.keys() & {"model", "messages", "stream", "n"}:
        raise ValueError("--options must be an object without model, messages, stream and n")
    return options


def read_pairs(prompts, answers: list[str], against: str | None) -> list:
    """A `verdicts.Pair` for every prompt with a response to compare with."""
    from bilevel_jax.data import rows
    from bilevel_jax.judge import verdicts

    others = verdicts.answers_to(prompts, against) if against else [prompt.response.strip() for prompt in prompts]
    pairs = [
        verdicts.Pair(prompt.id, verdicts.conversation(prompt), answer, other)
        for prompt, answer, other in zip(prompts, answers, others)
        if against or other
    ]
    if not pairs:
        raise rows.DataError(f"{PROMPTS.value} has no responses to compare with; give --against")
    if len(pairs) < len(prompts):
        say(f"{len(prompts) - len(pairs)} prompts have no response to compare with and are skipped")
    return pairs


def confirmed() -> bool:
    """Asks for a confirmation of the cost on the terminal."""
    if YES.value:
        return True
    if not sys.stdin.isatty():
        raise ValueError("there is no terminal for the confirmation of the cost; give --yes")
    print("go on? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def collect(requests, rows_by_request: dict, out: str, size: int, url: str, chat_options: dict) -> None:
    """Sends requests, and adds each verdict to `rows_by_request` and to the file `out` after its first `size` bytes."""
    import tqdm

    from bilevel_jax import files
    from bilevel_jax.judge import endpoint, verdicts

    stop = threading.Event()
    with open(out, "ab") as file, tqdm.tqdm(total=len(requests), desc="judging", unit="verdict") as bar:
        file.truncate(size)

        def record(row: dict) -> None:
            file.write(files.to_json(row).encode() + b"\n")
            file.flush()
            rows_by_request[row["request"]] = row
            bar.update()

        chat = endpoint.make_chat(url, **chat_options, stop=stop, notice=lambda cause: bar.set_postfix_str(cause[:40]))
        verdicts.judge_all(requests, chat, record, stop=stop, concurrency=CONCURRENCY.value)


def judge(pairs, url: str, model: str, out: str) -> None:
    """Requests the missing verdicts and prints the result."""
    from bilevel_jax.judge import endpoint, verdicts

    endpoint.check_installed()
    options = read_options(OPTIONS.value)
    key = os.environ.get(KEY_VARIABLE.value, "").strip() or None
    endpoint.check_endpoint(url, key)
    rows_by_request, size = verdicts.read_verdicts(pathlib.Path(out))
    requests_of_pairs = [verdicts.make_requests(pair, model, options) for pair in pairs]
    requests = {request.hash: request for orders in requests_of_pairs for request in orders}
    missing = [request for name, request in requests.items() if name not in rows_by_request]
    say(f"{len(pairs)} pairs, {len(requests)} verdicts, {len(requests) - len(missing)} of them in {out}")
    if missing:
        authorization = f"with the key in {KEY_VARIABLE.value}" if key else "without a key"
        say(f"{len(missing)} requests to {model} at {url} {authorization}")
        say(estimate(missing, options), flush=True)
        if not confirmed():
            return
        collect(missing, rows_by_request, out, size, url, {"key": key, "timeout": TIMEOUT.value, "backoff": BACKOFF.value})
    winners = [
        tuple(rows_by_request[request.hash]["winner"] for request in orders) or (verdicts.TIE,) * 2 for orders in requests_of_pairs
    ]
    print_result(pairs, winners, [rows_by_request[name]["tokens"] for name in requests])


def print_result(pairs, winners, tokens) -> None:
    """Prints the table, and writes `--summary`.

    Args:
      tokens: (request tokens, reply tokens) of every verdict.
    """
    from bilevel_jax import files
    from bilevel_jax.judge import verdicts

    sent, received = (sum(counts[i] for counts in tokens) for i in (0, 1))
    say(f"\n{ANSWERS.value} against {AGAINST.value or 'the responses of ' + PROMPTS.value}, judged by {JUDGE.value}")
    metrics = verdicts.summarize(pairs, winners)
    say(verdicts.table(metrics))
    if SUMMARY.value:
        files.write_atomically(pathlib.Path(SUMMARY.value), files.to_json(metrics, indent=2) + "\n")
    say(f"  {'tokens in and out, says the endpoint':<40}{f'{sent}, {received}':>20}; {cost(sent, received)}")


def main() -> None:
    from bilevel_jax import files
    from bilevel_jax.data import parts, rows
    from bilevel_jax.judge import verdicts

    for flag in (PRICE_IN, PRICE_OUT, TIMEOUT, BACKOFF):
        if flag.value is not None and not math.isfinite(flag.value):
            raise ValueError(f"--{flag.name}={flag.value} must be a finite number")
    values = [flag.value for flag in (ENDPOINT, JUDGE, OUT)]
    if any(values) and not all(values):
        raise ValueError("--endpoint, --judge and --out belong together")
    if SUMMARY.value and not all(values):
        raise ValueError("--summary goes with --endpoint, --judge and --out")
    cli.refuse_without(FLAGS, "endpoint", OF_JUDGE)
    cli.refuse_without(FLAGS, "outputs", ["generator"])
    if not any(values) and not OUTPUTS.value:
        raise ValueError("give --outputs for AlpacaEval's file, or --endpoint, --judge and --out for verdicts")
    for out in (OUTPUTS, SUMMARY):  # a file of --out is refused where it has no verdicts
        if out.value:
            parts.refuse_overwriting(out.value, f"--{out.name}", PROMPTS.value, ANSWERS.value, *filter(None, [AGAINST.value]))
    written = [(flag.name, os.path.realpath(flag.value)) for flag in (OUT, OUTPUTS, SUMMARY) if flag.value]
    for (first, path), (second, other_path) in itertools.combinations(written, 2):
        if path == other_path:
            raise ValueError(f"--{first} and --{second} are the same file; name another one")
    prompts, report = rows.read_rows(PROMPTS.value, questions_only=True, columns=COLUMNS.value)
    if report.rejections or report.notes():
        say("\n".join(report.summary()))
    answers = verdicts.answers_to(prompts, ANSWERS.value)
    if OUTPUTS.value:
        generator = GENERATOR.value or pathlib.Path(ANSWERS.value).stem
        outputs = verdicts.alpaca_eval_outputs(prompts, answers, generator)
        files.write_atomically(pathlib.Path(OUTPUTS.value), files.to_json(outputs, indent=2) + "\n")
        say(f"{OUTPUTS.value}: {len(outputs)} answers of {generator}, {answers.count('')} of them empty")
    if ENDPOINT.value and JUDGE.value and OUT.value:
        pairs = read_pairs(prompts, answers, AGAINST.value)
        some = sorted(pairs)[: LIMIT.value] if LIMIT.value else pairs  # ids are hashes, so their order is random
        judge(some, ENDPOINT.value, JUDGE.value, OUT.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)
