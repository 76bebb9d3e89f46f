"""The command ``growconv export``: a run's model as ONNX or as a program of torch.export, compared with the model."""

import logging
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from growconv.errors import ConfigError, TrainingError
from growconv.reporting.terminal import shown
from growconv.training.trained import distance, load_run, read_run

BATCHES = (1, 2, 5)
"""Batch sizes at which the file is compared with the model; it is written at the second one."""


def main(arguments: Namespace) -> None:
    """Write RUN/model.pt2, or what --output names, and say how far its outputs are from those of the model."""
    run: Path = arguments.run
    output: Path = arguments.output or (run if run.is_dir() else run.parent) / "model.pt2"
    if output.suffix not in _FORMATS:
        raise ConfigError(
            "this name has no known format", where="--output", expected="FILE.pt2 or FILE.onnx", got=output.name
        )
    missing = [name for name in ("onnx", "onnxscript") if output.suffix == ".onnx" and find_spec(name) is None]
    if missing:
        raise ConfigError(
            "ONNX needs a package that is not installed",
            where="--output",
            got=", ".join(missing),
            fix="pip install 'growconv[onnx]', or write FILE.pt2",
        )
    found = read_run(run, arguments.best)
    model = load_run(found.path, trust=arguments.trust).requires_grad_(False)
    channels, size, _ = found.state["shape"]
    generator, dtype = torch.Generator().manual_seed(0), next(model.parameters()).dtype
    inputs = [torch.randn(batch, channels, size, size, generator=generator).to(dtype) for batch in BATCHES]
    write, compute = _FORMATS[output.suffix]
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".export-", dir=output.parent) as folder, torch.no_grad(), _quiet():
        begun = Path(folder) / output.name
        try:
            write(model, inputs[1], begun)
            error = max(distance(compute(begun, x), model(x)) for x in inputs)
        except OSError:
            raise
        except Exception as failure:
            reason = str(failure).strip().splitlines()[0] if str(failure).strip() else "no more is known"
            raise TrainingError(
                "this model cannot be exported", where=str(run), got=f"{type(failure).__name__}: {reason}"
            ) from failure
        if not error <= (tolerance := 100 * torch.finfo(dtype).eps):
            raise TrainingError(
                "the file does not compute the same as the model", where=str(output), expected=tolerance, got=error
            )
        begun.replace(output)
    print(f"{shown(output)}: {output.stat().st_size / 1e6:.2f} MB, within {error:.1e} of the model's outputs")


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the exporters do not tell of packages and types that are none of the user's."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _write_program(model: nn.Module, example: Tensor, file: Path) -> None:
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)), file)


def _run_program(file: Path, x: Tensor) -> Tensor:
    return torch.export.load(file).module()(x)


def _write_onnx(model: nn.Module, example: Tensor, file: Path) -> None:
    torch.onnx.export(
        model,
        (example,),
        file,
        input_names=["images"],
        output_names=["outputs"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _run_onnx(file: Path, x: Tensor) -> Tensor:
    """What onnx's own reference evaluator computes: slow and independent of any runtime."""
    from onnx.reference import ReferenceEvaluator

    (outputs,) = ReferenceEvaluator(str(file)).run(None, {"images": x.numpy()})
    return torch.from_numpy(outputs)


_FORMATS: dict[str, tuple[Callable[[nn.Module, Tensor, Path], None], Callable[[Path, Tensor], Tensor]]]
_FORMATS = {".pt2": (_write_program, _run_program), ".onnx": (_write_onnx, _run_onnx)}
