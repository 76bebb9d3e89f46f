"""Models of other libraries by name, each library imported when it is asked for; and weights from a file.

Weights are drawn, never downloaded: a file holds those that a run is to begin with (`model.weights`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from growconv.errors import CheckpointError, ConfigError, did_you_mean

Options = Mapping[str, Any]


class Logits(nn.Module):
    """A model of transformers for image classification as one that puts out a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The logits of a batch of images."""
        return self.model(pixel_values=x).logits


def timm(name: str, in_channels: int, classes: int, options: Options) -> nn.Module:
    """A model of timm; the names are those of timm.list_models()."""
    library = _library("timm", "pip install timm")
    _require_name(name, library.list_models())
    with _refusals(name):
        return library.create_model(name, pretrained=False, in_chans=in_channels, num_classes=classes, **options)


def torchvision(name: str, in_channels: int, classes: int, options: Options) -> nn.Module:
    """A classifier of torchvision; the names are those of torchvision.models.list_models()."""
    library = _library("torchvision.models", "pip install 'growconv[vision]'")
    _require_name(name, library.list_models(module=library))
    if in_channels != 3:
        raise ConfigError(
            "torchvision's models need colour images",
            where=f"model.name={name}",
            expected="3 channels",
            got=in_channels,
            fix="use a model from timm or pytorchcv, or data in colour",
        )
    with _refusals(name):
        return library.get_model(name, weights=None, num_classes=classes, **options)


def transformers(name: str, in_channels: int, classes: int, image_size: int, options: Options) -> nn.Module:
    """A model of transformers by its type (resnet, convnext, regnet, ...) at the size of `options`, its config's."""
    library = _library("transformers", "pip install transformers")
    known = _library("transformers.models.auto.modeling_auto", "pip install transformers")
    _require_name(name, known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    with _refusals(name):
        config = library.AutoConfig.for_model(name, **options)
        for key, value in {"num_channels": in_channels, "num_labels": classes, "image_size": image_size}.items():
            if hasattr(config, key):
                setattr(config, key, value)
        return Logits(library.AutoModelForImageClassification.from_config(config))


def pytorchcv(name: str, in_channels: int, classes: int, image_size: int, options: Options) -> nn.Module:
    """A classifier of pytorchcv.

    Its own list of models imports all of them, some of which need torchvision: only the file of the name is imported.
    """
    package = _library("pytorchcv.models", "pip install --no-deps pytorchcv")
    homes: dict[str, str] = {}
    for file in (file for folder in package.__path__ for file in sorted(Path(folder).glob("*.py"))):
        listed = re.search(r"__all__ = \[(.*?)\]", file.read_text(encoding="utf-8"), re.DOTALL)
        names = re.findall(r"'([a-z]\w*)'", listed[1]) if listed else []
        homes |= {found: file.stem for found in names if not found.startswith("get_")}
    _require_name(name, homes)
    build = getattr(_library(f"pytorchcv.models.{homes[name]}", "pip install torchvision"), name)
    with _refusals(name):
        return build(in_channels=in_channels, num_classes=classes, in_size=(image_size, image_size), **options)


def load_weights(model: nn.Module, file: str | Path, classes: int) -> list[str]:
    """Put the weights of a file into a model; a classifier of other classes stays as it was drawn.

    Args:
        file: a state_dict, in safetensors or saved by torch.save; read without running anything.
        classes: of the model.

    Returns:
        Names of the tensors that stay as drawn.

    Raises:
        CheckpointError: no such file, or it holds no weights of this model. Nothing has changed then.
    """
    target = model.model if isinstance(model, Logits) else model
    given, own = _read_weights(Path(file)), target.state_dict()
    other = [f"{key} is missing" for key in own if key not in given]
    other += [f"{key} is unknown to the model" for key in given if key not in own]
    drawn = []
    for key in own:
        if key in given and given[key].shape != own[key].shape:
            head = own[key].dim() > 0 and own[key].shape[0] == classes and given[key].shape[1:] == own[key].shape[1:]
            line = f"{key} is {tuple(given[key].shape)} in the file, {tuple(own[key].shape)} in the model"
            drawn.append(key) if head else other.append(line)
    if other:
        raise CheckpointError(
            "these are weights of another model",
            where=f"model.weights={file}",
            got="; ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else ""),
            fix="choose the model of the file; a growing model starts smaller unless growth.start=1",
        )
    target.load_state_dict({**own, **{key: value for key, value in given.items() if key not in drawn}})
    return drawn


def _read_weights(file: Path) -> dict[str, Tensor]:
    where = f"model.weights={file}"
    if not file.is_file():
        raise CheckpointError("there is no such file", where=where)
    try:
        safe = file.suffix == ".safetensors"
        found: Any = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError("this file holds no weights", where=where, got=str(error).splitlines()[0]) from error
    except Exception as error:  # pickle's own, of which weights_only makes one for anything but tensors
        problem, got = "this file holds more than weights, or something else", type(error).__name__
        fix = "save its state_dict: torch.save(model.state_dict(), FILE)"
        raise CheckpointError(problem, where=where, got=got, fix=fix) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError("this file holds no state_dict", where=where)
    return dict(found)


def _library(module: str, command: str) -> ModuleType:
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: operators built for another torch
        name = module.partition(".")[0]
        raise ConfigError(f"this needs {name}", where=f"model={name}", got=error, fix=command) from error


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """A block in which a library builds a model; what it refuses is a setting of the run."""
    try:
        yield
    except Exception as error:  # each library has its own
        raise ConfigError(
            "the library cannot build this model for these data and options",
            where=f"model.name={name}",
            got=f"{type(error).__name__}: {' '.join(str(error).split())}",
            fix="some models exist for only one number of classes or one image size: try another",
        ) from error


def _require_name(name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        expected, fix = f"one of {len(known)}", did_you_mean(name, known)
        raise ConfigError("the library has no such model", where="model.name", expected=expected, got=name, fix=fix)
