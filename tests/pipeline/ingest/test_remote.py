"""``ingest`` to storages by URL: each file is seen whole or not at all."""

import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import s3fs

from tests.pipeline.ingest.test_run import images, ingest, read_files  # noqa: F401
from tests.support.s3_server import s3_variables

ROOT = Path(__file__).parents[3]
INGEST = """
import sys
from pathlib import Path
from tests.pipeline.ingest.test_run import ingest
ingest(Path(sys.argv[1]), sys.argv[2])
"""


def read_objects(url):
    filesystem, path = fsspec.url_to_fs(url)
    filesystem.invalidate_cache()
    found = filesystem.ls(path, detail=False) if filesystem.exists(path) else []
    return {name.rpartition("/")[2]: filesystem.cat_file(name) for name in found}


def test_a_storage_that_fsspec_knows_gets_the_same_files(images, tmp_path):  # noqa: F811
    done = ingest(images, tmp_path)
    assert ingest(images, "memory://ingested/out") == done
    assert read_objects("memory://ingested/out") == read_files(tmp_path)
    assert ingest(images, "memory://ingested/out") == done, "kept"


@pytest.mark.thorough
def test_a_run_killed_while_it_uploads_leaves_no_tar_on_s3(
    images,  # noqa: F811
    s3_url,
    s3_server,
    proxy,
    tmp_path,
    monkeypatch,
):
    s3fs.S3FileSystem.clear_instance_cache()
    url = s3_url.replace("store ", "ingested-")
    done = ingest(images, tmp_path)
    held = proxy.add("held", "PUT", r"images-00001\.tar", times=1)
    environment = {**os.environ, **s3_variables(proxy.endpoint), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INGEST, str(images), url]
    with subprocess.Popen(command, env=environment, cwd=ROOT) as child:
        for _ in range(1200):
            if held.hits or child.poll() is not None:
                break
            time.sleep(0.05)
        child.kill()
    assert held.hits == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    left = read_objects(url)
    whole = read_files(tmp_path)
    assert "images-00000_stats.json" in left
    assert not {"images-00001.tar", "images-00001_stats.json"} & left.keys()
    assert left.items() <= whole.items()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    failed = proxy.add("throttled", "PUT", r"images-00002\.tar", times=7)
    assert ingest(images, url) == done
    assert failed.hits == 7, "waited out"
    assert read_objects(url) == whole
    s3fs.S3FileSystem.clear_instance_cache()
