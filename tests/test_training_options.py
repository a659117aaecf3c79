"""Whole runs with schedules, clipping, dropout, the best adapter, early stopping, and all weights in place of an adapter."""

import pytest

from bilevel_jax import config as configuration
from bilevel_jax import early_stopping, errors, files, scoring, sharding
from bilevel_jax.data import levels as data_levels
from bilevel_jax.data import templates
from bilevel_jax.models import huggingface
from bilevel_jax.report import page, run_data
from bilevel_jax.runtime import checkpoint
from tests.conftest import EPOCH_STEPS, EPOCHS, TRAINED, read_jsonl, run_command, stop_at, summary_of, train_without_report, without

STEPS = EPOCHS * EPOCH_STEPS
OPTIONS = {
    "optimizer.name": "adamw",
    "optimizer.warmup": 6,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 0.5,
    "optimizer.b2": 0.95,
    "lora.rslora": True,
    "lora.dropout": 0.1,
    "eval.every": 2,
    "eval.keep_best": True,
    "log.every": 4,  # an evaluation ends an interval, too
    "selection.coefficient_at": "current",
}


def evaluations(workdir):
    return {
        event["step"]: event["eval/upper_loss"] for event in read_jsonl(workdir / "metrics.jsonl") if "eval/upper_loss" in event
    }


JUDGED = {0: 9.0, 2: 5.0, 4: 6.0, 6: 4.0, 8: 3.0, 10: 3.5, 12: 3.2}  # by step; the losses of so short a run hang on rounding
BEST = 8


@pytest.fixture(scope="module", autouse=True)
def judged():
    """The best evaluation is chosen by the numbers of `JUDGED`."""
    start, update, measure = early_stopping.start, early_stopping.update, early_stopping.MEASURE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(early_stopping, "start", lambda config, values, adapter: start(config, {measure: JUDGED[0]}, adapter))
        patch.setattr(early_stopping, "update", lambda best, _, k, adapter: update(best, {measure: JUDGED.get(k)}, k, adapter))
        yield


@pytest.fixture(scope="module")
def with_options(make_config, tmp_path_factory):
    """A run with many options, and its workdir."""
    config = make_config(OPTIONS | {"checkpoint.keep": 9})
    workdir = tmp_path_factory.mktemp("options") / "run"
    train_without_report(config, workdir)
    return config, workdir


def test_the_adapter_of_the_lowest_trusted_loss(with_options):
    config, workdir = with_options
    losses, summary = evaluations(workdir), summary_of(workdir)
    assert sorted(losses) == sorted(JUDGED)
    rates = {e["step"]: e["train/learning_rate"] for e in read_jsonl(workdir / "metrics.jsonl") if "train/loss" in e}
    assert rates == pytest.approx({k: 0.01 * min(k / 6, 1) for k in range(2, STEPS + 1, 2)})  # a warmup of 6 steps
    assert summary["best_step"] == BEST and summary["steps"] == STEPS
    assert summary["eval/upper_loss"] == pytest.approx(losses[BEST], rel=1e-6)  # the measures are those of this adapter
    assert f"The adapter is that of step {BEST} of {STEPS}" in page.render(run_data.read(workdir))
    for step in JUDGED.keys() - {0}:
        written, kept = (workdir / name / "adapter_model.safetensors" for name in ("adapter", f"adapters/step_{step}"))
        assert (written.read_bytes() == kept.read_bytes()) == (step == BEST)


def test_a_run_with_all_options_continues_with_the_same_bits(with_options, tmp_path, monkeypatch):
    config, uninterrupted = with_options
    workdir = tmp_path / "run"
    for at in (3, 8, 11):
        with monkeypatch.context() as patch, pytest.raises(errors.Interrupted):
            stop_at(patch, at)
            train_without_report(config, workdir)
    train_without_report(config, workdir)
    for file in TRAINED:
        assert (workdir / file).read_bytes() == (uninterrupted / file).read_bytes(), file
    assert evaluations(workdir) == evaluations(uninterrupted)
    assert without(summary_of(workdir), "time/") == without(summary_of(uninterrupted), "time/")


def test_a_run_ends_when_the_trusted_loss_no_longer_falls(with_options, tmp_path, monkeypatch):
    config, uninterrupted = with_options
    losses, stops = evaluations(uninterrupted), 4  # `JUDGED` rises there
    changed = config.copy_and_resolve_references()
    changed.eval.patience = 1
    workdir = tmp_path / "run"
    save = checkpoint.Checkpoints.save

    def save_and_die(self, step, *rest):
        save(self, step, *rest)
        if step == stops:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.Checkpoints, "save", save_and_die)
        train_without_report(changed, workdir)
    train_without_report(changed, workdir)  # killed after its last step: goes on to the end without a further one
    assert summary_of(workdir)["steps"] == stops
    assert {k: v for k, v in losses.items() if k <= stops} == evaluations(workdir)
    assert sorted(path.name for path in (workdir / "weights").iterdir()) == [
        f"epoch_{k}.parquet" for k in range(1, -(-stops // EPOCH_STEPS) + 1)
    ]


def test_all_weights_are_learned(make_config, tmp_path):
    """The model directory that is left gives the held-out loss of the run, and resumes to the bit."""
    changes = {"lora.rank": 0, "optimizer.learning_rate": 1e-3, "selection.cost": "influence", "num_epochs": 1}
    changes["optimizer.schedule"] = "cosine"
    workdir, other = tmp_path / "run", tmp_path / "other"
    train_without_report(make_config(changes), workdir)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.Interrupted):
        stop_at(patch, 3)
        train_without_report(make_config(changes), other)
    train_without_report(make_config(changes), other)
    name = "model/model.safetensors"
    assert (workdir / name).read_bytes() == (other / name).read_bytes()
    assert not (workdir / "adapter").exists()
    summary = summary_of(workdir)
    assert summary["eval/upper_loss"] < summary["start/upper_loss"]
    model, base = huggingface.load_model(str(workdir / "model"))
    tokenizer = templates.load_tokenizer(str(workdir / "model"))
    level = data_levels.load_level(make_config(changes), "upper", tokenizer)
    score = scoring.make_scorer(model, 2, 96, sharding.make_mesh(1))
    nll, length = score(base, None, scoring.example_segments(level.eval_examples), "held-out rows")
    assert scoring.mean_loss(nll, length) == pytest.approx(summary["eval/upper_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="learned all weights .*model is that model already"):
        run_command("export", [f"--workdir={workdir}", f"--merged={tmp_path / 'merged'}"])


def test_a_quantised_base(make_config, tmp_path):
    """Online: the adapter that is left gives the held-out loss of the run with the quantised base, and it alone; the run goes on
    only with this quantisation. PEFT's adapter names the base."""
    changes = {"model.quantization": "int8", "method": "online", "online.ratio": 0.5, "online.refresh_every": 6, "num_epochs": 1}
    config, workdir = make_config(changes | {"online.max_new_tokens": 6, "online.slots": 4}), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.Interrupted):
        stop_at(patch, 3)
        train_without_report(config, workdir)
    other = config.copy_and_resolve_references()
    other.model.quantization = "none"
    with pytest.raises(errors.RunError, match="model.quantization: 'int8' there, 'none' now"):
        train_without_report(other, workdir)
    train_without_report(config, workdir)
    summary = summary_of(workdir)
    tokenizer = templates.load_tokenizer(config.model.path)
    segments = scoring.example_segments(data_levels.load_level(config, "upper", tokenizer).eval_examples)
    errors_of = {}
    for kind in ("int8", "none"):
        model, base = huggingface.load_model(config.model.path, "float32", kind)
        model, adapter = huggingface.load_adapter(workdir / "adapter", model)
        score = scoring.make_scorer(model, 2, 96, sharding.make_mesh(1))
        loss = scoring.mean_loss(*score(base, adapter, segments, "held-out rows"))
        errors_of[kind] = abs(loss - summary["eval/upper_loss"])
    assert errors_of["int8"] < 3e-6 < errors_of["none"]  # a loss of 5.7
    assert files.read_json(workdir / "adapter" / "adapter_config.json")["base_model_name_or_path"] == config.model.path


def test_continues_an_adapter(finished, make_config, tmp_path):
    """A run that starts from an adapter begins at its losses; one of another shape is refused with what to set."""
    changes = {"lora.init": str(finished / "adapter"), "num_epochs": 1}
    train_without_report(make_config(changes), tmp_path / "run")
    assert summary_of(tmp_path / "run")["start/upper_loss"] == pytest.approx(summary_of(finished)["eval/upper_loss"], rel=1e-6)
    with pytest.raises(configuration.ConfigError, match="has rank 2, scale 2 .* set lora.rank=2, lora.alpha=4 and lora.targets="):
        train_without_report(make_config(changes | {"lora.rank": 4}), tmp_path / "other")


def test_a_base_of_4_bits(make_config, tmp_path):
    changes = {"model.path": "bilevel_jax/tiny", "model.quantization": "nf4", "num_epochs": 1, "selection.cost": "influence"}
    summary = train_without_report(make_config(changes), tmp_path / "run")
    assert summary["steps"] == EPOCH_STEPS and summary["eval/upper_loss"] < summary["start/upper_loss"]
