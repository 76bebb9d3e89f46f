"""New channels on kept samples: what they would give the consumers, through the model's own operations in between."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from growconv.convolution.factorized import FactorizedConv
from growconv.convolution.geometry import Geometry
from growconv.convolution.unfold import unfold
from growconv.errors import SolverError, StatisticsError
from growconv.linalg import solve_psd
from growconv.network import layers

CHUNK = 64
"""Samples whose patches are held at once."""


@dataclass(frozen=True)
class SampledSite:
    """A site with the samples that the collector kept of it.

    Attributes:
        site: the GrowthSite.
        model: its model.
        inputs: per producer what it read, (n, C0, *size).
        read: per consumer what it read, (n, C1, *size).
        wanted: per consumer v = −∂(Σ loss)/∂z, (n, C2, *out).
    """

    site: Any
    model: nn.Module
    inputs: dict[str, Tensor]
    read: dict[str, Tensor]
    wanted: dict[str, Tensor]

    @classmethod
    def of(cls, subject: Any, model: nn.Module, method: str) -> "SampledSite":
        """Take the kept samples out of statistics.

        Args:
            subject: PairStatistics.
            model: the model.
            method: name of the solver, for the message.

        Raises:
            StatisticsError: no samples were kept.
            SolverError: a layer of the site runs several times in one forward pass.
        """
        site, kept = subject.growth_site, subject.samples_kept
        if kept is None:
            raise StatisticsError(
                f"the method {method!r} works on samples",
                got="statistics without samples",
                where=site.name,
                fix="collect with keep_samples=512, say",
            )
        tensors = [*kept.x.values(), *kept.h.values(), *kept.v.values()]
        if not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise SolverError(
                f"the method {method!r} takes layers that run once in a forward pass",
                where=site.name,
                fix="use method='tiny' or 'exact'",
            )
        return cls(site, model, dict(kept.x), dict(kept.h), dict(kept.v))

    @property
    def samples(self) -> int:
        """Number of samples."""
        return next(iter(self.inputs.values())).shape[0]

    def write(self, incoming: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values (n, K, *hidden) that filters give per producer."""
        return {
            path: apply_layer(self.model.get_submodule(path), self.inputs[path], weight, biases.get(path))
            for path, weight in incoming.items()
        }

    def hidden(
        self,
        incoming: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        measured: dict[str, tuple[Tensor, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """What each consumer would read of new channels; norm layers are transparent, `measured` gets their moments."""
        moments = {} if measured is None else measured
        return self.site.between(self.write(incoming, biases), measured=moments)

    def change(self, hidden: Mapping[str, Tensor], outgoing: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """δz, the change of each consumer's output (n, C2, *out)."""
        return {
            path: apply_layer(self.model.get_submodule(path), hidden[path], weight, None)
            for path, weight in outgoing.items()
        }

    def old_readings(self, path: str) -> Tensor:
        """What a consumer read of the site's old channels."""
        module, values = self.model.get_submodule(path), self.read[path]
        start, end = self.site.span(path)
        return values.narrow(layers.channel_axis(module, values.dim()), start, end - start)

    def responses(self, values: Tensor, path: str) -> Tensor:
        """Values that a consumer reads as one row a channel: (channels, samples · locations)."""
        module = self.model.get_submodule(path)
        rows = values.movedim(layers.channel_axis(module, values.dim()), 0)
        return rows.unflatten(0, (-1, self.site.ratio(path))).flatten(1)

    def patches(self, hidden: Mapping[str, Tensor], path: str) -> Tensor:
        """What a consumer multiplies its weights with, (n, K·ratio·taps, locations)."""
        module, values = self.model.get_submodule(path), hidden[path]
        if isinstance(module, nn.Linear):
            return values.flatten(1, -2).mT if values.dim() > 2 else values[:, :, None]
        return unfold(values, Geometry.of(module))

    def residual(self, path: str) -> Tensor:
        """v⊥ on these samples, (n, C2, locations): v without its least-squares fit by a consumer's own weights."""
        wanted = self.located(self.wanted, path).double()
        chunks = range(0, self.samples, CHUNK)
        square: Any = 0
        cross: Any = 0
        for start in chunks:
            patches = self._own_patches(path, start)
            square = square + torch.einsum("idm,iem->de", patches, patches)
            cross = cross + torch.einsum("idm,icm->dc", patches, wanted[start : start + CHUNK])
        update = solve_psd(square, cross)
        fits = [torch.einsum("dc,idm->icm", update, self._own_patches(path, start)) for start in chunks]
        return (wanted - torch.cat(fits)).to(self.wanted[path])

    def _own_patches(self, path: str, start: int) -> Tensor:
        """Patches of what a consumer read of some samples, with a constant entry where it has a bias, in float64."""
        patches = self.patches({path: self.read[path][start : start + CHUNK]}, path).double()
        if getattr(self.model.get_submodule(path), "bias", None) is None:
            return patches
        return torch.cat([patches, patches.new_ones(patches.shape[0], 1, patches.shape[2])], 1)

    def located(self, values: Mapping[str, Tensor], path: str) -> Tensor:
        """Output values of a consumer as (n, C2, locations)."""
        module, tensor = self.model.get_submodule(path), values[path]
        if isinstance(module, nn.Linear):
            return tensor.flatten(1, -2).mT if tensor.dim() > 2 else tensor[:, :, None]
        return tensor.flatten(2)


def apply_layer(module: nn.Module, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run a convolution or linear layer with other weights, given as (out, in, *kernel).

    Raises:
        SolverError: a grouped convolution, whose new channels do not come one by one.
    """
    if isinstance(module, nn.Linear):
        return functional.linear(values, weight, bias)
    if layers.groups_of(module) > 1:
        raise SolverError("a grouped convolution writes or reads these channels", got=repr(module))
    if layers.is_transposed(module):
        convolve = getattr(functional, f"conv_transpose{layers.axes_of(module)}d")
        geometry = {name: getattr(module, name) for name in ("stride", "padding", "output_padding", "dilation")}
        return convolve(values, weight.transpose(0, 1), bias, **geometry)
    if isinstance(module, FactorizedConv):
        return module.convolve(values, weight, bias)
    return module._conv_forward(values, weight, bias)  # pyright: ignore[reportCallIssue]


def inner(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
    """Inner product summed over consumers."""
    return torch.stack([(first[path] * second[path]).sum() for path in second]).sum()
