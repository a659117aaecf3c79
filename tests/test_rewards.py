"""Rewards: their values, and one clear line of error for every failure of a user function."""

import importlib
import sys
import types

import numpy as np
import pytest

from bilevel_jax import errors, online, rewards, sampling
from bilevel_jax.data import rows as data_rows
from tests.conftest import make_rows

ROWS, _ = data_rows.collect(
    data_rows.parse(enumerate([{"question": f"q{i}", "response": "r", "truth": f"yes {i}"} for i in range(3)], 1)), "test"
)
TRUTHS = ["yes 0", " yes 1\n", "yes 2"]
LOG_PROB = np.array([-1.0, -6.0, -2.0])


def generation(row, sample_index, text, number):
    tokens = np.arange(number, dtype=np.int32)
    return online.Generation(
        row, sample_index, text, sampling.Response(tokens, 9, np.zeros(number + 1), np.zeros(number + 1), "stop")
    )


GENERATIONS = [generation(1, 0, "yes 1", 1), generation(1, 1, "no", 2), generation(0, 0, "yes 0 ", 3)]


def compute(name, truths=TRUTHS):
    return rewards.make_reward_fn(name, ROWS, truths)(GENERATIONS, LOG_PROB)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`f(code) -> name` writes a module with this code."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(code):
        (tmp_path / "my_rewards.py").write_text(code)
        sys.modules.pop("my_rewards", None)
        importlib.invalidate_caches()
        return "my_rewards"

    return write


def test_truth():
    np.testing.assert_array_equal(compute("truth"), [1, 0, 1])


def test_truth_requires_a_right_response_for_every_row():
    with pytest.raises(rewards.RewardError, match=f"^online.reward=truth: row {ROWS[1].id} has no right response.*data.truth$"):
        compute("truth", ["yes 0", None, "yes 2"])


def test_likelihood_is_per_token_with_the_eos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "likelihood").mkdir()  # the name of a reward is no path
    np.testing.assert_allclose(compute("likelihood"), [-1 / 2, -6 / 3, -2 / 4])


def test_a_user_function(module):
    name = module(
        "class Mine:\n"
        "    @staticmethod\n"
        "    def reward(questions, responses, truths):\n"
        "        assert questions == ['q1', 'q1', 'q0'] and truths == [' yes 1\\n', ' yes 1\\n', 'yes 0']\n"
        "        return [len(response) for response in responses]\n"
    )
    values = compute(f"{name}:Mine.reward")
    np.testing.assert_array_equal(values, [5, 2, 6])
    assert values.dtype == np.float64


@pytest.mark.parametrize(
    "value, reason",
    [
        ("[1.0, 2.0]", r"returned an array of shape \(2,\) for 3 responses"),
        ("1.0", r"returned an array of shape \(\) for 3 responses"),
        ("[[1.0]] * 3", r"returned an array of shape \(3, 1\) for 3 responses"),
        ("[1.0, float('nan'), 0.0]", "returned nan for a response to row ROW, the first of 1; rewards must be finite"),
        ("[float('inf')] * 3", "returned inf for a response to row ROW, the first of 3"),
        ("['a', 'b', 'c']", r"failed on 3 responses \(ValueError: could not convert"),
        ("questions.none", r"failed on 3 responses \(AttributeError: "),
    ],
)
def test_invalid_values_of_a_user_function(module, value, reason):
    name = module(f"def reward(questions, responses, truths):\n    return {value}\n")
    with pytest.raises(errors.RunError, match=rf"^online.reward=my_rewards:reward {reason.replace('ROW', ROWS[1].id)}[^\n]*$"):
        compute(f"{name}:reward")


@pytest.mark.parametrize(
    "name, reason",
    [
        ("thruth", "'thruth' is neither truth, likelihood, MODULE:CALLABLE nor a directory"),
        ("no/such/place", "'no/such/place' is neither"),
        ("my_rewards:", "'my_rewards:' is neither"),
        ("my_rewards:absent", r"my_rewards:absent: cannot be imported \(AttributeError: .*'absent'"),
        ("nowhere_at_all:reward", r"nowhere_at_all:reward: cannot be imported \(ModuleNotFoundError: "),
        ("my_rewards:number", "my_rewards:number: number has type int, it is not a function"),
    ],
)
def test_unknown_rewards(module, name, reason):
    module("number = 3\n")
    with pytest.raises(rewards.RewardError, match=rf"^online.reward={reason}[^\n]*$"):
        rewards.make_reward_fn(name, ROWS, TRUTHS)


def test_a_module_that_fails_to_import(module):
    name = module("raise OSError('two\\nlines')\n")
    with pytest.raises(rewards.RewardError, match=r"cannot be imported \(OSError: two lines\)$"):
        rewards.make_reward_fn(f"{name}:reward", ROWS, TRUTHS)


@pytest.mark.parametrize(
    "config, reason",
    [
        (None, "no readable config.json"),
        ('{"id2label": null}', "no readable config.json"),
        ("{", "no readable config.json"),
        ("{}", "the model has 2 labels"),
        ('{"id2label": {"0": "A", "1": "B", "2": "C"}}', "the model has 3 labels"),
        ('{"id2label": {"0": "A"}}', "a classification model needs PyTorch: pip install torch"),
    ],
)
def test_unusable_classifiers(tmp_path, monkeypatch, config, reason):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if PyTorch were not installed
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(rewards.RewardError, match=f"^online.reward={tmp_path}: {reason}"):
        rewards.make_reward_fn(str(tmp_path), ROWS, TRUTHS)


@pytest.mark.parametrize("code", [0, 1, "all fine"])
def test_a_reward_that_exits_is_an_error(monkeypatch, code):
    """Also with status 0, which would end a run as if it were finished."""

    def leave(*texts):
        raise SystemExit(code)

    read, _ = data_rows.collect(data_rows.parse(enumerate(make_rows(2, 0), 1)), "rows")
    monkeypatch.setattr(rewards, "load", lambda name: leave)
    reward_fn = rewards.make_reward_fn("mine:reward", read, [None, None])
    generations = [types.SimpleNamespace(row_index=i, text="a") for i in (0, 1)]
    with pytest.raises(errors.RunError, match=f"online.reward=mine:reward failed on 2 responses .SystemExit: {code}"):
        reward_fn(generations, np.zeros(2))


def test_a_module_that_exits_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(rewards.RewardError, match="leaving:reward: cannot be imported .SystemExit: 0"):
        rewards.load("leaving:reward")


def test_pickles_are_not_read(tmp_path, monkeypatch):
    """A directory with a pytorch_model.bin only: PyTorch would execute what is in it."""
    transformers = pytest.importorskip("transformers")
    seen = {}

    def load(directory, **options):
        seen.update(options)
        raise OSError("no file named model.safetensors")

    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **options: None)
    monkeypatch.setattr(
        transformers, "AutoModelForSequenceClassification", types.SimpleNamespace(from_pretrained=load), raising=False
    )
    with pytest.raises(rewards.RewardError, match="not a readable model .no file named model.safetensors"):
        rewards._load_classifier(tmp_path, "online.reward=x")
    assert seen == {"trust_remote_code": False, "use_safetensors": True}
