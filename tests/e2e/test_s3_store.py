"""Corpus and store on a real S3 server: encoded, read back, and bit for bit as on local disk."""

import json
import logging

import numpy as np
import pytest
import s3fs
import torch

from pipeline.encode.prepare import prepare_encode
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers
from pipeline.stage.encode_stage import EncodeStage
from pipeline.storage.open import open_storage
from pipeline.storage.s3 import ObjectStorage
from pipeline.store.layout import list_arrays
from pipeline.store.store import Store
from tests.support.s3_server import SECRET_KEY, point_at, put

pytestmark = pytest.mark.thorough

ALL = frozenset({"latent", "text", "image", "features"})


@pytest.fixture
def corpus_url(corpus_folder, s3_server, s3_url):
    """The tests' corpus on the server, s3fs made to see the environment of now."""
    s3fs.S3FileSystem.clear_instance_cache()
    url = s3_url.replace("store ", "corpus-")
    storage = ObjectStorage(url)
    for path in corpus_folder.glob("*.tar"):
        put(storage, path.name, path.read_bytes())
    yield url
    s3fs.S3FileSystem.clear_instance_cache()


def encode(spec, corpus_url, store_url):
    run = prepare_encode(spec, [f"{corpus_url}/*.tar"], store_url, batch=8)
    stage = EncodeStage(run.config)
    return [stage.encode(item) for item in run.items]


def read_all(url):
    """{(kind, task, name)} -> values of every array and index, and what each commit counts."""
    store, found = Store.open(url), {}
    for layer in store.list_layers():
        for task, commit in store.newest_commits(layer.folder).items():
            tar = task.rsplit("-", 1)[0]
            found[layer.kind, tar, "rows"] = commit.rows
            if layer.kind == "latents":
                found[layer.kind, tar, "index"] = store.read_index(commit).to_pylist()
            for name in list_arrays(layer):
                array = store.open_array(layer, commit, name)
                rows = [array.read_rows([row])[0] for row in range(array.num_rows)]
                found[layer.kind, tar, name] = np.stack(rows)
    return found


def read_pairs(url):
    source = open_layers(url, write=True)
    reader = PairReader(source, tasks="*train*", inputs=ALL, blocks=(6, 10))
    return reader.read([len(reader) - 1, 0, 3], draws=[1, 0, 1])


def assert_same(url, store_folder):
    ours, local = read_all(url), read_all(str(store_folder))
    assert ours.keys() == local.keys()
    for name, values in local.items():
        np.testing.assert_equal(ours[name], values, err_msg=str(name))


def test_a_store_on_s3_is_that_on_local_disk_and_holds_no_secret(
    spec, store_folder, corpus_url, s3_url, caplog
):
    with caplog.at_level(logging.DEBUG):
        outcomes = encode(spec, corpus_url, s3_url)
        assert {outcome.status for outcome in outcomes} == {"committed"}, outcomes
        assert prepare_encode(spec, [f"{corpus_url}/*.tar"], s3_url, batch=8).items == ()
        assert_same(s3_url, store_folder)
        ours, local = read_pairs(s3_url), read_pairs(str(store_folder))
    assert ours.keys == local.keys
    assert torch.equal(ours.mask, local.mask)
    for block in (6, 10):
        assert torch.equal(ours.inputs["features"][block], local.inputs["features"][block])
    assert torch.equal(ours.inputs["latent"], local.inputs["latent"])
    storage = open_storage(s3_url)
    files = dict(storage.list_files())
    assert len(files) > 50
    secret = SECRET_KEY.encode()
    assert not [path for path in files if secret in storage.read(path)]
    assert len(caplog.records) > 100
    assert SECRET_KEY not in caplog.text
    assert SECRET_KEY not in json.dumps([repr(outcome) for outcome in outcomes])


def test_a_storm_of_faults_changes_nothing(
    spec, store_folder, corpus_url, s3_url, proxy, monkeypatch
):
    s3fs.S3FileSystem.clear_instance_cache()
    point_at(monkeypatch, proxy.endpoint)
    rules = [
        proxy.add("throttled", "GET|HEAD", "corpus", times=2),
        proxy.add("reset", "PUT", "/data/", times=3),
        proxy.add("throttled", "PUT|GET", "/data/", times=3),
        proxy.add("cut", "GET", "/data/", times=3),
        proxy.add("lost", "PUT", "/commits/", times=1),
        proxy.add("failed", "PUT", "/commits/", times=1),
        proxy.add("conflict", "PUT", "/commits/", times=1),
    ]
    outcomes = encode(spec, corpus_url, s3_url)
    assert {outcome.status for outcome in outcomes} == {"committed"}, outcomes
    assert [rule.hits for rule in rules] == [rule.times for rule in rules]
    point_at(monkeypatch, f"http://127.0.0.1:{proxy.upstream_port}")
    assert_same(s3_url, store_folder)


def test_a_task_reads_each_of_its_files_a_few_times_whatever_its_batches(
    spec, corpus_url, s3_url, proxy, monkeypatch
):
    """Two layers, seven arrays: once to verify, once for the features, and no question twice."""
    point_at(monkeypatch, proxy.endpoint)
    run = prepare_encode(spec, [f"{corpus_url}/*.tar"], s3_url, batch=1)
    num_before = len(proxy.requests)
    assert EncodeStage(run.config).encode(run.items[0]).status == "committed"
    written = [path for method, path in proxy.requests if method == "PUT" and "/data/" in path]
    for path in written:
        methods = [method for method, asked in proxy.requests if asked == path]
        is_read_for_features = any(x in path for x in ("latent_mean/c/", "text/c/"))
        allowed = ["PUT", "GET", "GET", "GET"] if is_read_for_features else ["PUT", "GET"]
        again = ["GET"] * any(x in path for x in ("index", "latent_mean/z", "text/z"))
        assert methods == allowed + again, path
    assert not [path for _, path in proxy.requests[num_before:] if "list-type" in path]
