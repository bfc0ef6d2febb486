"""A sweep is over a content: its store may be moved, and no other takes its place."""

import json
import logging
import shutil

import pytest

from pipeline.base.yaml import SpecError
from pipeline.scenes.scene import write_corpus
from pipeline.storage.s3 import ObjectStorage
from pipeline.store.commit import record_path
from pipeline.store.snapshot import make_snapshot
from pipeline.store.store import Store
from tests.conftest import SIZE_PX
from tests.pipeline.sweep.test_trials import ids, plan
from tests.support.encode_here import encode_here
from tests.support.s3_server import put


def read_pin(out):
    return json.loads((out / "sweep.json").read_text())


@pytest.fixture
def other_store(tmp_path, spec):
    """Other images in tars of the same names: the layers' and the snapshot's digests are equal."""
    corpus = tmp_path / "other-corpus"
    for split, num in (("train", 8), ("val", 4)):
        write_corpus(corpus, split=split, num_images=num, images_per_tar=4, size_px=SIZE_PX, seed=1)
    return encode_here(spec, corpus, tmp_path / "other")


@pytest.mark.parametrize("how", ["renamed", "linked", "copied without its snapshot"])
def test_a_sweep_goes_on_where_its_store_is_now(copied_store, tmp_path, how, caplog):
    first, now = plan(copied_store, tmp_path / "out"), tmp_path / "now"
    if how == "renamed":
        copied_store.rename(now)
    elif how == "linked":
        now.symlink_to(copied_store)
    else:
        shutil.copytree(copied_store, now, ignore=shutil.ignore_patterns("snapshots"))
        kept = tmp_path / "out" / "snapshots" / f"{first.snapshot.digest}.json"
        kept.parent.mkdir()  # as a run over a store that may not be written has it
        shutil.copy(copied_store / "snapshots" / kept.name, kept)
    found = plan(now, tmp_path / "out")
    assert (ids(found), found.snapshot) == (ids(first), first.snapshot)
    assert found.store_url == read_pin(tmp_path / "out")["store"] == str(now)
    assert f"over {copied_store} goes on over {now}" in caplog.text


def test_a_sweep_goes_on_over_a_copy_on_s3_that_may_only_be_read(
    copied_store, tmp_path, proxy, s3_url, caplog
):
    storage = ObjectStorage(s3_url)
    for path in (path for path in copied_store.rglob("*") if path.is_file()):
        put(storage, str(path.relative_to(copied_store)), path.read_bytes())
    proxy.add("denied", "PUT|POST|DELETE")
    proxy.requests.clear()
    first = plan(copied_store, tmp_path / "out")
    assert ids(plan(s3_url, tmp_path / "out")) == ids(first)
    assert read_pin(tmp_path / "out")["store"] == s3_url
    assert (tmp_path / "out" / "snapshots" / f"{first.snapshot.digest}.json").is_file()
    assert "HTTP 403" in caplog.text
    refused = [path for method, path in proxy.requests if method not in ("GET", "HEAD")]
    assert refused
    assert all("/snapshots/" in path or "/inventory/" in path for path in refused)


def test_a_store_of_other_content_is_refused_with_both_digests(
    store_folder, copied_store, other_store, tmp_path
):
    first = plan(copied_store, tmp_path / "out")
    before = read_pin(tmp_path / "out")
    assert plan(other_store, tmp_path / "else").snapshot == first.snapshot
    theirs = read_pin(tmp_path / "else")["contents"]
    layer = min(theirs)
    match = f"{layer} has the content {before['contents'][layer]}; in .*other it is {theirs[layer]}"
    with pytest.raises(SpecError, match=match):
        plan(other_store, tmp_path / "out")
    shutil.rmtree(copied_store)
    other_store.rename(copied_store)  # also in the same place
    with pytest.raises(SpecError, match="give another --out"):
        plan(copied_store, tmp_path / "out")
    assert read_pin(tmp_path / "out") == before


def test_a_moved_store_that_lacks_a_task_is_refused(copied_store, tmp_path):
    first = plan(copied_store, tmp_path / "out")
    copied_store.rename(tmp_path / "now")
    for layer, (record, *_) in first.snapshot.records.items():
        (tmp_path / "now" / record_path(layer, record.task, record.generation)).unlink()
    with pytest.raises(SpecError, match="it is not to be read; give another --out"):
        plan(tmp_path / "now", tmp_path / "out")


def test_a_moved_store_of_other_tasks_is_refused_with_both_snapshots(copied_store, tmp_path):
    first = plan(copied_store, tmp_path / "out")
    now = tmp_path / "now"
    shutil.copytree(copied_store, now, ignore=shutil.ignore_patterns("snapshots"))
    for layer, (record, *_) in first.snapshot.records.items():
        (now / record_path(layer, record.task, record.generation)).unlink()
    match = f"over snapshot {first.snapshot.digest} of .*What is committed there is [0-9a-f]{{16}};"
    with pytest.raises(SpecError, match=match):
        plan(now, tmp_path / "out")


def test_another_snapshot_of_the_store_may_be_given(copied_store, tmp_path):
    first = plan(copied_store, tmp_path / "out")
    store, (*layers,) = Store.open(str(copied_store)), first.snapshot.records
    fewer = make_snapshot(store, {layer: first.snapshot.records[layer][1:] for layer in layers})
    data = {"snapshot": fewer.digest, "train": "*train-00001*"}
    assert plan(copied_store, tmp_path / "out", data=data).snapshot == fewer


def test_a_sweep_of_an_older_version_goes_on_by_its_snapshot(copied_store, tmp_path, caplog):
    first = plan(copied_store, tmp_path / "out")
    plain = {"store": "/gone", "snapshot": first.snapshot.digest}
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(plain))
    with caplog.at_level(logging.WARNING):
        assert ids(plan(copied_store, tmp_path / "out")) == ids(first)
    assert set(read_pin(tmp_path / "out")["contents"]) == set(first.snapshot.records)
