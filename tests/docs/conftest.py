"""Digits for the page about loops of one's own."""

from tests.integrations.conftest import digits  # noqa: F401 (a fixture)
