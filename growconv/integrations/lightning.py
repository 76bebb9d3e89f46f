"""Growth inside a PyTorch Lightning training run."""

import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from growconv.errors import CheckpointError, ScheduleError
from growconv.growth.scheduler import GrowthScheduler
from growconv.growth.validation import history_from, rehearse
from growconv.integrations import draw_batches
from growconv.network.find import find_sites
from growconv.network.model import undisturbed
from growconv.network.site import GrowthSite

Module = TypeVar("Module", bound=LightningModule)


class GrowthCallback(Callback):
    """Grows the model of a LightningModule while the Trainer runs.

        growth = GrowthCallback(nn.functional.cross_entropy, method="tiny", every=200, times=5, amount=0.25)
        Trainer(callbacks=[growth]).fit(module, loader)

    Checkpoints hold the growth history: `Trainer.fit(module, ckpt_path=...)` gives a fresh small module its grown
    shapes first, and `load_grown` loads one without a Trainer.

    Args:
        loss: loss(output, targets), a scalar averaged over the batch.
        attribute: path of the submodule that grows; "" is the LightningModule itself, through its forward.
        batches: growth batches of each round.
        loader: where they come from; None: a fresh pass over the Trainer's training loader.
        prepare: turns a batch into (inputs, targets); None: batches are already such pairs.
        sites: selects from the sites that were found; None: all of them.
        **schedule: arguments of GrowthScheduler (method, every, times, amount, where, budget, ...). Metrics reach
            policies once after each validation and each training epoch.

    Attributes:
        scheduler: the GrowthScheduler; None before the training starts.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        *,
        attribute: str = "",
        batches: int = 8,
        loader: Iterable[Any] | None = None,
        prepare: Callable[[Any], tuple[Any, Any]] | None = None,
        sites: Callable[[tuple[GrowthSite, ...]], Iterable[GrowthSite]] | None = None,
        **schedule: Any,
    ) -> None:
        if batches < 1:
            raise ScheduleError(
                "growth needs batches", expected="1 or more", got=batches, where="GrowthCallback.batches"
            )
        self.loss, self.attribute, self.prepare = loss, attribute, prepare
        self.batches, self.loader, self.sites, self.schedule = batches, loader, sites, schedule
        self.scheduler: GrowthScheduler | None = None
        self._state: Mapping[str, Any] | None = None
        self._metrics: dict[str, float | int] = {}
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let a module take the shapes of a checkpoint before it loads it."""
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ScheduleError(
                "growth replaces parameters, which this strategy does not allow",
                expected="one device or DDP",
                got=type(trainer.strategy).__name__,
                where="Trainer.strategy",
            )
        if "on_load_checkpoint" not in pl_module.__dict__:
            own = pl_module.on_load_checkpoint

            def restore_first(checkpoint: dict[str, Any]) -> None:
                restore_growth(pl_module, checkpoint, _averages(trainer))
                own(checkpoint)

            pl_module.on_load_checkpoint = restore_first

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module's own hook as it was."""
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the sites and set up the schedule."""
        if len(trainer.optimizers) != 1:
            raise ScheduleError(
                "a growing model needs exactly one optimizer",
                expected=1,
                got=len(trainer.optimizers),
                where="configure_optimizers",
            )
        model = pl_module.get_submodule(self.attribute)
        with undisturbed(pl_module):
            inputs = self._draw(trainer, pl_module, 1)[0][0]
            found = find_sites(model, inputs)
        sites = tuple(found if self.sites is None else self.sites(found))
        self.scheduler = GrowthScheduler(model, trainer.optimizers[0], sites, **self.schedule)
        self.scheduler.require_schedule("the callback grows by a schedule")
        if self._state is not None:
            self.scheduler.load_state_dict(self._state)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Grow when it is due, once per optimizer step."""
        if self.scheduler is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        metrics, self._metrics = {"epoch": trainer.current_epoch} | self._metrics, {}
        if not self.scheduler.due(self._step, metrics):
            return
        with undisturbed(pl_module):
            data = self._draw(trainer, pl_module, self.batches)
        with trainer.precision_plugin.forward_context():
            events = self.scheduler.grow(data, self.loss)
        for average in _averages(trainer):
            for event in events:
                event.apply_to(average.get_submodule(self.attribute))
        if events and isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model = pl_module
            trainer.strategy.configure_ddp()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics for the next call of `due`."""
        if not trainer.sanity_checking:
            values = {name: value for name, value in trainer.callback_metrics.items() if value.numel() == 1}
            self._metrics |= {name: float(value) for name, value in values.items()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics for the next call of `due`."""
        self.on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Goes into every checkpoint of the Trainer."""
        if self.scheduler is None:
            return {}
        return {"attribute": self.attribute, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by the Trainer before the schedule exists; used when it does."""
        self._state = state_dict.get("scheduler")

    def _draw(self, trainer: Trainer, pl_module: LightningModule, count: int) -> list[tuple[Any, Any]]:
        loader: Any = trainer.train_dataloader if self.loader is None else self.loader
        placed = (trainer.strategy.batch_to_device(batch) for batch in draw_batches(loader, count))
        batches = [trainer.precision_plugin.convert_input(batch) for batch in placed]
        return [tuple(batch) if self.prepare is None else self.prepare(batch) for batch in batches]


def _averages(trainer: Trainer) -> list[nn.Module]:
    """The averages of the module that Lightning's own callbacks keep, which have to grow along."""
    found = []
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            average = average.module
        if isinstance(average, LightningModule):
            found.append(average)
    return found


def restore_growth(module: LightningModule, checkpoint: Mapping[str, Any], averages: Iterable[nn.Module] = ()) -> None:
    """Give a fresh small module the grown shapes of a checkpoint; does nothing if it has them already or nothing grew.

    Args:
        module: the LightningModule as its class builds it.
        checkpoint: a loaded Lightning checkpoint.
        averages: copies of the module that grow with it.

    Raises:
        CheckpointError: the checkpoint was not written with a GrowthCallback, or its growth began with another model.
    """
    states = [
        state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith(GrowthCallback.__qualname__)
    ]
    if not states:
        raise CheckpointError(
            "this checkpoint was not written with a GrowthCallback",
            got=sorted(checkpoint.get("callbacks", {})),
            where="callbacks",
        )
    if states[0]:
        try:
            model = module.get_submodule(states[0]["attribute"])
            records, tensors = states[0]["scheduler"]["history"], checkpoint["state_dict"]
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                "The GrowthCallback's state is damaged.", got=repr(error), where="callbacks"
            ) from error
        history = history_from(records)
        if history.starts_from(model):
            rehearse(history, model, tensors.values())
            for each in (model, *(average.get_submodule(states[0]["attribute"]) for average in averages)):
                history.replay(each)


def load_grown(module: Module, path: str | Path) -> Module:
    """Load a checkpoint of a grown module without a Trainer.

    Args:
        module: a fresh module with the small widths that the run began with; grown and filled in place.
        path: the checkpoint file.

    Raises:
        CheckpointError: the checkpoint belongs to another model, or was not written with a GrowthCallback.
    """
    from lightning_fabric.utilities.cloud_io import _load

    try:
        checkpoint = _load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            "This checkpoint is damaged, or holds more than numbers.",
            where=str(path),
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="save plain hyperparameters only; a file that you trust can be loaded with Lightning itself",
        ) from error
    restore_growth(module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module
