"""Arguments of geometry: what is impossible is named."""

import pytest
import torch

from growconv.convolution.toeplitz import toeplitz_matrix
from growconv.errors import GeometryError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input_size": (2, 2)}, "does not fit"),
        ({"input_size": (5, 5, 5)}, "input_size has 3 entries"),
        ({"input_size": (5, 5), "stride": 0}, "stride"),
        ({"input_size": (5, 5), "padding": "full"}, "this named padding"),
        ({"input_size": (5, 5), "padding": (1, 1, 1)}, "padding"),
        ({"input_size": (5, 5), "groups": 3}, "groups"),
    ],
)
def test_impossible_geometries_are_named(settings, words):
    with pytest.raises(GeometryError, match=words):
        toeplitz_matrix(torch.randn(4, 2, 3, 3), **settings)
