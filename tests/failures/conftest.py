"""The processes that the failures' tests kill."""

from tests.failures.ray_runs import (  # noqa: F401  fixtures
    assert_whole,
    cluster,
    inputs,
    lasting_cluster,
    start,
)
