"""The runs of a sweep as jobs of Slurm: submitted by submitit, watched by squeue, saved before they are sent back.

`hydra_plugins.growconv_slurm` is the door through which Hydra comes here.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.slurm.slurm import SlurmInfoWatcher

from growconv.errors import ConfigError
from growconv.reporting.terminal import shown
from growconv.training.failures import RunFailed, SavesFirst, Stopped, complain

ENDED = {"CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT"}
"""States that a job does not leave any more; after a node's failure Slurm may start it again."""
SHARED = {"name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node"}
"""Settings of a job that submitit names alike on every kind of cluster; others are called slurm_NAME."""
ELSEWHERE = {"submitit_folder", "max_num_timeout"}


class Queue(SlurmInfoWatcher):
    """What squeue says about jobs. Every cluster has it, while sacct needs an accounting database."""

    def _make_command(self) -> list[str] | None:
        if not self._registered - self._finished:
            return None
        return ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i|%T"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """States of all jobs that are waited for; one that the queue has forgotten has ended."""
        text = string if isinstance(string, str) else string.decode()
        listed = dict(line.strip().split("|") for line in text.splitlines() if "|" in line)
        states = {job: listed.get(job, "gone") for job in self._registered}
        return {job: {"State": state if state in ENDED | {"gone"} else "RUNNING"} for job, state in states.items()}


def launch(function: Callable[..., JobReturn], settings: Mapping[str, Any], calls: Sequence[tuple]) -> list[JobReturn]:
    """Submit a job for every call, and wait for all of them; a job that fails is reported, the others go on.

    Args:
        function: what a job calls; its method `checkpoint` says how it is called again after a time limit.
        settings: the group hydra/launcher.
        calls: arguments of each job; the first one is the list of its overrides.

    Returns:
        What each call returned; for a job without a result, its error.
    """
    if (settings["nodes"] or 1) * (settings["tasks_per_node"] or 1) > 1:
        raise ConfigError(
            "a job of a sweep must be one process",
            where="hydra.launcher",
            got=f"nodes={settings['nodes']}, tasks_per_node={settings['tasks_per_node']}",
            fix="the documentation of sweeps and clusters shows how one run uses several nodes",
        )
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it tells of every question to the queue
    submitit.SlurmJob.watcher = Queue(delay_s=60)
    # A new folder: jobs hand over pickles, and one that lies there already may be anybody's.
    base = Path(settings["submitit_folder"]).parent
    base.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=time.strftime("%Y-%m-%d_%H-%M-%S_"), dir=base)
    jobs = _submit(function, {**settings, "submitit_folder": f"{folder}/%j"}, calls)
    print(f"{len(jobs)} jobs of Slurm; what they print: {shown(Path(folder))}", flush=True)
    try:
        return [_result(job, call[0]) for job, call in zip(jobs, calls, strict=True)]
    except KeyboardInterrupt:
        array = jobs[0].job_id.partition("_")[0]
        print(f"\nThe jobs stay in the queue; scancel {array} takes them out.", file=sys.stderr)
        raise


def _submit(function: Callable[..., JobReturn], settings: Mapping[str, Any], calls: Sequence[tuple]) -> list[Any]:
    # Of Slurm's variables the one that says where the cluster is; others describe a job that this process may be in.
    kept = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
    try:
        executor = submitit.AutoExecutor(
            settings["submitit_folder"], cluster="slurm", slurm_max_num_timeout=settings["max_num_timeout"]
        )
        executor.update_parameters(
            **{key if key in SHARED else f"slurm_{key}": settings[key] for key in settings if key not in ELSEWHERE}
        )
        with submitit.helpers.clean_env():
            os.environ.update(kept)
            return executor.map_array(function, *zip(*calls, strict=True))
    except (FailedJobError, RuntimeError) as error:
        raise ConfigError(
            "Slurm does not accept jobs from here.",
            where="hydra/launcher=slurm",
            got=str(error).strip(),
            fix="sinfo shows the partitions; set what yours demands: hydra.launcher.partition, account, timeout_min, "
            "cpus_per_task, mem_gb, gpus_per_node",
        ) from error


def _result(job: Any, overrides: Sequence[str]) -> JobReturn:
    """What the job returned, told on the screen; an error in place of a result that never came."""
    named = " ".join(filter_overrides(overrides))
    try:
        found: JobReturn = job.results()[0]
    except (UncompletedJobError, FailedJobError) as error:
        found = JobReturn(overrides=list(overrides), status=JobStatus.FAILED)
        last = (job.stderr() or str(error)).strip().rpartition("\n")[2]
        found.return_value = RunFailed(
            f"The job ended without a result (state: {job.state}).", where=str(job.paths.stderr), got=last
        )
    if found.status is JobStatus.COMPLETED:
        print(f"job {job.job_id} ({named}): best validation accuracy {found.return_value:.4f}", flush=True)
    else:
        complain(f"job {job.job_id} ({named}): {found._return_value}")
    return found


@contextmanager
def saved_first() -> Iterator[None]:
    """Inside, a run is saved before submitit's handlers see a signal: they send the job back to the queue."""
    limit = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]
    for number in (signal.SIGTERM, limit):
        handler = signal.getsignal(number)
        if callable(handler):
            signal.signal(number, SavesFirst(handler))
    try:
        yield
    except Stopped as stop:
        complain(stop.message)
        handler = signal.getsignal(stop.number)
        if callable(handler):
            try:
                handler(stop.number, None)
            except subprocess.CalledProcessError as error:
                if error.returncode != -signal.SIGTERM:
                    raise  # else sent back: that ends all that runs in the job, the command that asked for it too
        raise  # ended without a result: what becomes of the job, Slurm decides
