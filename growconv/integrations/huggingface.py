"""Growth inside a Hugging Face Trainer run."""

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from growconv.errors import CheckpointError, ScheduleError
from growconv.growth.scheduler import GrowthScheduler
from growconv.growth.validation import history_from, rehearse
from growconv.integrations import draw_batches
from growconv.network.find import find_sites
from growconv.network.model import undisturbed
from growconv.network.site import GrowthSite

Model = TypeVar("Model", bound=PreTrainedModel)

ENTRY = "growconv"
"""Entry of the model's config that holds the schedule's state and the growth history."""


class GrowthCallback(TrainerCallback):
    """Grows a transformers model while the Trainer runs.

        growth = GrowthCallback(method="tiny", every=200, times=5, amount=0.25)
        Trainer(model, arguments, train_dataset=data, callbacks=[growth]).train()

    The growth history lies in the model's config, so that everything that saves the model saves it: checkpoints,
    `save_model`, `save_pretrained`. `load_grown(Class, folder)` loads such a folder; to resume a run, load the
    checkpoint with it, give that model to a new Trainer and call `train(resume_from_checkpoint=folder)`.

    Args:
        loss: loss(output, inputs), a scalar averaged over the batch; None: the output's own `loss`.
        batches: growth batches of each round.
        loader: where they come from, dictionaries of the model's arguments; None: a fresh pass over the training data.
        sites: picks among the sites that were found; None: all of them.
        **schedule: arguments of GrowthScheduler (method, every, times, amount, where, budget, ...). Metrics of an
            evaluation reach policies once, at the next step.

    Attributes:
        scheduler: the GrowthScheduler; None before the training starts.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor] | None = None,
        *,
        batches: int = 8,
        loader: Iterable[Mapping[str, Any]] | None = None,
        sites: Callable[[tuple[GrowthSite, ...]], Iterable[GrowthSite]] | None = None,
        **schedule: Any,
    ) -> None:
        if batches < 1:
            raise ScheduleError(
                "growth needs batches", expected="1 or more", got=batches, where="GrowthCallback.batches"
            )
        self.loss = (lambda output, _: output.loss) if loss is None else loss
        self.batches, self.loader, self.sites, self.schedule = batches, loader, sites, schedule
        self.scheduler: GrowthScheduler | None = None
        self._metrics: dict[str, float | int] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Find the sites and set up the schedule, or take up the one that the model's config holds."""
        if args.world_size > 1 or args.n_gpu > 1:
            raise ScheduleError(
                "the Trainer's data-parallel wrapper cannot be rebuilt after growth",
                expected="one process with one device",
                got=f"{args.world_size} processes, {args.n_gpu} GPUs in each",
                where="TrainingArguments",
                fix="use CUDA_VISIBLE_DEVICES=0, or growconv's own loop or Lightning for several devices",
            )
        model = given["model"]
        if not isinstance(model, PreTrainedModel):
            raise ScheduleError(
                "growth is stored in the model's config, but this model has none",
                expected="a PreTrainedModel",
                got=type(model).__name__,
                where="Trainer.model",
                fix="write it as a PreTrainedModel with a PretrainedConfig, or use Lightning or a loop of your own",
            )
        model.config = copy.deepcopy(model.config)  # other models may be made from the same one
        with undisturbed(model):
            found = find_sites(model, self._draw(model, given["train_dataloader"], 1)[0][0])
        sites = tuple(found if self.sites is None else self.sites(found))
        optimizer = getattr(given["optimizer"], "optimizer", given["optimizer"])
        self.scheduler = GrowthScheduler(model, optimizer, sites, **self.schedule)
        self.scheduler.require_schedule("the callback grows by a schedule")
        saved = getattr(model.config, ENTRY, None)
        if saved is not None:
            self.scheduler.load_state_dict(saved)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Grow when it is due, once per optimizer step."""
        if self.scheduler is None:
            return
        model, metrics, self._metrics = given["model"], {"epoch": int(state.epoch or 0)} | self._metrics, {}
        if self.scheduler.due(state.global_step, metrics):
            with undisturbed(model):
                data = self._draw(model, given["train_dataloader"], self.batches)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
                self.scheduler.grow(data, self.loss)
        setattr(model.config, ENTRY, self.scheduler.state_dict())

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Keep the metrics for the next question."""
        metrics = given.get("metrics", {})
        self._metrics |= {name: value for name, value in metrics.items() if isinstance(value, int | float)}

    def _draw(self, model: PreTrainedModel, loader: Any, count: int) -> list[tuple[dict[str, Any], Any]]:
        loader = getattr(loader, "base_dataloader", loader) if self.loader is None else self.loader
        batches = []
        for batch in draw_batches(loader, count):
            inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            batches.append((inputs, inputs))
        return batches


def load_grown(kind: type[Model], folder: str | Path) -> Model:
    """Load a grown model that a Trainer or `save_pretrained` has written.

    Args:
        kind: the model's class, such as ResNetForImageClassification.
        folder: with config.json and model.safetensors.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: the folder holds no grown model of this class.
    """
    folder = Path(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError("no weights to load", expected=weights, where=str(folder), fix="save with safetensors")
    # The class's own config, never one that config.json names: no code of a stranger is asked for, let alone run.
    config = (kind.config_class or PretrainedConfig).from_pretrained(folder, local_files_only=True)
    saved = getattr(config, ENTRY, None)
    if saved is None:
        raise CheckpointError(
            "the model's config holds no growth history", where=str(folder / "config.json"), fix="use from_pretrained"
        )
    try:
        tensors, records = load_file(weights), saved["history"]
    except (SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(
            "The saved model is damaged.", where=str(folder), got=error, fix="restore the folder"
        ) from error
    model = kind(config)
    history = history_from(records)
    rehearse(history, model, tensors.values())
    history.replay(model)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise CheckpointError(
            "the weights do not belong to this model",
            got=f"missing {sorted(set(missing) - tied)}, unexpected {sorted(unexpected)}",
            where=str(weights),
        )
    return model.eval()
