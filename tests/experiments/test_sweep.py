"""Sweeps: the grid, refused settings, runs and their failures, the table and the picture."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from bilevel_jax import errors
from experiments import runs
from experiments.sweep import __main__ as command
from experiments.sweep import grid, launchers
from tests.experiments.commands import ROOT, command_line

SAFETY = str(ROOT / "configs" / "safety.py")
GRID = ["online.ratio=0.1,0.2", "online.num_samples=1,5"]

# Takes the place of the training command. It counts its calls; its loss is 10 R + G. A file FAIL, KILL or HOLD in the directory of
# the sweep makes the cells with R=0.2 fail, die, or wait until the file is removed or SIGTERM arrives.
FAKE = """
import json, os, pathlib, signal, sys, time
flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
workdir.mkdir(exist_ok=True)
with open(workdir / "calls", "a") as calls:
    calls.write("x")
def stop(*_):
    print("SIGTERM: saved", file=sys.stderr)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
directory = workdir.parent.parent
if flags["config.online.ratio"] == "0.2":
    if (directory / "FAIL").exists():
        sys.exit("error: this run fails")
    if (directory / "KILL").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    (workdir / "begun").touch()
    while (directory / "HOLD").exists():
        time.sleep(0.05)
loss = 10 * float(flags["config.online.ratio"]) + float(flags["config.online.num_samples"])
(workdir / "summary.json").write_text(json.dumps({"eval/upper_loss": loss + int(flags["config.seed"]) / 10}))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Replaces the training command by FAKE; returns its file."""
    file = tmp_path / "fake.py"
    file.write_text(FAKE)
    monkeypatch.setattr(runs, "PROGRAM", (sys.executable, "-S", str(file)))
    return file


@pytest.fixture(scope="module")
def points():
    return grid.points(SAFETY, grid.grid(GRID))


def sweep(points, directory, start, seeds=1):
    directory.mkdir(exist_ok=True)
    cells = grid.plan(SAFETY, points, seeds, directory)
    return grid.gather(points, cells, runs.run_all(cells, start))


def calls(points, directory, seed=0) -> list[int]:
    files = [point.workdir(directory, seed) / "calls" for point in points]
    return [len(file.read_text()) if file.exists() else 0 for file in files]


def losses(outcomes, seed=0):
    return [outcome.summaries[seed]["eval/upper_loss"] if seed in outcome.summaries else None for outcome in outcomes]


# --------------------------------------------------------------------------------------------------------------------
# The cells
# --------------------------------------------------------------------------------------------------------------------


def test_grid_by_hand():
    assert grid.grid(["a.b=1,2", "c=x", "d=3,4"]) == [
        {"a.b": "1", "c": "x", "d": "3"},
        {"a.b": "1", "c": "x", "d": "4"},
        {"a.b": "2", "c": "x", "d": "3"},
        {"a.b": "2", "c": "x", "d": "4"},
    ]


@pytest.mark.parametrize("task", ["safety", "quality"])
def test_configs_declare_a_sweep_over_r_and_g(task):
    config = str(ROOT / "configs" / f"{task}.py")
    points = grid.points(config, grid.declared(config))
    assert {(p.config.online.ratio, p.config.online.num_samples) for p in points} == {
        (0.05, 1), (0.1, 1), (0.2, 1), (0.05, 5), (0.1, 5), (0.2, 5)
    }  # fmt: skip


@pytest.mark.parametrize(
    "pairs, reason",
    [
        (["online.ration=0.1"], "the config has no key online.ration (did you mean online.ratio?)"),
        (["online.num_samples=1,two"], "two"),
        (["online.ratio=0.1,2"], "online.ratio=2.0 must be in [0, 1]"),
        (["method=online,ofline"], "method='ofline'"),
        (["seed=0,1"], "--seeds"),
        (["online.ratio=0.1,0.10"], "two cells have the same values, online.ratio=0.1"),
        (["online.ratio"], "--set=online.ratio: write key=value"),
        (["online.ratio=0.1,,0.2"], "--set=online.ratio=0.1,,0.2"),
        (["online.ratio=0.1", "online.ratio=0.2"], "online.ratio is set twice"),
    ],
)
def test_refused_before_anything_runs(pairs, reason, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        grid.points(SAFETY, grid.grid(pairs))
    message = str(caught.value) if caught.type is not SystemExit else capsys.readouterr().err
    assert reason in message and message.count("\n") <= 1


def test_settings_of_all_cells():
    """They are in every command and checked with each cell; a key cannot be both."""
    common = {"num_epochs": 2, "model.remat": True, "data.lower": "synthetic:domains"}
    points = grid.points(SAFETY, grid.grid(["online.ratio=0.1,0.2"]), common)
    assert [point.folder for point in points] == ["online.ratio_0.1", "online.ratio_0.2"]
    assert {(p.config.num_epochs, p.config.model.remat, p.config.data.lower) for p in points} == {(2, True, "synthetic:domains")}
    for cell in grid.plan(SAFETY, points, 1, pathlib.Path("absent")):
        assert {"--config.num_epochs=2", "--config.model.remat=True", "--config.data.lower=synthetic:domains"} <= {*cell.command}
    lines = grid.table(outcomes_of(points))
    assert lines[0] == "All cells: num_epochs=2, model.remat=True, data.lower=synthetic:domains"
    assert lines[2].startswith("| online.ratio | seeds |")
    for pairs, common, reason in [
        (["num_epochs=1,2"], {"num_epochs": 3}, "num_epochs is set for all cells by --config.num_epochs, and swept"),
        (["num_epochs=1,2"], {"seed": 3}, "seed is not swept; give --seeds"),
        (["online.ratio=0.1"], {"online.ratio": 0.2}, "online.ratio is set for all cells"),
        (["num_epochs=1,2"], {"online.ratio": 2.0}, "online.ratio=2.0 must be in"),
    ]:
        with pytest.raises(ValueError, match=reason):
            grid.points(SAFETY, grid.grid(pairs), common)


@pytest.mark.parametrize(
    "pairs, folders",
    [
        (["online.ratio=0.1,0.2", "num_epochs=2"], ["online.ratio_0.1", "online.ratio_0.2"]),
        (["num_epochs=2", "online.ratio=0.1"], ["num_epochs_2_online.ratio_0.1"]),  # nothing varies
        (["data.lower=a.jsonl,b/c.jsonl"], ["data.lower_a.jsonl", "data.lower_b_c.jsonl"]),
    ],
)
def test_folders_are_named_by_what_varies(pairs, folders):
    assert [point.folder for point in grid.points(SAFETY, grid.grid(pairs))] == folders


def test_long_names_are_cut(tmp_path):
    """The names differ, also where only the start of the paths does, and files of these names can be made."""
    paths = [f"/{name * 150}/directory/rows.jsonl" for name in ("a", "b", "é")]
    points = grid.points(SAFETY, grid.grid([f"data.lower={','.join(paths)}"]))
    folders = [point.folder for point in points]
    assert len(set(folders)) == 3 and all(len(name.encode()) <= 80 for name in folders)
    assert all(re.fullmatch(r"data\.lower_rows\.jsonl-[0-9a-f]{8}", name) for name in folders)
    assert folders == [point.folder for point in grid.points(SAFETY, grid.grid([f"data.lower={','.join(paths)}"]))]
    longer = grid.points(SAFETY, grid.grid([f"data.lower={','.join('ü' * number for number in (200, 201))}"]))
    for point in longer:
        point.workdir(tmp_path, 0).mkdir(parents=True)
    assert len([*tmp_path.iterdir()]) == 2


def test_the_table_has_ess(points):
    outcomes = [grid.Outcome(points[0], {0: {"selector/ess": 0.75}}, {})]
    assert grid.table(outcomes)[-1] == "| 0.1 | 1 | 1 | 0.7500 |" and "ESS/N" in grid.table(outcomes)[-3]


def test_a_config_without_a_sweep(tmp_path):
    (tmp_path / "bare.py").write_text("def get_config():\n    pass\n")
    with pytest.raises(ValueError, match="bare.py declares no cells"):
        grid.declared(f"{tmp_path}/bare.py:tier")


def test_a_run_of_another_config_is_refused(points, tmp_path):
    other = points[0].config.copy_and_resolve_references()
    other.num_epochs = 7
    workdir = points[0].workdir(tmp_path, 0)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(other.to_json())
    (workdir / "summary.json").write_text("{}")
    with pytest.raises(errors.RunError, match="num_epochs: 7 there"):
        grid.plan(SAFETY, points, 1, tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, reason", [("FAIL", "this run fails"), ("KILL", "killed by SIGKILL")])
def test_a_failed_cell_is_reported_and_the_others_finish(points, tmp_path, fake, kind, reason):
    directory = tmp_path / "sweep"
    directory.mkdir()
    (directory / kind).touch()
    outcomes = sweep(points, directory, runs.local(4))
    assert losses(outcomes) == [2.0, 6.0, None, None]
    printed = grid.write(directory, "command", outcomes, None)
    for text in (printed, (directory / "sweep.md").read_text()):
        failed = [line for line in text.splitlines() if "online.ratio=0.2, online.num_samples=5, seed 0" in line]
        assert len(failed) == 1 and reason in failed[0] and str(points[3].workdir(directory, 0)) + ".log" in failed[0]
        assert "| 0.1 | 5 | 1 | 6.0000 |" in text and "| 0.2 | 5 | 0, 1 failed |  |" in text
    record = json.loads((directory / "sweep.json").read_text())["cells"]
    assert record[1]["settings"] == {"online.ratio": 0.1, "online.num_samples": 5}
    assert record[1]["seeds"] == {"0": {"eval/upper_loss": 6.0}} and reason in record[3]["failed"]["0"]
    (directory / kind).unlink()
    assert losses(sweep(points, directory, runs.local(4))) == [2.0, 6.0, 3.0, 7.0]
    assert calls(points, directory) == [1, 1, 2, 2]


# The real command with `fake` as the training command.
COMMAND = "import sys; from bilevel_jax import cli; from experiments import runs; from experiments.sweep import __main__ as sweep; "
COMMAND += "runs.PROGRAM = (sys.executable, '-S', {!r}); cli.run(sweep.main, sweep.FLAGS)"


@pytest.mark.slow
def test_a_stopped_sweep_continues(points, tmp_path, fake):
    directory = tmp_path / "sweep"
    directory.mkdir()
    (directory / "HOLD").touch()
    arguments = [f"--config={SAFETY}", f"--workdir={directory}", "--jobs=2", *(f"--set={pair}" for pair in GRID)]
    line = [sys.executable, "-c", COMMAND.format(str(fake)), *arguments]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not all((point.workdir(directory, 0) / "begun").exists() for point in points[2:]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, message = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert message.splitlines()[-1] == "SIGTERM: 2 of 4 runs are finished; the same command continues"
    assert "Traceback" not in message
    assert "SIGTERM: saved" in (directory / "online.ratio_0.2_online.num_samples_5" / "seed_0.log").read_text()
    (directory / "HOLD").unlink()
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert calls(points, directory) == [1, 1, 2, 2]
    assert "| 0.2 | 5 | 1 | 7.0000 |" in done.stdout and (directory / "sweep.png").exists()


def test_two_sweeps_never_share_a_workdir(points, tmp_path, fake):
    (tmp_path / "HOLD").touch()
    cell = grid.plan(SAFETY, points, 1, tmp_path)[3]
    summaries = []
    threads = [threading.Thread(target=lambda: summaries.append(runs.run_cell(cell))) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not os.path.exists(f"{cell.workdir}/begun"):
        time.sleep(0.02)
    time.sleep(2 * runs.POLL)
    (tmp_path / "HOLD").unlink()
    for thread in threads:
        thread.join()
    assert summaries == [{"eval/upper_loss": 7.0}] * 2 and calls(points, tmp_path)[3] == 1


def slurm(directory):
    pytest.importorskip("submitit")
    return launchers.get("slurm", 1, {"cluster": "local"}, directory / "slurm")


def ray(directory):
    pytest.importorskip("ray")
    return launchers.get("ray", 1, {"num_cpus": 1}, directory)


@pytest.mark.parametrize("launcher", [slurm, ray])
def test_launchers_agree(points, tmp_path, fake, launcher, monkeypatch):
    monkeypatch.chdir(ROOT)  # jobs start here and import from here
    local, remote = tmp_path / "local", tmp_path / "remote"
    remote.mkdir()
    (remote / "FAIL").touch()
    start = launcher(remote)
    assert losses(sweep(points, remote, start)) == [2.0, 6.0, None, None]
    (remote / "FAIL").unlink()
    assert losses(sweep(points, remote, start)) == losses(sweep(points, local, runs.local(4))) == [2.0, 6.0, 3.0, 7.0]
    assert calls(points, remote) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("slurm", {}, "no srun here"),
        ("slurm", {"cluster": "moon"}, "cluster='moon'"),
        ("slurm", {"cluster": "local", "gpus": 1}, "gpus"),
    ],
)
def test_wrong_launcher_options(tmp_path, name, options, reason, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=reason):
        launchers.get(name, 1, options, tmp_path)


@pytest.mark.parametrize("name, package", [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package(tmp_path, name, package, monkeypatch):
    monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'bilevel_jax\[sweep\]'"):
        launchers.get(name, 1, {}, tmp_path)


# --------------------------------------------------------------------------------------------------------------------
# The picture
# --------------------------------------------------------------------------------------------------------------------


def outcomes_of(points, metric="eval/upper_loss", missing=()):
    """The losses of FAKE, for two seeds that differ by 0.1."""
    values = [10 * p.config.online.ratio + p.config.online.num_samples for p in points]
    return [
        grid.Outcome(point, {} if i in missing else {0: {metric: value}, 1: {metric: value + 0.1}}, {})
        for i, (point, value) in enumerate(zip(points, values))
    ]


def test_table_has_means_and_spread(points):
    assert grid.table(outcomes_of(points, missing=[0]), "eval/upper_loss")[2:4] == [
        "| 0.1 | 1 | 0 |  |",
        "| 0.1 | 5 | 2 | 6.0500 ± 0.0707 |",  # 0.1 / sqrt(2)
    ]


def test_shared_settings_are_above_the_table():
    lines = grid.table(outcomes_of(grid.points(SAFETY, grid.grid(["num_epochs=2", "online.ratio=0.1,0.2"]))))
    assert lines[0] == "All cells: num_epochs=2" and lines[2].startswith("| online.ratio | seeds |")


def test_heat_map(points, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(grid, "Figure", lambda **kwargs: figures.append(Figure(**kwargs)) or figures[0])
    message = grid.draw(tmp_path / "sweep.png", outcomes_of(points, missing=[2]), None)
    assert message == f"eval/upper_loss: {tmp_path / 'sweep.png'}" and [f.name for f in tmp_path.iterdir()] == ["sweep.png"]
    pixels = image.imread(tmp_path / "sweep.png")[..., :3].reshape(-1, 3)
    assert len(np.unique(pixels.round(1), axis=0)) > 10  # a blank page has one colour
    panel = figures[0].axes[0]
    np.testing.assert_allclose(panel.images[0].get_array().filled(np.nan), [[2.05, 6.05], [np.nan, 7.05]])
    assert (panel.get_ylabel(), [t.get_text() for t in panel.get_yticklabels()]) == ("online.ratio", ["0.1", "0.2"])
    assert (panel.get_xlabel(), [t.get_text() for t in panel.get_xticklabels()]) == ("online.num_samples", ["1", "5"])


def test_line(points, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(grid, "Figure", lambda **kwargs: figures.append(Figure(**kwargs)) or figures[0])
    grid.draw(tmp_path / "sweep.png", outcomes_of(points[1::-1], "x"), "x")  # G = 5, then 1
    np.testing.assert_allclose(figures[0].axes[0].lines[0].get_xydata(), [[1, 2.05], [5, 6.05]])


def test_no_picture(points, tmp_path):
    def drawn(outcomes, metric=None):
        return grid.draw(tmp_path / "sweep.png", outcomes, metric)

    methods = grid.points(SAFETY, grid.grid(["method=online,offline", "online.ratio=0.1,0.2"]))
    assert "method, online.ratio" in drawn(outcomes_of(methods))
    assert "none" in drawn(outcomes_of(points[:1]))
    assert drawn([grid.Outcome(point, {}, {0: "failed"}) for point in points]) == "no picture: nothing was measured"
    with pytest.raises(ValueError, match="--metric=eval/loss; there are eval/upper_loss"):
        drawn(outcomes_of(points), "eval/loss")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------


def test_mistakes_end_the_command_in_one_line(tmp_path):
    line = [sys.executable, "-m", "experiments.sweep", f"--config={SAFETY}", f"--workdir={tmp_path}/sweep"]
    done = subprocess.run([*line, "--set", "online.ration=0.1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(
        "error: the config has no key online.ration (did you mean online.ratio?)"
    )
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_command_passes_the_config_on(tmp_path, fake, monkeypatch, capsys):
    """`--config.KEY=VALUE` of the sweep, in each command of a run."""
    monkeypatch.chdir(ROOT)
    commands, run_cell = [], runs.run_cell
    monkeypatch.setattr(runs, "run_cell", lambda cell, *rest: commands.append(cell.command) or run_cell(cell, *rest))
    arguments = [f"--config={SAFETY}", f"--workdir={tmp_path}/sweep", "--set=online.ratio=0.1,0.3"]
    with command_line("sweep", [*arguments, "--config.online.num_samples=5", "--config.model.remat=True"], command.FLAGS):
        command.main()
    assert len(commands) == 2 and all({"--config.online.num_samples=5", "--config.model.remat=True"} <= {*c} for c in commands)
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()) == ["online.ratio_0.1", "online.ratio_0.3"]
    assert "All cells: online.num_samples=5, model.remat=True" in capsys.readouterr().out


def test_a_config_of_the_package_is_found_by_name(tmp_path, fake, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--config=safety", "--workdir=sweep", "--set=online.ratio=0.1,0.3", "--config.online.num_samples=5"]
    with command_line("sweep", arguments, command.FLAGS):
        command.main()
    assert sorted(path.name for path in pathlib.Path("sweep").iterdir() if path.is_dir()) == [
        "online.ratio_0.1",
        "online.ratio_0.3",
    ]


@pytest.mark.parametrize(
    "given, message",
    [
        (["--launcher=ray", "--jobs=2"], "--jobs goes with --launcher=local"),
        (["--ray_options={}"], "--ray_options goes with --launcher=ray"),
        (["--launcher=ray", "--slurm_options={}"], "--slurm_options goes with --launcher=slurm"),
    ],
)
def test_options_of_another_launcher(tmp_path, given, message):
    with command_line("sweep", ["--config=safety", f"--workdir={tmp_path}/sweep", *given], command.FLAGS):
        with pytest.raises(ValueError, match=message):
            command.main()


@pytest.mark.slow
def test_a_real_sweep(tmp_path, make_config, data, monkeypatch, capsys):
    """The training runs are real processes; the command of the sweep runs in this one."""
    monkeypatch.chdir(ROOT)
    changes = {"num_epochs": 1, "checkpoint.every": 0, "method": "mixing", "mixing.rho": 1.0}
    (tmp_path / "tiny.json").write_text(make_config(changes).to_json())
    (tmp_path / "tiny.py").write_text(
        "import json, ml_collections\n"
        "def get_config():\n"
        f"    return ml_collections.ConfigDict(json.load(open({str(tmp_path / 'tiny.json')!r})))\n"
        "def sweep(add):\n"
        f"    add({{'data.lower': {str(data / 'lower.jsonl')!r}}})\n"
        f"    add({{'data.lower': {str(tmp_path / 'absent.jsonl')!r}}})\n"
    )
    arguments = [f"--config={tmp_path}/tiny.py", f"--workdir={tmp_path}/sweep", "--jobs=2", "--config.eval.keep=0.5"]
    with command_line("sweep", arguments, command.FLAGS):
        with pytest.raises(ValueError, match="^1 of 2 runs failed; the same command tries them again$"):
            command.main()
    [config] = (tmp_path / "sweep").glob("*/seed_0/config.json")
    assert json.loads(config.read_text())["eval"]["keep"] == 0.5
    [summary] = [json.loads(file.read_text()) for file in (tmp_path / "sweep").glob("*/seed_0/summary.json")]
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    assert f"lower.jsonl | 1 | {summary['eval/upper_loss']:.4f} | {summary['eval/lower_loss']:.4f} |" in table
    assert f"seed 0: {tmp_path}/absent.jsonl: no such file" in table
    assert "no picture: it takes one or two keys that vary, all numbers; here data.lower" in capsys.readouterr().out


# A sweep of one cell whose run writes its process id and waits for SIGTERM.
SWEEP = """
import pathlib, sys
from experiments import runs
code = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
runs.run_cell(runs.Cell(str(pathlib.Path("cell").absolute()), (sys.executable, "-c", code)))
"""


def test_runs_end_with_a_killed_sweep(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", SWEEP], cwd=tmp_path, env=environment) as process:
        file = tmp_path / "pid"
        while not (file.exists() and file.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        pid = int(file.read_text())
        process.kill()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)
