"""The processes that the failures' tests kill."""

from tests.writers import writers  # noqa: F401  a fixture
