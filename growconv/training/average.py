"""The exponential moving average of a run's weights, which grows along with the model."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from growconv.errors import CheckpointError
from growconv.network.event import GrowthEvent

PREFIX = "average/"
"""Of the average's tensors in a checkpoint."""


class Average:
    """θ̄ ← decay · θ̄ + (1 − decay) · θ after every step, buffers included (torch.optim.swa_utils).

    Args:
        model: the raw model.
        decay: 0.999 remembers about a thousand steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    @property
    def model(self) -> nn.Module:
        """A model of the same names with the averaged weights."""
        return self._averaged.module

    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self._averaged.update_parameters(model)

    def follow(self, events: Iterable[GrowthEvent]) -> None:
        """Grow as the model did; new entries begin as the model's."""
        for event in events:
            event.apply_to(self.model)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {f"{PREFIX}{name}": tensor for name, tensor in self._averaged.state_dict().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint's tensors.

        Raises:
            CheckpointError: they are missing or of another model.
        """
        try:
            self._averaged.load_state_dict(_own(tensors))
        except RuntimeError as error:
            raise CheckpointError("the checkpoint holds no average of this model", got=str(error)) from error


def averaged_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of the averaged model in a checkpoint's tensors; empty where the run kept no average."""
    names = {name: name.removeprefix("module.") for name in _own(tensors) if name.startswith("module.")}
    return {short: tensors[f"{PREFIX}{name}"] for name, short in names.items()}


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
