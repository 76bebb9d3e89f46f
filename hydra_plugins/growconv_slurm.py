"""The launcher behind hydra/launcher=slurm. Hydra takes launchers from this package alone; the work is in growconv."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hydra.core.utils import JobReturn

with suppress(ImportError):  # the extra "sweep" is not installed: nothing to launch with
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher

    class SlurmLauncher(BaseSubmititLauncher):
        """Every run of a sweep as a job of Slurm; see `growconv.training.slurm`."""

        _EXECUTOR = "slurm"

        def __call__(self, *arguments: Any) -> JobReturn:
            """One run, inside its job."""
            from growconv.training.slurm import saved_first

            with saved_first():
                return super().__call__(*arguments)

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """Submit the runs and wait for all of them."""
            from hydra.core.singleton import Singleton

            from growconv.training.slurm import launch

            calls = [
                (list(overrides), "hydra.sweep.dir", number, f"job_id_for_{number}", Singleton.get_state())
                for number, overrides in enumerate(job_overrides, initial_job_idx)
            ]
            return launch(self, self.params, calls)
