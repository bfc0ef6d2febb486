"""Where a command may write: what outlives a Ray job, and what is not in the way."""

from pathlib import Path

import pytest

from jobs.outputs import check_outlives_job, check_writable
from pipeline.base.job_copy import JOB_COPIES, JOB_VARIABLE


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


@pytest.mark.parametrize("where", ["", "file/below.jsonl", "file/a/b.jsonl"])
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^--metrics: expected a file that can be written, got "):
        check_writable("--metrics", tmp_path / where)


def test_what_can_be_written_is_not_made_by_asking(tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("file", "new", "a/b/new"):
        check_writable("--metrics", tmp_path / path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
