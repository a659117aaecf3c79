"""Where the cells of a sweep run: here, on a Ray cluster, or as jobs of Slurm. All of them run the same `cells.run_cell`."""

import importlib.util
import os
import pathlib
import shutil
import signal
from collections.abc import Mapping

from experiments import runs

PACKAGES = {"ray": "ray", "slurm": "submitit"}
NAMES = ("local", *PACKAGES)


def get(name: str, jobs: int, options: Mapping, folder: pathlib.Path) -> runs.Start:
    """The launcher of that name.

    Args:
      jobs: runs at a time (local); the others leave that to their queue.
      options: of `ray.remote`, or of submitit's `AutoExecutor`.
      folder: of Slurm's own files.

    Raises:
      ValueError: a package, Slurm itself or an option is missing or not known.
    """
    package = PACKAGES.get(name)
    if package and not importlib.util.find_spec(package):
        raise ValueError(f"--launcher={name} needs the package {package}: pip install 'bilevel_jax[sweep]'")
    if name == "local":
        return runs.local(jobs)
    return _ray(options) if name == "ray" else _slurm(options, folder)


def _ray(options: Mapping) -> runs.Start:
    """Tasks of the cluster that RAY_ADDRESS names or that runs here, else of one on this machine. A GPU each where it has any."""
    import ray

    ray.init(log_to_driver=False, logging_level="error")
    resources = {"num_cpus": 1, "num_gpus": min(1, ray.cluster_resources().get("GPU", 0))}
    task = ray.remote(**(resources | options))(_interruptible)

    def start(todo):
        references = [task.remote(cell, os.getcwd()) for cell in todo]
        return [reference.future() for reference in references], lambda: [ray.cancel(one) for one in references]

    return start


def _interruptible(cell: runs.Cell, cwd: str) -> dict | str:
    # Ray cancels by an interrupt, which workers ignore whose cluster was started in the background of a script.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return runs.run_cell(cell, cwd=cwd)


def _slurm(options: Mapping, folder: pathlib.Path) -> runs.Start:
    """An array of jobs. With the option `"cluster": "local"` they are processes on this machine, all at once."""
    import submitit

    cluster = options.get("cluster", "slurm")
    if cluster not in ("slurm", "local"):
        raise ValueError(f"--slurm_options: cluster={cluster!r} is not among slurm, local")
    if cluster == "slurm" and not shutil.which("srun"):
        raise ValueError("--launcher=slurm: there is no srun here; start the sweep where jobs are submitted")
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    parameters = {"name": "sweep", "timeout_min": 600} | {key: value for key, value in options.items() if key != "cluster"}
    try:
        executor.update_parameters(**parameters)
    except (NameError, TypeError) as error:
        raise ValueError(f"--slurm_options: {error}") from error

    def start(todo):
        jobs = executor.map_array(runs.run_cell, todo)
        return jobs, lambda: [job.cancel() for job in jobs]

    return start
