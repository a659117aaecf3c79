"""The dry run: counts and tokens by hand, extrapolated times by formula, and nothing written."""

import dataclasses
import re

import numpy as np
import pytest

from bilevel_jax import checks, errors
from bilevel_jax import setup as setups
from bilevel_jax.data import templates
from bilevel_jax.data.prepared import sequences
from bilevel_jax.planning import dry_run
from bilevel_jax.runtime import disk, workdir
from tests.conftest import make_rows, write_jsonl

LONG = {"question": "Long?", "response": "no " * 200}  # cut to 96 tokens
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
REPEATED = {"question": "Twice?", "response": "Yes."}


@pytest.fixture(scope="module")
def config(make_config, tmp_path_factory):
    """Two schemas, an unusable row, a row three times, one on both levels, one that is cut; all rows are trained on.

    There are as many rows as in other runs of the tests, which share the compiled step.
    """
    directory = tmp_path_factory.mktemp("rows")
    upper = make_rows(5, seed=1) + [REPEATED]
    lower = [CHAT, *make_rows(16, seed=2), LONG, {"question": "No response?"}, REPEATED, REPEATED, REPEATED]
    return make_config(
        {
            "data.upper": str(write_jsonl(directory / "upper.jsonl", upper)),
            "data.lower": str(write_jsonl(directory / "lower.jsonl", lower)),
            "eval.num_upper": 0,
            "eval.num_lower": 0,
        }
    )


@pytest.fixture(scope="module")
def parts(config, tmp_path_factory):
    """What the check prints, and its directory."""
    directory = tmp_path_factory.mktemp("check") / "absent" / "run"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *values, **_: printed.append(" ".join(map(str, values))))
        yielded = list(dry_run.check(config, directory, plan=True))
    assert not directory.parent.exists()
    return printed, yielded


def test_rows(parts, config):
    printed, yielded = parts
    text = "\n".join([*printed, *yielded])
    assert f"{config.data.lower}: 21 rows (1 messages, 20 question/response)" in text
    assert f"left out 1: no field 'response' (first: {config.data.lower}:19)" in text
    assert f"1: response cut to 96 tokens (first: {config.data.lower}:18)" in text
    assert "upper: 6 rows to train on, 0 held out; 0 copies" in text
    assert "lower: 21 rows to train on, 0 held out; 2 copies" in text
    assert "longest 96" in text and "rows on both levels: 3" in text  # of the lower level, a row three times


def test_rendered_rows(parts, config):
    assert "the tokenizer has no chat template, so rows are rendered with the template 'human'" in "\n".join(parts[0])
    text = "\n".join(parts[1])
    assert "template: human (the tokenizer has no chat template); one row of each schema, learned tokens between ⟦ and ⟧" in text
    tokenizer = templates.load_tokenizer(config.model.path)
    learned, size = (len(tokenizer(part)["input_ids"]) for part in ("Ho<|end|>", "Human: Hi\n\nAssistant: Ho<|end|>"))
    assert (
        f"  lower, messages, {config.data.lower}:1: {learned} of {size} tokens learned\n    Human: Hi\n\n    Assistant: ⟦Ho<|end|>⟧"
        in text
    )
    assert f"  lower, question/response, {config.data.lower}:2: " in text and "upper, question/response" in text


def test_steps_and_tokens(parts, config):
    """21 rows in batches of 4 make 6 steps, in each of 2 epochs; each has 4 rows of the upper level."""
    text = "\n".join(parts[1])
    setup = setups.load(checks.build(config))
    upper, lower = (sum(len(e.prompt) + len(e.response) for e in level.examples) for level in (setup.upper, setup.lower))
    assert "steps: 12 in 2 epochs, batch.size=4 rows of each level" in text
    assert f"tokens: about {upper / 6 * 48 + 2 * lower:,.0f} in training (upper {upper / 6 * 48:,.0f}, lower {2 * lower:,})" in text
    assert "0.0 seconds for evaluation" in text  # no row is held out


def test_time_is_extrapolated_by_tokens(config):
    """3 s for 300 tokens."""
    typed = checks.build(config)
    setup = setups.load(typed)
    tokens = sum(dry_run.num_tokens(typed, setup, 6).values())
    timing = dry_run.Timing(1.0, 2.0, [2.0, 1.0], [200, 100], [400, 200], 0.0, 0, 0)
    text = dry_run.time_text(typed, setup, 6, timing)
    assert text.startswith(f"time: about {tokens / 100:.1f} seconds: ") and "2.00 s and 1.00 s" in text
    assert "not included" not in text
    assert "50% of a step is padding" in text and "2 sequences of 96 tokens (batch.micro_size, data.max_length)" in text
    assert "padding" not in dry_run.time_text(typed, setup, 6, timing._replace(step_positions=[300, 180]))


def test_evaluations_are_counted(config):
    """12 steps in 2 epochs, with an evaluation at steps 4, 6, 8 and 12."""
    typed = checks.build(config)
    every = dataclasses.replace(typed, eval=dataclasses.replace(typed.eval, every=4))
    assert (dry_run.num_evaluations(typed, 12), dry_run.num_evaluations(every, 12)) == (2, 4)


@pytest.mark.parametrize(
    "seconds, text",
    [(0.04, "0.0 seconds"), (119, "119.0 seconds"), (150, "2.5 minutes"), (9000, "2.5 hours"), (216000, "2.5 days")],
)
def test_duration(seconds, text):
    assert dry_run.duration(seconds) == text


def test_memory_and_disk(parts):
    text = "\n".join(parts[1])
    needs = re.search(r"a step needs ([\d.]+) MB on each device: ([\d.]+) MB of arguments .*, ([\d.]+) MB of temporaries", text)
    total, arguments, temporaries = map(float, needs.groups())
    assert total >= arguments > 0 and temporaries > 0
    assert "lower-level rows: 21\n" in text and "assumed" not in text  # the plan knows the rows


def test_finished_runs_and_other_configs_are_refused(config, finished, make_config, tmp_path):
    with pytest.raises(errors.RunError, match="holds a finished run"):
        next(dry_run.check(config, finished))
    (tmp_path / "config.json").write_text(make_config({"seed": 5}).to_json())
    with pytest.raises(errors.RunError, match="holds a run of another config .*seed: 5 there, 0 now"):
        next(dry_run.check(config, tmp_path))


@pytest.mark.parametrize("changes", [{"checkpoint.every": 7, "log.every": 9}, {"num_epochs": 5}])
def test_an_unfinished_run_may_change_what_it_may_when_it_is_resumed(config, tmp_path, changes):
    (tmp_path / "config.json").write_text(config.to_json())
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(changes)
    with workdir.open_workdir(changed, tmp_path):  # as the run does
        pass
    assert next(dry_run.check(changed, tmp_path)).startswith("upper: 6 rows to train on")


def test_fewer_epochs_are_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(config.to_json())
    changed = config.copy_and_resolve_references()
    changed.num_epochs = 1
    for attempt in (lambda: next(dry_run.check(changed, tmp_path)), lambda: workdir.open_workdir(changed, tmp_path).__enter__()):
        with pytest.raises(errors.RunError, match="num_epochs: 2 there, 1 now"):
            attempt()


def test_a_full_disk_is_told(config, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda workdir: 1000)
    check = dry_run.check(config, tmp_path / "run")
    with pytest.raises(errors.RunError, match=r"run: [\d.]+ MB are needed for checkpoints and results, 0.0 MB are free; free some"):
        list(check)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"method": "online", "online.ratio": 0.3, "online.num_samples": 2, "online.max_new_tokens": 8}, "generation"),
        ({"selection.parameterization": "features", "selection.optimizer": "sgd"}, "the features of the rows"),
    ],
)
@pytest.mark.slow
def test_other_methods(make_config, tmp_path, changes, named):
    text = "\n".join(dry_run.check(make_config(changes), tmp_path / "run"))
    assert f"not included: {named}" in text
    if "online.ratio" in changes:  # 6 of 21 rows; K_gen is 500
        assert "generation: 1 refreshes, each at most 12 responses of 8 tokens" in text


@pytest.mark.slow
def test_preferences(make_config, tmp_path):
    """A pair is two segments: its question is read twice."""
    pairs = [{"prompt": f"Which, {i}?", "chosen": "This one.", "rejected": "That."} for i in range(6)]
    file = str(write_jsonl(tmp_path / "pairs.jsonl", pairs))
    settings = {"data.upper": file, "data.lower": file, "loss.upper": "dpo", "loss.lower": "dpo", "selection.cost": "loss"}
    config = make_config(settings | {"eval.num_upper": 1, "eval.num_lower": 1, "num_epochs": 1})
    text = "\n".join(dry_run.check(config, tmp_path / "run"))
    tokenizer = templates.load_tokenizer(config.model.path)
    lengths = [
        len(tokenizer(part)["input_ids"]) for part in ("Human: Which, 0?\n\nAssistant: ", "This one.<|end|>", "That.<|end|>")
    ]
    assert f"{lengths[1] + lengths[2]} of {2 * lengths[0] + lengths[1] + lengths[2]} tokens learned" in text
    assert "(chosen) ⟦This one.<|end|>⟧\n    (rejected) ⟦That.<|end|>⟧" in text
    assert "rows on both levels: 6" in text
    assert "not included: the reference model's log-probabilities" in text


def test_sizes():
    ids = np.arange(10)
    single, pair = templates.Example(ids[:3], ids[:2], None), templates.Example(ids[:3], ids[:2], ids[:4])
    assert sequences.sizes([single, pair]).tolist() == [5, 3 + 2 + 3 + 4]
