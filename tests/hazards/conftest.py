"""Models and batches of the tests of growth."""

from tests.growth.conftest import batches_of, chain, digits, sites_of  # noqa: F401 (fixtures)
