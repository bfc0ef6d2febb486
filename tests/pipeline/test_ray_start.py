"""Where a Ray job may write."""

import logging
from pathlib import Path

import pytest

from pipeline.ray_start import JOB_COPIES, JOB_VARIABLE, check_outlives_job, ray_running


def test_a_submitted_jobs_results_must_outlive_it(tmp_path, monkeypatch):
    copy = tmp_path / "runtime_resources" / JOB_COPIES / "_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    with pytest.raises(ValueError, match=r"--store: expected s3://.* got runs/store, which is in"):
        check_outlives_job("--store", "runs/store")
    with pytest.raises(ValueError, match="--out: expected"):
        check_outlives_job("--out", copy / "run")
    with pytest.raises(ValueError, match=r"--out: expected an absolute path"):
        check_outlives_job("--out", Path("run"))
    check_outlives_job("--store", "s3://bucket/store")
    check_outlives_job("--out", Path("/srv/shared/run"))


def test_outside_of_a_job_any_folder_will_do(tmp_path, monkeypatch):
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    check_outlives_job("--store", tmp_path / JOB_COPIES / "store")


@pytest.mark.parametrize("url", ["s3://bucket/run", "file:///run", "gs://bucket"])
def test_a_path_that_was_given_as_a_url_is_no_folder_of_that_name(url):
    with pytest.raises(ValueError, match=r"--out: expected a path of a file system, got the URL"):
        check_outlives_job("--out", Path(url))
    check_outlives_job("--out", Path("runs/a:b"))


def test_our_own_warnings_are_heard_while_ray_runs_and_after(caplog):
    """pytest's handler is with Ray's logger too, as any application's may be."""
    logger = logging.getLogger("pipeline.ray_start.test")
    form = caplog.handler.formatter
    with ray_running(num_cpus=1):
        logger.warning("heard while it runs")
        assert "heard while it runs" in caplog.text
    logger.warning("heard after")
    assert "heard after" in caplog.text
    assert caplog.handler.formatter is form
    assert caplog.handler.level == logging.NOTSET
