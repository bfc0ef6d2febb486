"""Where a Ray job may write."""

import logging

import pytest

from pipeline.base.ray_cluster import ray_running

pytestmark = pytest.mark.thorough


def test_our_own_warnings_are_heard_while_ray_runs_and_after(caplog):
    """pytest's handler is with Ray's logger too, as any application's may be."""
    logger = logging.getLogger("pipeline.base.ray_cluster.test")
    form = caplog.handler.formatter
    with ray_running(num_cpus=1):
        logger.warning("heard while it runs")
        assert "heard while it runs" in caplog.text
    logger.warning("heard after")
    assert "heard after" in caplog.text
    assert caplog.handler.formatter is form
    assert caplog.handler.level == logging.NOTSET
