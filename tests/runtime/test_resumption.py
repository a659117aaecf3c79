"""A run is not resumed from a checkpoint that is not its own: of another config, or under the name of another step."""

import json
import shutil

import pytest

from bilevel_jax import errors, train
from tests.conftest import EPOCH_STEPS, EPOCHS, train_without_report

STEPS = EPOCHS * EPOCH_STEPS
RATE = {"optimizer.learning_rate": 3e-3}


@pytest.fixture(scope="module")
def interrupted(make_config, tmp_path_factory):
    """Workdir of a run that stopped at step 6, with the checkpoints 4 and 6."""
    workdir, calls = tmp_path_factory.mktemp("interrupted") / "run", []

    def stopped(outputs):
        calls.append(None)
        return len(calls) == 6

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.LoopResources, "stopped", stopped)
        with pytest.raises(errors.Interrupted, match=f"saved at step 6 of {STEPS}"):
            train_without_report(make_config(), workdir)
    return workdir


@pytest.fixture
def workdir(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def refused(config, workdir) -> str:
    """The error of a run, which leaves the workdir as it is."""
    before = {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(errors.RunError) as caught:
        train_without_report(config, workdir)
    assert {file: file.read_bytes() for file in before} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("changes, named", [(RATE, "learning_rate: 0.01 there, 0.003 now"), ({"lora.rank": 3}, "rank: 2 there, 3")])
def test_without_its_config_a_workdir_takes_no_other_settings(make_config, workdir, changes, named):
    (workdir / "config.json").unlink()
    message = refused(make_config(changes), workdir)
    assert named in message and "checkpoints/6 holds a run of another config" in message
    assert not (workdir / "config.json").exists()


def test_checkpoints_of_another_config(make_config, workdir):
    """Copied beside the config.json of this run."""
    file = workdir / "config.json"
    file.write_text(json.dumps(make_config(RATE).to_dict()))
    assert "learning_rate: 0.01 there, 0.003 now" in refused(make_config(RATE), workdir)


@pytest.mark.parametrize("name", ["8", "600"])
def test_a_renamed_checkpoint_is_not_used(make_config, workdir, name, capsys):
    """The one before it is used; without one, the run is refused."""
    (workdir / "checkpoints" / "6").rename(workdir / "checkpoints" / name)
    alone = shutil.copytree(workdir, workdir.parent / "alone")
    shutil.rmtree(alone / "checkpoints" / "4")
    assert f"no checkpoint is intact ({name}: it is that of step 6)" in refused(make_config(), alone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.LoopResources, "stopped", lambda outputs: True)
        with pytest.raises(errors.Interrupted, match=f"saved at step 5 of {STEPS}"):
            train_without_report(make_config(), workdir)
    printed = capsys.readouterr().out
    assert f"is damaged (it is that of step 6): renamed to damaged-{name}; step 4 is used" in printed
    assert f"at step 4 of {STEPS}" in printed
