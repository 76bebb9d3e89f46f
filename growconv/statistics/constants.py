"""The constant entry of patches: all that a bias adds to a statistic follows from maps summed over samples."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from growconv.convolution.geometry import Geometry
from growconv.convolution.unfold import fold, tap_multiplicities, unfold
from growconv.statistics.problem import PairProblem

_BLOCK_ENTRIES = 1 << 22


def with_constants(
    problem: PairProblem, sums: dict[str, Tensor], maps: dict[str, Tensor], samples: int
) -> dict[str, Tensor]:
    """Put the entries of the biases into sums that were taken without them, and make symmetric sums exactly symmetric.

    The constant entry is the same for every sample, so every product with it is a sum of a map.

    Args:
        sums: sums over samples without constant entries: S, S_full, N_raw, M, S2, P, patch_gram, as far as collected.
        maps: "x", "h" and "v": the maps summed over samples (c, *size), float64.
        samples: how many samples were summed.

    Returns:
        The sums with constant entries, last in A and in D; patch_mean beside patch_gram.
    """
    constants = _Constants(problem, maps, samples)
    result = {}
    for name, value in sums.items():
        whole = result[name] = getattr(constants, name)(value)
        if name in ("S", "patch_gram", "S2", "S_full"):
            result[name] = (whole + whole.T).mul_(0.5)
    if "patch_gram" in sums:
        result["patch_mean"] = constants.patch_mean()
    return result


class _Constants:
    def __init__(self, problem: PairProblem, maps: dict[str, Tensor], samples: int) -> None:
        self.problem = problem
        self.maps = maps
        self.samples = samples
        self.like = maps["x"]

    def S(self, value: Tensor) -> Tensor:
        if not self.problem.first_bias:
            return value
        like = {"dtype": self.like.dtype, "device": self.like.device}
        constant, q = self._constant, tap_multiplicities(self.problem.hidden_size, self.problem.second, **like)
        column = self._patch_sums((q * constant).unsqueeze(0))[0]
        return _bordered(value, column, self.samples * (q * constant.square()).sum())

    def N_raw(self, value: Tensor) -> Tensor:
        if not self.problem.first_bias:
            return value
        row = self._constant_patches @ self.maps["v"].flatten(1).T
        return torch.cat([value, row.unsqueeze(0)])

    def M(self, value: Tensor) -> Tensor:
        if not self.problem.second_bias:
            return value
        return torch.cat([value, self.maps["v"].flatten(1).sum(dim=1).unsqueeze(0)])

    def S2(self, value: Tensor) -> Tensor:
        if not self.problem.second_bias:
            return value
        outputs = math.prod(self.problem.output_size)
        ones = self.like.new_ones(1, outputs)
        column = _sums_of_patches(self.maps["h"], self.problem.second, ones)[0]
        return _bordered(value, column, self.like.new_tensor(float(self.samples * outputs)))

    def P(self, value: Tensor) -> Tensor:
        problem = self.problem
        if problem.second_bias:
            taps, outputs = problem.second.taps, math.prod(problem.output_size)
            ones = torch.eye(taps, dtype=self.like.dtype, device=self.like.device)[..., None].expand(-1, -1, outputs)
            images = fold(ones, problem.second, problem.hidden_size).squeeze(1)  # how often a tap reads a location
            read = self._patch_sums(images)  # (b, a)
            value = torch.cat([value, read.T.unsqueeze(-1)], dim=2)
        if problem.first_bias:
            row = _sums_of_patches(self.maps["h"], problem.second, self._constant_patches)  # (b, d)
            if problem.second_bias:
                corner = self.samples * self._constant_patches.sum(dim=1, keepdim=True)
                row = torch.cat([row, corner], dim=1)
            value = torch.cat([value, row.unsqueeze(0)])
        return value

    def S_full(self, value: Tensor) -> Tensor:
        if not self.problem.first_bias:
            return value
        second = self.problem.second
        taps = second.taps
        constant = self._constant_patches  # (b, m)
        columns = torch.zeros(taps * taps, taps, constant.shape[1], dtype=constant.dtype, device=constant.device)
        own, other = torch.arange(taps * taps) // taps, torch.arange(taps * taps) % taps
        columns[torch.arange(taps * taps), other] = constant[own]
        images = fold(columns, second, self.problem.hidden_size).squeeze(1)  # one per (b, b')
        sums = self._patch_sums(images).view(taps, taps, -1)  # (b, b', a)
        rows = sums.transpose(1, 2).reshape(taps, -1)
        corner = self.samples * constant @ constant.T
        return torch.cat([torch.cat([value, rows.T], dim=1), torch.cat([rows, corner], dim=1)])

    def patch_gram(self, value: Tensor) -> Tensor:
        if not self.problem.first_bias:
            return value
        mean = self.patch_mean()
        return _bordered(value, mean[:-1], mean[-1])

    def patch_mean(self) -> Tensor:
        locations = math.prod(self.problem.first_output_size)
        sums = _sums_of_patches(self.maps["x"], self.problem.first, self.like.new_ones(1, locations))[0]
        count = sums.new_full((1,), float(self.samples * locations))
        return torch.cat([sums, count]) if self.problem.first_bias else sums

    @property
    def _constant(self) -> Float[Tensor, " *hidden"]:
        return self.problem.constant(self.like.dtype, self.like.device)

    @property
    def _constant_patches(self) -> Float[Tensor, "b m"]:
        return unfold(self._constant[None, None], self.problem.second)[0]

    def _patch_sums(self, weights: Float[Tensor, "w *hidden"]) -> Float[Tensor, "w a"]:
        """Σ_l weight(l)·U_al of the summed input, a few channels at a time."""
        x, taps = self.maps["x"], self.problem.first.taps
        locations = max(math.prod(self.problem.first_output_size), math.prod(self.problem.hidden_size))
        block = max(1, _BLOCK_ENTRIES // (taps * locations))
        flat = weights.flatten(1)
        parts = [flat @ self.problem.features(part.unsqueeze(0))[0].flatten(1).T for part in x.split(block)]
        return torch.cat(parts, dim=1)


def _sums_of_patches(
    maps: Float[Tensor, "c *size"], geometry: Geometry, weights: Float[Tensor, "w m"]
) -> Float[Tensor, "w d"]:
    """Σ_m weight(m)·patch(m), a few channels at a time."""
    block = max(1, _BLOCK_ENTRIES // (geometry.taps * weights.shape[1]))
    parts = [weights @ unfold(part.unsqueeze(0), geometry)[0].T for part in maps.split(block)]
    return torch.cat(parts, dim=1)


def _bordered(value: Tensor, column: Tensor, corner: Tensor) -> Tensor:
    """A symmetric matrix with one more row and column."""
    result = value.new_empty(value.shape[0] + 1, value.shape[0] + 1)
    result[:-1, :-1] = value
    result[:-1, -1] = result[-1, :-1] = column
    result[-1, -1] = corner
    return result
