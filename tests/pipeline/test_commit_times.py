"""The time of a record is the storage's own; where that tells none there is none."""

import os
import time

import pytest

from pipeline.bench_store import CountingStorage
from pipeline.commit_times import list_times, read_time
from pipeline.local_storage import LocalStorage
from pipeline.object_storage import ObjectStorage

PATH = "layer/commits/task.0000.json"


def test_a_files_time_is_its_mtime(tmp_path):
    storage = LocalStorage(tmp_path)
    storage.create(PATH, b"{}")
    os.utime(tmp_path / PATH, (1.5, 1.5))
    assert read_time(storage, PATH) == 1.5
    assert read_time(storage, "layer/commits/none.0000.json") is None
    assert list_times(storage, "layer/commits") == {}  # a look at each file would cost too much


def test_an_unknown_storage_tells_none(tmp_path):
    assert read_time(CountingStorage(LocalStorage(tmp_path)), PATH) is None


def test_an_objects_time_is_when_it_was_put(s3_url):
    storage = ObjectStorage(s3_url)
    storage.create(PATH, b"{}")
    assert read_time(storage, PATH) == pytest.approx(time.time(), abs=600)
    assert list_times(storage, "layer/commits") == {"task.0000.json": read_time(storage, PATH)}
    assert read_time(storage, "layer/commits/none.0000.json") is None
