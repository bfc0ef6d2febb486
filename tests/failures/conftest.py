"""The processes that the failures' tests kill."""

from tests.support.ray_runs import (  # noqa: F401  fixtures
    assert_whole,
    cluster,
    inputs,
    lasting_cluster,
    start,
)
