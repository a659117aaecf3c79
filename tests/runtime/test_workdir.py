"""What may change between the parts of an interrupted run, and the paths in its config."""

import json
import os

import pytest

from bilevel_jax import config as configuration
from bilevel_jax import errors
from bilevel_jax.runtime import workdir


def with_changes(changes):
    config = configuration.default()
    config.update_from_flattened_dict(dict(changes))
    return config


@pytest.fixture
def stored(tmp_path):
    """`f(changes)` -> a directory with the config of a run."""

    def write(changes=()):
        (tmp_path / "config.json").write_text(workdir.config_json(with_changes(changes)))
        return tmp_path

    return write


MAY_CHANGE = {
    "log.every": 3,
    "log.wandb": "mine",
    "log.profile": "1:2",
    "checkpoint.every": 7,
    "checkpoint.keep": 5,
    "eval.keep": 0.5,
    "mesh.data": 2,
    "num_epochs": 4,
}


def test_what_may_change_on_resumption(stored):
    workdir.refuse_another(with_changes(MAY_CHANGE), stored(), resumes=True)


@pytest.mark.parametrize(
    "before, changes, named",
    [
        ({}, {"eval.num_upper": 100}, "eval.num_upper: 200.0 there, 100.0 now"),
        ({}, {"eval.num_lower": 100}, "eval.num_lower: 200.0 there, 100.0 now"),
        ({}, {"num_epochs": 2}, "num_epochs: 3 there, 2 now"),
        ({}, {"num_epochs": 4, "optimizer.learning_rate": 1.0}, "num_epochs: 3 there, 4 now, optimizer.learning_rate: "),
        ({"selection.rule": "metagradient"}, {"selection.rule": "metagradient", "num_epochs": 4}, "num_epochs: 3 there, 4 now"),
        ({}, {"data.lower": "absent.jsonl"}, "data.lower: 'synthetic:lower' there, 'absent.jsonl' now"),
    ],
)
def test_what_may_not(stored, before, changes, named):
    with pytest.raises(errors.RunError, match="another config") as caught:
        workdir.refuse_another(with_changes(changes), stored(before), resumes=True)
    message = str(caught.value)
    assert named in message and "\n" not in message
    assert (
        "only checkpoint.*, data.cache, eval.keep, log.*, mesh.*, model.cache_frozen may change, and num_epochs may grow" in message
    )


def test_results_of_another_config_are_not_taken(stored):
    """A finished run is that of a config only if nothing differs that it left."""
    workdir.refuse_another(with_changes({"mesh.data": 2, "log.profile": "1:2"}), stored())
    for key in ("eval.keep", "num_epochs", "log.every"):
        with pytest.raises(errors.RunError, match=f"{key}: .* there, {MAY_CHANGE[key]} now"):
            workdir.refuse_another(with_changes({key: MAY_CHANGE[key]}), stored())


# --------------------------------------------------------------------------------------------------------------------
# Paths
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """The current directory, with some files and a model directory."""
    (tmp_path / "model").mkdir()
    for name in ("a.jsonl", "b.jsonl", "truth", "synthetic:lower"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "value, expected",
    [
        ("a.jsonl", "{}/a.jsonl"),
        ("./model/", "{}/model"),
        ("/dev/null", "/dev/null"),
        ("*.jsonl", "{}/*.jsonl"),
        ("model:train", "{}/model:train"),
        ("a.jsonl,b.jsonl", "{}/a.jsonl,{}/b.jsonl"),
        ("a.jsonl, org/rows", "{}/a.jsonl,org/rows"),
        (["a.jsonl", "org/rows:train"], ["{}/a.jsonl", "org/rows:train"]),
        *(
            (name, name)
            for name in (
                "org/model",
                "absent.jsonl",
                "synthetic:lower",
                "recipe:redorca",
                "column:weight",
                "truth",
                "",
                "a\0*",
                "\ud800*",
            )
        ),
    ],
)
def test_absolute_paths(directory, value, expected):
    filled = [part.format(directory, directory) for part in ([expected] if isinstance(expected, str) else expected)]
    assert workdir.absolute(value) == (filled[0] if isinstance(expected, str) else filled)


def test_paths_in_the_config(directory, stored):
    """The config is found from any directory, and compared as what it means; a file that is gone is still the same."""
    changes = {"data.lower": "a.jsonl", "data.upper": "b.jsonl", "model.path": "model", "selection.init": "model"}
    written = json.loads((stored(changes) / "config.json").read_text())
    paths = written["data"]["lower"], written["data"]["upper"], written["model"]["path"], written["selection"]["init"]
    assert paths == tuple(str(directory / name) for name in ("a.jsonl", "b.jsonl", "model", "model"))
    (directory / "b.jsonl").unlink()
    workdir.refuse_another(with_changes(changes), directory)
    workdir.refuse_another(with_changes(changes | {"data.lower": str(directory / "a.jsonl")}), directory)
    os.chdir(directory / "model")
    with pytest.raises(errors.RunError, match=f"data.lower: '{directory}/a.jsonl' there, 'a.jsonl' now"):
        workdir.refuse_another(with_changes(changes), directory)
    assert json.loads(workdir.config_json(configuration.default()))["model"]["path"] == "bilevel_jax/tiny"


# --------------------------------------------------------------------------------------------------------------------
# Links, and a lock that is removed
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path):
    """A directory of somebody else, with a file."""
    directory = tmp_path / "victim"
    directory.mkdir()
    (directory / "file").write_text("precious")
    yield directory
    assert {file.name: file.read_text() for file in directory.iterdir()} == {"file": "precious"}


@pytest.mark.parametrize("name", ["adapter", "weights", "metrics.jsonl", ".lock", "checkpoints", "adapters/step_2"])
def test_a_run_follows_no_link(victim, tmp_path, name):
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(victim / "file" if "." in name else victim)
    with pytest.raises(errors.RunError, match=f"{name} is a symbolic link.*remove it") as caught:
        with workdir.open_workdir(configuration.default(), run):
            pass
    assert "\n" not in str(caught.value)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(errors.RunError, match="metrics.jsonl is not a regular file"):
        with workdir.open_workdir(configuration.default(), tmp_path):
            pass


@pytest.mark.parametrize("name", ["file", "file/run", "link"])
def test_a_workdir_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").touch()
    os.symlink(tmp_path / "gone", tmp_path / "link")
    with pytest.raises(errors.RunError, match=f"--workdir=.*{name}: .*(file|link) is not a directory; give another --workdir"):
        with workdir.open_workdir(configuration.default(), tmp_path / name):
            pass


def test_a_removed_lock_admits_nobody(tmp_path):
    with workdir.locked(tmp_path):
        (tmp_path / ".lock").unlink()
        with pytest.raises(errors.RunError, match="is in use by process of another user; wait until it ends"):
            with workdir.locked(tmp_path):
                pass
    with workdir.locked(tmp_path):
        pass
