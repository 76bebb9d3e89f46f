"""Every error is one of a family, and a Python error of its kind."""

from dataclasses import replace

import pytest

import growconv
from growconv.errors import GrowthError
from growconv.network.find import find_sites
from tests.network import zoo


def test_every_error_is_one_family() -> None:
    model, example = zoo.build("residual")
    site = find_sites(model, example)[1]
    with pytest.raises(ValueError, match="cannot be removed"):
        growconv.shrink(model, site, [])
    with pytest.raises(GrowthError):
        growconv.grow(model, site, replace(zoo.random_growth(site, 3), site="?"))
