"""Launchers of a sweep: this machine, a Ray cluster, or Slurm jobs. All of them call `runs.run_cell`."""

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
    """The launcher with this name.

    Args:
      name: one of `NAMES`.
      jobs: runs at a time, for `local`; the queues of the others decide for themselves.
      options: of `ray.remote`, or of submitit's `AutoExecutor`.
      folder: for the files of Slurm jobs.

    Raises:
      ValueError: a package or Slurm is missing, or an option is unknown.
    """
    package = PACKAGES.get(name)
    if package and not importlib.util.find_spec(package):
        raise ValueError(f"--launcher={name} needs the package {package}: pip install 'bilevel_jax[sweep]'")
    if name == "local":
        return runs.local(jobs)
    return _ray(options) if name == "ray" else _slurm(options, folder)


def _ray(options: Mapping) -> runs.Start:
    """Tasks of the cluster at RAY_ADDRESS, or of a local one. Each task gets a GPU if the cluster has any."""
    import ray

    ray.init(log_to_driver=False, logging_level="error")
    resources = {"num_cpus": 1, "num_gpus": min(1, ray.cluster_resources().get("GPU", 0))}
    task = ray.remote(**(resources | options))(_interruptible)

    def start(cells):
        references = [task.remote(cell, os.getcwd()) for cell in cells]
        return [reference.future() for reference in references], lambda: [ray.cancel(reference) for reference in references]

    return start


def _interruptible(cell: runs.Cell, cwd: str) -> dict | str:
    # Ray cancels by SIGINT, which workers ignore if a script started the cluster in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return runs.run_cell(cell, cwd=cwd)


def _slurm(options: Mapping, folder: pathlib.Path) -> runs.Start:
    """An array of jobs. With the option `"cluster": "local"`, all run at once as processes on this machine."""
    import submitit

    cluster = options.get("cluster", "slurm")
    if cluster not in ("slurm", "local"):
        raise ValueError(f"--slurm_options: cluster={cluster!r} is not among slurm, local")
    if cluster == "slurm" and not shutil.which("srun"):
        raise ValueError("--launcher=slurm: no srun here; start the sweep on a machine that can submit jobs")
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    parameters = {"name": "sweep", "timeout_min": 600} | {key: value for key, value in options.items() if key != "cluster"}
    try:
        executor.update_parameters(**parameters)
    except (NameError, TypeError) as error:
        raise ValueError(f"--slurm_options: {error}") from error

    def start(cells):
        jobs = executor.map_array(runs.run_cell, cells)
        return jobs, lambda: [job.cancel() for job in jobs]

    return start
