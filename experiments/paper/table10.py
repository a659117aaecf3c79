"""Table 10: win rate of a trained model over the base model: `python -m experiments.table10 --tier=tiny --seeds=4`.

The questions are the held-out trusted ones of the quality task; decoding is greedy. For generated rows the right answer is known:
the model that gives it wins, and both or neither is a tie. Other rows need an LLM judge (`bilevel_jax.judge`): --endpoint, --judge.
"""

import functools
import json
import pathlib

import tqdm
from absl import flags

from bilevel_jax import cli, files
from bilevel_jax.data import levels, rows, templates
from bilevel_jax.judge import verdicts
from bilevel_jax.models import huggingface
from bilevel_jax.runtime.workdir import read_config
from experiments import comparing, tables
from experiments.paper import published

FLAGS = flags.FlagValues()
ENDPOINT = flags.DEFINE_string("endpoint", None, "URL before /chat/completions; the key is in OPENAI_API_KEY.", flag_values=FLAGS)
JUDGE = flags.DEFINE_string("judge", None, "Name of the judge model.", flag_values=FLAGS)

PAPER = {"mixing, ρ=0.5": ("0.724",), "offline": ("0.787",), "online, R=10%": ("0.823",)}  # Llama-3-8B, judged by GPT-4 Turbo
CONTROLS = ("mixing, ρ=1", "uniform ω, offline", "online, r ≡ 1", "online, stale", "bds, Adam 1e-4")
EFFECTS = comparing.Paper(comparing.paper_values(PAPER, ("win_rate",)), relative=False)
COLUMNS = {"win rate": "win_rate", "win rate, ties left out": "decided", "right": "right", "right, base model": "right_base"}
CLAIMS = tuple(
    comparing.Claim(f"{cell} above {than}, {heading}", cell, than, key, higher=True)
    for cell, than in (
        ("offline", "mixing, ρ=0.5"),
        ("online, R=10%", "offline"),
        ("offline", "uniform ω, offline"),
        ("online, R=10%", "online, stale"),
    )
    for heading, key in (("win rate", "win_rate"), ("ties left out", "decided"))
)


def held_out(workdir: pathlib.Path) -> list[rows.Row]:
    """The held-out trusted rows of a run."""
    config = read_config(workdir)
    tokenizer = templates.load_tokenizer(str(huggingface.locate(config.model.path)))
    return levels.load_level(config, "upper", tokenizer).eval_rows


def write_prompts(run: comparing.Run, seed: int) -> pathlib.Path:
    """The file with the held-out trusted rows of a seed, which all cells share."""
    folder = run.workdir.parent.parent / f"held_out_{seed}"
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        folder.mkdir(exist_ok=True)
        lines = [json.dumps({"question": row.question, "response": row.response}) for row in held_out(run.workdir)]
        files.write_atomically(prompts, "\n".join(lines) + "\n")
    return prompts


def answer(run: comparing.Run, prompts: pathlib.Path, base: pathlib.Path) -> pathlib.Path:
    """Returns the file of a run's answers; writes the answers of the base model to `base`."""
    config = read_config(run.workdir)
    shared = [f"--model={config.model.path}", f"--prompts={prompts}", "--temperature=0", f"--dtype={config.model.dtype}"]
    shared += [f"--template={config.data.template}", f"--max_new_tokens={config.online.max_new_tokens}"]
    tables.once(base, "bilevel_jax.sample", *shared, f"--out={base}")
    out = run.workdir / "answers.jsonl"
    return tables.once(out, "bilevel_jax.sample", *shared, f"--out={out}", f"--adapter={run.workdir / 'adapter'}")


def by_truth(pair: verdicts.Pair, truth: str) -> str:
    """The winner: the model that gives the right answer."""
    answer_right, other_right = pair.answer == truth, pair.against == truth
    return verdicts.TIE if answer_right == other_right else verdicts.ANSWERS if answer_right else verdicts.AGAINST


def compare(run: comparing.Run, prompts: pathlib.Path, base: pathlib.Path) -> None:
    """Adds the win rate to the run's values."""
    file = answer(run, prompts, base)
    if ENDPOINT.value:
        summary = run.workdir / "win_rate.json"
        arguments = [f"--prompts={prompts}", f"--answers={file}", f"--against={base}", f"--endpoint={ENDPOINT.value}", "--yes"]
        arguments += [f"--judge={JUDGE.value}", f"--out={run.workdir / 'verdicts.jsonl'}", f"--summary={summary}"]
        metrics = json.loads(tables.once(summary, "bilevel_jax.judge", *arguments).read_text())
    else:
        questions, _ = rows.read_rows(str(prompts))
        answers, others = verdicts.answers_to(questions, str(file)), verdicts.answers_to(questions, str(base))
        pairs = [verdicts.Pair(row.id, row.question, *texts) for row, *texts in zip(questions, answers, others)]
        metrics = verdicts.summarize(pairs, [(by_truth(pair, row.response.strip()),) * 2 for pair, row in zip(pairs, questions)])
        truths = [row.response.strip() for row in questions]
        for key, texts in (("right", answers), ("right_base", others)):
            run.values[key] = sum(map(str.__eq__, texts, truths)) / len(truths)
    decided = metrics["wins"] + metrics["losses"]
    run.values.update(win_rate=metrics["win_rate"], decided=metrics["wins"] / decided if decided else 0.5)


def main() -> None:
    generated = tables.TIER.value in published.GENERATED
    if generated == bool(ENDPOINT.value) or bool(ENDPOINT.value) != bool(JUDGE.value):
        raise ValueError("generated rows are compared with the right answers; any other tier needs --endpoint and --judge")
    results = tables.run("quality", [*PAPER, *CONTROLS])
    runs = [(seed, run) for by_seed in results.runs.values() for seed, run in by_seed.items()]
    for seed, run in tqdm.tqdm(runs, desc="answering", unit="run"):
        prompts = write_prompts(run, seed)
        compare(run, prompts, prompts.with_name("base.jsonl"))
    lines = comparing.rows(results, COLUMNS, PAPER, ("win rate",))
    columns = {heading: key for heading, key in COLUMNS.items() if key != "right_base"}
    draw = functools.partial(comparing.dots, results=results, columns=columns, published=PAPER)
    tables.write("table10", "Table 10: win rate over the base model", [results], lines, CLAIMS, draw, (8.0, 2.8), paper=EFFECTS)


if __name__ == "__main__":
    cli.run(main, tables.FLAGS, FLAGS)
