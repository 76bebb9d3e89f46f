"""Trainer: the loop that trains, grows, evaluates, and writes down where it stands so that it can go on from there."""

import math
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from growconv.errors import CheckpointError, ConfigError, TrainingError
from growconv.growth.cost import training_flops
from growconv.growth.distributed import from_first, summed
from growconv.growth.scheduler import GrowthScheduler
from growconv.growth.when import AtSteps, Every
from growconv.network.depth import copy_blocks
from growconv.network.event import GrowthEvent, GrowthHistory, count_parameters
from growconv.network.find import find_sites
from growconv.training.build import grows, make_loss, make_scheduler, resized
from growconv.training.checkpoint import (
    AVERAGE,
    Checkpoint,
    Position,
    damaged_state,
    position_of,
    replay,
    restore,
    save_in_turn,
)
from growconv.training.data import Dataset, Split, epoch_order, generator_for, mix, steps_per_epoch
from growconv.training.devices import Devices
from growconv.training.failures import Stopped, noted_signals
from growconv.training.progress import TrainingProgress
from growconv.training.rundir import RunDirectory
from growconv.training.schedules import make_lr_schedule, make_optimizer
from growconv.training.tracking import Tracker


def weight_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shapes of the weights of every layer that has a matrix or kernels, by the layer's path."""
    weights = {path: getattr(module, "weight", None) for path, module in model.named_modules()}
    return {
        path: list(weight.shape) for path, weight in weights.items() if isinstance(weight, Tensor) and weight.ndim > 1
    }


def moving_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """A copy of a model that takes in its weights and buffers after every step: θ̄ ← decay · θ̄ + (1 − decay) · θ.

    A decay of 0.999 remembers about a thousand steps; None: no average is wanted.
    """
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


AGREE_EVERY = 10
"""Steps between two questions among several processes whether a signal asked one of them to end."""


class Trainer:
    """Trains one model by the optimizer, loss and learning rate of its config.

    Args:
        config: the whole config of the run.
        dataset: on the run's device, as the model.
        directory: where the run writes.
        title: what the progress line calls it.
        found: the checkpoint that the run begins or goes on with, which gives a growing model its shapes.

    Attributes:
        scheduler: the growth scheduler; None for a fixed model.
        trackers: where else the run's numbers go; of rank 0.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        dataset: Dataset,
        model: nn.Module,
        devices: Devices,
        directory: RunDirectory,
        title: str,
        found: Checkpoint | None = None,
    ) -> None:
        self.config, self.options = config, config["trainer"]
        self.dataset, self.model, self.devices, self.directory = dataset, model, devices, directory
        self.optimizer = make_optimizer(config["optimizer"], model)
        self.trackers: Sequence[Tracker] = ()
        self.loss = make_loss(dataset, self.options["label_smoothing"])
        self.plain_loss = make_loss(dataset, 0.0)  # comparable between runs, whatever they smooth
        self.position = Position()
        self.batch_size = global_batch_size(config, dataset, devices.world_size)
        self.epoch_steps = steps_per_epoch(len(dataset.train), self.batch_size)
        self.flops: float | None = self.options["flops"]
        self.total = self.flops or self.epoch_steps * self.options["epochs"]
        self.scheduler: GrowthScheduler | None = None
        if grows(config):  # a fixed model gets its shapes with its weights
            if found is not None:
                replay(found, model, self.optimizer)
            example = dataset.inputs(dataset.train, torch.arange(2)).to(devices.dtype)
            steps = self.epoch_steps * self.options["epochs"]
            self.scheduler = make_scheduler(config, model, self.optimizer, example, steps)
        rate = config["optimizer"]["lr"]
        self.lr_schedule = make_lr_schedule(config["lr_schedule"], self.total, rate, self.epoch_steps)
        mode = self.options["progress"] if devices.is_first else "none"
        self.progress = TrainingProgress(mode, title, self.options, int(self.total), dataset.score)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._sums = torch.zeros(2, dtype=torch.float64, device=devices.device)  # loss and hits of the present epoch
        self._sample_flops = 0.0
        self._side: int | None = None  # pixels to which training images are scaled now
        self._clock = time.monotonic()
        self._signals: list[signal.Signals] = []
        self._wrapped = model
        self.average = moving_average(model, self.options["ema"])
        self._history = GrowthHistory()  # of a fixed model that was grown before its run

    def fit(self) -> dict[str, Any]:
        """Train to the end of the run, from wherever it stands; gives what summary.json holds.

        Raises:
            ConfigError: `trainer.flops` does not pay for one step.
            TrainingError: the loss is no longer a finite number.
            CheckpointError: a checkpoint could not be written.
            Stopped: a signal asked the run to end; a checkpoint is written.
        """
        self._prepare()
        if self._at_end and not self.position.metrics:
            step = self._sample_flops * self.batch_size
            problem, expected = "the training FLOPs do not pay for one step", f"{step:.4g} or more"
            raise ConfigError(problem, where="trainer.flops", expected=expected, got=f"{self.flops:.4g}")
        with noted_signals() as self._signals, self.progress:
            while not self._at_end:
                self._epoch()
        return self._summary()

    def resume(self, found: Checkpoint) -> None:
        """Go on where a checkpoint was saved; a CheckpointError where it is of another model or number of processes."""
        world = found.state.get("world_size")
        if world != self.devices.world_size:
            raise CheckpointError(
                "the number of processes has changed since the run was interrupted",
                where=str(found.path),
                expected=f"{world} processes",
                got=self.devices.world_size,
                fix=f"start it with: torchrun --nproc-per-node={world} -m growconv resume=... (1: plain growconv)",
            )
        position = position_of(found)
        restore(found, self.model, self.optimizer, self.scheduler)
        self.position, self._history = position, found.history
        self.average = moving_average(self.model, self.options["ema"])
        self._clock = time.monotonic() - position.seconds
        if self.devices.is_first:  # the checkpoint holds the sum over all ranks
            self._sums += torch.tensor([position.loss_sum, position.hits], dtype=torch.float64).to(self._sums)
        averaged = [name for name in found.tensors if name.startswith(AVERAGE)]
        try:
            if self.average is not None:
                self.average.load_state_dict({name.removeprefix(AVERAGE): found.tensors[name] for name in averaged})
            if self.devices.scaler is not None:
                self.devices.scaler.load_state_dict(found.state["scaler"])
            self.devices.set_random_states(found.tensors, found.state["random"])
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
            raise damaged_state(found, error) from error
        self.directory.rewind(self.position.metrics, [event.to_dict() for event in found.history])

    @property
    def history(self) -> GrowthHistory:
        """How the model has grown."""
        return self._history if self.scheduler is None else self.scheduler.history

    @property
    def widths(self) -> dict[str, int]:
        """Width of every site now; empty for a fixed model."""
        return {} if self.scheduler is None else {site.name: site.width for site in self.scheduler.sites}

    @property
    def train_flops(self) -> float:
        """FLOPs spent so far: training steps, forward and backward, and growth rounds, of all processes."""
        return self.position.step_flops + self.position.growth_flops

    @property
    def _done(self) -> tuple[float | int, float | int]:
        """What lies behind, and the size of the next step, in the unit of `total`."""
        return (self.train_flops, self._sample_flops * self.batch_size) if self.flops else (self.position.step, 1)

    @property
    def _at_end(self) -> bool:
        """Whether the next step would be one too many."""
        done, one = self._done
        return done + one > self.total

    def _prepare(self) -> None:
        """Wrap the model for its devices and count its FLOPs: at the start, and again after each growth."""
        self._wrapped = self.model  # an old wrapper must be gone before the next one is made
        if self.options["compile"]:
            torch.compiler.reset()  # what was compiled for the old shapes is of no more use
        self._wrapped = self.devices.wrap(self.model, self.options["compile"])
        inputs, targets = self._batch(torch.arange(2))
        self._side = self._side_now()
        self._sample_flops = training_flops(self.model, resized(inputs, self._side), targets, self.loss)

    def _side_now(self) -> int | None:
        """Pixels to which `data.size` scales training images at this point of the run; None: as they are."""
        share = self._done[0] / self.total
        return next((int(side) for until, side in self.config["data"]["size"] if share < until), None)

    def _epoch(self) -> None:
        position = self.position
        order = epoch_order(len(self.dataset.train), self.config["seed"], position.epoch)
        while position.batch < self.epoch_steps:
            start = position.batch * self.batch_size
            self._step(order[start : start + self.batch_size])
            position.step += 1
            position.batch += 1
            over = position.batch == self.epoch_steps or self._at_end
            fresh: dict[str, Any] = {}
            if over:
                fresh = self._close_epoch()
            self.progress.step(position.step, self.train_flops)
            grew = self._deepen_if_due() | self._grow_if_due(fresh)
            if self._at_end and not over:  # growing has spent the rest
                over, fresh = True, self._close_epoch()
                self.progress.say(
                    f"caution: growing has taken {position.growth_flops:.3g} of {self.total:.3g} training FLOPs, and "
                    f"the run ends with {self.train_flops:.3g}: the last channels were not trained. A cheaper method, "
                    "fewer growth.samples or a longer run leaves some for them"
                )
            every = self.options["checkpoint_every"]
            best = over and (position.best is None or fresh["val_accuracy"] > position.best)
            if best:
                position.best = fresh["val_accuracy"]
            if over:
                position.batch = 0
            stopping = self._asked_to_stop()
            if over or grew or stopping or (every and position.step % every == 0):
                self.save(best)
            if stopping:
                path = self.directory.path
                problem = f"{path}: The run was asked to end by {stopping.name}, and is saved."
                raise Stopped(stopping, f"{problem}\n  what to do: go on with growconv resume={path}")
            if over:
                return

    def _asked_to_stop(self) -> signal.Signals | None:
        """The signal that came; several processes, which it reaches at different steps, agree on it now and then."""
        came = self._signals[0] if self._signals else None
        if self.devices.world_size == 1:
            return came
        if self.position.step % AGREE_EVERY and self.position.batch < self.epoch_steps:
            return None
        anywhere = summed(torch.tensor(float(came is not None), device=self.devices.device))
        return (came or signal.SIGTERM) if float(anywhere) > 0 else None

    def _batch(self, index: Tensor, augment: torch.Generator | None = None) -> Any:
        """Inputs and targets of training samples; augmented ones are those of all processes, which share them."""
        inputs, targets = self.dataset.batch(self.dataset.train, index, augment)
        if augment is not None and self.options["mix"] != "none":
            inputs, targets = mix(self.options["mix"], inputs, targets, self.dataset.classes, augment)
        if augment is not None:  # drawn for the whole batch, so that the run is the same on any number of processes
            share = slice(self.devices.rank, None, self.devices.world_size)
            inputs, targets = inputs[share], targets[share]
        return self._converted(inputs), targets.to(self.devices.dtype) if self.dataset.regression else targets

    def _converted(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.devices.dtype)
        return inputs.contiguous(memory_format=torch.channels_last) if self.options["channels_last"] else inputs

    def _step(self, index: Tensor) -> None:
        """One optimizer step on this process's share of a batch."""
        if self._side_now() != self._side:
            self._prepare()
        position, devices, wrapped = self.position, self.devices, self._wrapped
        factor = self.lr_schedule(*self._done)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        drawn = generator_for(self.config["seed"], "augment", position.epoch, position.batch)
        inputs, targets = self._batch(index, drawn)
        inputs = resized(inputs, self._side)
        count = self.options["accumulate"]
        parts = list(zip(inputs.chunk(count), targets.chunk(count), strict=True))
        wrapped.train()
        for number, (x, y) in enumerate(parts):
            with devices.accumulating(wrapped) if number < len(parts) - 1 else nullcontext():
                output = devices.forward(wrapped, x)
                loss = self.loss(output, y)
                devices.backward(loss * (len(x) / len(inputs)))
            self._sums[0] += loss.detach().double() * len(x)
            if not self.dataset.regression:
                wanted = y.argmax(1) if y.is_floating_point() else y
                self._sums[1] += (output.detach().argmax(1) == wanted).double().mean() * len(x)
        if position.first_loss is None:
            position.first_loss = float(self._sums[0]) / len(inputs)
        # A look at the sum makes a GPU wait, so there it is taken now and then.
        if self._sums.device.type == "cpu" or position.step % 50 == 0:
            self._require_finite()
        devices.step(self.optimizer, self.options["clip_gradient"])
        if self.average is not None:
            self.average.update_parameters(self.model)
        position.step_flops += self._sample_flops * len(index)

    def _require_finite(self) -> None:
        if not math.isfinite(float(self._sums[0])):
            raise TrainingError(
                "the loss is no longer a finite number",
                where=f"step {self.position.step}, epoch {self.position.epoch}",
                got=float(self._sums[0]),
                fix="lower optimizer.lr, set trainer.clip_gradient, or use bf16-mixed instead of 16-mixed",
            )

    def _grow_if_due(self, fresh: Mapping[str, Any]) -> bool:
        """Ask the scheduler, and let it grow the model; nothing grows after the last step."""
        position = self.position
        if self.scheduler is None or self._at_end:
            return False
        metrics = {"epoch": position.epoch, "train_flops": self.train_flops, **fresh}
        if not self.scheduler.due(position.step, metrics):
            return False
        began, before = time.monotonic(), self.scheduler.flops_spent
        self.devices.share_buffers(self.model)
        events = self.scheduler.grow(self.growth_batches(), self.loss, position.step)
        spent = torch.tensor(self.scheduler.flops_spent - before, dtype=torch.float64, device=self.devices.device)
        position.growth_flops += float(summed(spent))
        if events:
            self._grown(events)
        else:
            self.progress.say(f"step {position.step}: nothing grew. {'; '.join(self.scheduler.decisions)}")
        position.growth_seconds += time.monotonic() - began
        return True

    def _deepen_if_due(self) -> bool:
        """Copy blocks where `growth.depth` says so; nothing grows after the last step."""
        position, depth = self.position, self.config["growth"]["depth"]
        due = sum(share * self.total <= self._done[0] for share in depth["at"])
        if self._at_end or position.deepened >= due:
            return False
        position.deepened = due
        inputs, _ = self._batch(torch.arange(2))
        made = copy_blocks(self.model, depth["blocks"], inputs, identity=depth["identity"], optimizer=self.optimizer)
        events = [replace(event, step=position.step) for event in made]
        if self.scheduler is None:
            for event in events:
                self._history.append(replace(event, recipe=None))
        else:
            self.scheduler.follow_model(find_sites(self.model, inputs), events)
        self._grown(events)
        return True

    def _grown(self, events: Sequence[GrowthEvent]) -> None:
        """Let what follows the model grow with it, and write down the events of a round."""
        self.follow(events)
        self.progress.events(self.position.step, events)
        self._prepare()
        self.directory.append_events([event.to_dict() for event in events])
        for tracker in self.trackers:
            tracker.events(list(self.history), events, self.widths)

    def follow(self, events: Sequence[GrowthEvent]) -> None:
        """Let the average of the weights grow as the model did."""
        for event in events if self.average is not None else ():
            event.apply_to(self.judged)

    @property
    def judged(self) -> nn.Module:
        """The model that is evaluated: the average where there is one."""
        return self.model if self.average is None else self.average.module

    def growth_batches(self) -> list[tuple[Tensor, Tensor]]:
        """This process's share of fresh growth samples, drawn from the training split without augmentation."""
        options, world = self.config["growth"], self.devices.world_size
        generator = generator_for(self.config["seed"], "growth", self.position.step)
        samples = torch.randperm(len(self.dataset.train), generator=generator)[: options["samples"]]
        own = samples[: len(samples) // world * world][self.devices.rank :: world]
        return [self._batch(index) for index in own.split(max(1, options["batch_size"] // world))]

    def _close_epoch(self) -> dict[str, Any]:
        """Evaluate, and write the epoch's line; the last epoch of a run of so many FLOPs is seldom a whole one."""
        position = self.position
        position.epoch += 1
        self._require_finite()
        samples = position.batch * self.batch_size
        loss_sum, hits = summed(self._sums).tolist()
        self._sums.zero_()
        val_loss, val_accuracy = self.evaluate(self.dataset.validation)
        position.seconds = time.monotonic() - self._clock
        record = {
            "step": position.step,
            "epoch": position.epoch,
            "train_loss": loss_sum / samples,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "parameters": count_parameters(self.model),
            "width": sum(self.widths.values()),
            "train_flops": self.train_flops,
            "seconds": position.seconds,
            "growth_seconds": position.growth_seconds,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        if not self.dataset.regression:
            record["train_accuracy"] = hits / samples
        position.metrics.append(record)
        self.directory.append_metrics(record)
        for tracker in self.trackers:
            tracker.metrics(record, position.step)
        self.progress.epoch(record, self._next_growth())
        return record

    def _next_growth(self) -> int | None:
        """Step of the next growth round, where the schedule knows it beforehand."""
        scheduler, step = self.scheduler, self.position.step
        if scheduler is None or (scheduler.times is not None and scheduler.rounds >= scheduler.times):
            return None
        when, marks = scheduler.when, ()
        if isinstance(when, AtSteps):
            marks = when.steps
        elif isinstance(when, Every) and when.unit == "step":
            marks = range(when.interval if when.start is None else when.start, int(self.total), when.interval)
        return next((mark for mark in marks if mark > step), None)

    def evaluate(self, split: Split) -> tuple[float, float]:
        """Loss and accuracy on a split, in eval mode, shared among the processes.

        Returns:
            The mean loss without label smoothing, and the share of correct answers; for a regression the
            coefficient of determination R².
        """
        model, devices = self.judged, self.devices
        devices.share_buffers(model)
        sums = torch.zeros(2, dtype=torch.float64, device=devices.device)
        model.eval()
        with torch.no_grad():
            size = self.options["eval_batch_size"]
            for inputs, targets in self.dataset.batches(split, size, devices.rank, devices.world_size):
                output = devices.forward(model, self._converted(inputs))
                sums[0] += self.plain_loss(output, targets).double() * len(inputs)
                if self.dataset.regression:
                    sums[1] += (output - targets).double().square().sum()
                else:
                    sums[1] += (output.argmax(1) == targets).double().mean() * len(inputs)
        model.train()
        loss, score = summed(sums).tolist()
        if self.dataset.regression:
            spread = (split.targets.double() - split.targets.double().mean()).square().sum()
            return loss / len(split), 1 - score / float(spread)
        return loss / len(split), score / len(split)

    def save(self, best: bool = False) -> None:
        """Write a checkpoint, and keep it as the best so far where it is."""
        position = self.position
        position.seconds = time.monotonic() - self._clock
        self._require_finite()
        self.devices.share_buffers(self.model)
        tensors, values = self.devices.random_states()
        if self.average is not None:
            self.devices.share_buffers(self.judged)
            tensors |= {f"{AVERAGE}{name}": tensor for name, tensor in self.average.state_dict().items()}
        position.loss_sum, position.hits = summed(self._sums).tolist()
        scaler = self.devices.scaler
        state = {
            "position": asdict(position),
            "random": values,
            "scaler": None if scaler is None else scaler.state_dict(),
            "config": dict(self.config),
            "shape": list(self.dataset.shape),
            "world_size": self.devices.world_size,
            "tracker": next((each.identity for each in self.trackers if each.identity is not None), None),
        }
        content: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        content |= {"history": self.history, "state": state, "tensors": tensors}
        from_first(lambda: save_in_turn(self.directory.checkpoints, best, **content))

    def _summary(self) -> dict[str, Any]:
        """The final figures; the test split is looked at here, once."""
        position = self.position
        test_loss, test_accuracy = self.evaluate(self.dataset.test)
        last = position.metrics[-1]
        return {
            "method": self.config["growth"]["method"],
            "seed": self.config["seed"],
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            "best_val_accuracy": position.best,
            "val_accuracy": last["val_accuracy"],
            "train_loss": last["train_loss"],
            "first_train_loss": position.first_loss,
            "parameters": count_parameters(self.model),
            "widths": self.widths,
            "layers": weight_shapes(self.model),
            "train_flops": self.train_flops,
            "seconds": position.seconds,
            "growth_seconds": position.growth_seconds,
            "peak_memory": self.devices.peak_memory(),
            "growth_events": len(self.history),
            "steps": position.step,
            "epochs": position.epoch,
        }


def global_batch_size(config: Mapping[str, Any], dataset: Dataset, world: int) -> int:
    """Samples of one optimizer step over all processes; the whole training split where that is smaller.

    Where `trainer.batch_size` is null, they follow from the samples: 128, 64 or 32, the largest that leaves an epoch 32
    steps, and a multiple of the processes. A batch that cannot be shared evenly is a ConfigError.
    """
    options = config["trainer"]
    samples = len(dataset.train)
    size = options["batch_size"]
    if size is None:
        size = next((size for size in (128, 64) if samples >= 32 * size), 32)
        size = -(-size // world) * world
    size = min(size, samples // world * world)
    if size % world or size == 0:
        problem, expected = "the batch cannot be shared evenly among the processes", f"a multiple of {world}"
        raise ConfigError(problem, where="trainer.batch_size", expected=expected, got=size)
    if size // world < options["accumulate"]:
        problem, expected = "there are more parts than samples", f"at most {size // world}"
        raise ConfigError(problem, where="trainer.accumulate", expected=expected, got=options["accumulate"])
    return size
