"""Faults 15 to 17 and 19 on S3: throttling, resets, lost answers, cut bodies, 403, conditions."""

import os
import traceback

import pytest
import s3fs
from torch.utils.data import DataLoader

from pipeline.base.outages import FIRST_S, OutageError, Patience
from pipeline.base.remote_copy import open_filesystem, retry
from pipeline.storage.interface import StorageError, remove_leftovers
from pipeline.storage.open import check_create, open_storage
from pipeline.storage.s3 import NUM_RETRIES, PART_BYTES, ObjectStorage
from pipeline.store.array_writer import write_bytes
from pipeline.store.commit import (
    Commit,
    DamagedStoreError,
    new_attempt,
    verify_written,
    write_commit,
)
from tests.support.fake_time import FakeTime, make_patience
from tests.support.read_parts import read_parts
from tests.support.s3_server import SECRET_KEY, put

QUICK_S = 2.0
RECORD = r"/commits/"


@pytest.fixture
def direct(s3_url):
    """The store, past the proxy."""
    return ObjectStorage(s3_url, patience=make_patience(QUICK_S))


@pytest.fixture
def storage(direct, proxy, s3_url):
    """The store through the proxy."""
    return ObjectStorage(s3_url, patience=make_patience(QUICK_S))


def make_commit(task="a"):
    return Commit(
        layer="latents-0123456789abcdef",
        task=task,
        generation=0,
        attempt=new_attempt(0),
        rows={"pairs": 1, "views": 1, "prompts": 1},
        pairs_sha256="0" * 64,
        files=(),
    )


@pytest.mark.parametrize("fault", ["throttled", "reset", "cut"])
def test_transient_faults_are_tried_again(storage, proxy, fault):
    methods = "GET|HEAD|PUT|POST" if fault != "cut" else "GET"
    data = os.urandom(100_000)
    for name in ("small", "large"):
        rule = proxy.add(fault, methods, name, times=2)
        with storage.open_write(name) as file:
            file.write(data * (1 if name == "small" else 100))
        assert storage.digest(name) == (file.num_bytes, file.sha256)
        assert rule.hits == 2
    for use in (
        lambda: storage.read("small") == data,
        lambda: storage.read_range("small", 5, 100) == data[5:105],
        lambda: read_parts(storage, "small", (1, [2]), (50, [7])) == [data[1:3], data[50:57]],
        lambda: sorted(storage.list_names()) == ["large", "small"],
        lambda: len(list(storage.list_files())) == 2,
    ):
        rule = proxy.add(fault, "GET", times=2)
        assert use()
        assert rule.hits == 2


class Names:
    """A dataset whose items are read from a storage, which it opens anew or is given."""

    def __init__(self, url, storage=None):
        self.url, self.storage = url, storage

    def __len__(self):
        return 4

    def __getitem__(self, number):
        return (self.storage or ObjectStorage(self.url)).read("small")[:number]


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize(
    "context", ["fork", pytest.param("forkserver", marks=pytest.mark.thorough)]
)
def test_a_forked_process_is_told_at_once_that_it_lacks_the_clients_threads(
    direct, s3_url, anew, context
):
    """A DataLoader whose workers are forked, of a process that has made requests."""
    put(direct, "small", b"abcd")
    assert direct.read("small") == b"abcd"
    loader = DataLoader(
        Names(s3_url, None if anew else direct),
        batch_size=None,
        num_workers=2,
        multiprocessing_context=context,
        timeout=120,  # of a worker that hangs, another error
    )
    if context == "fork":
        with pytest.raises(StorageError, match='multiprocessing_context="spawn"'):
            list(loader)
    else:
        assert list(loader) == [b"", b"a", b"ab", b"abc"]


def test_a_long_listing_that_is_cut_goes_on_where_it_was(storage, direct, proxy):
    names = {f"a/{number:04d}" for number in range(1003)}  # a page holds 1000
    for name in names:
        put(direct, name, b"")
    rule = proxy.add("cut", "GET", "continuation-token|start-after", times=2)
    found = [path for path, _ in storage.list_files("a")]
    assert rule.hits == 2
    assert (len(found), set(found)) == (1003, names)
    assert len(list(direct.list_names("a"))) == 1003


@pytest.mark.parametrize("fault", ["throttled", "reset", "conflict"])
def test_a_record_is_created_after_transient_faults(storage, direct, proxy, fault):
    rule = proxy.add(fault, "PUT", RECORD, times=3)
    commit = make_commit()
    assert write_commit(storage, commit) == "won"
    assert rule.hits == 3
    assert write_commit(direct, make_commit()) == "lost"


@pytest.mark.parametrize("fault", ["lost", "failed"])
def test_a_commit_whose_answer_is_lost_counts_once_as_ours(storage, direct, proxy, fault):
    rule = proxy.add(fault, "PUT", RECORD, times=1)
    commit = make_commit()
    assert write_commit(storage, commit) == "won"
    assert rule.hits == 1
    assert list(direct.list_names(f"{commit.layer}/commits")) == ["a.0000.json"]
    assert write_commit(direct, make_commit()) == "lost"
    assert write_commit(direct, commit) == "won"


@pytest.mark.parametrize("fault", ["lost", "failed"])
def test_a_lost_race_whose_answer_is_lost_is_lost(storage, direct, proxy, fault):
    assert write_commit(direct, make_commit()) == "won"
    proxy.add(fault, "PUT", RECORD, times=1)
    assert write_commit(storage, make_commit()) == "lost"


@pytest.mark.parametrize(
    ("fault", "said"), [("throttled", "HTTP 503 SlowDown"), ("reset", "connection reset")]
)
def test_faults_that_last_are_an_error_when_patience_ends(storage, proxy, fault, said):
    rule = proxy.add(fault, "GET")
    with pytest.raises(OutageError, match=f"/name: could not read: {said}; .* not answered since"):
        storage.read("name")
    assert rule.hits % (NUM_RETRIES + 1) == 0
    assert NUM_RETRIES + 1 < rule.hits < 10 * (NUM_RETRIES + 1)
    proxy.rules.clear()
    proxy.add(fault, "PUT", RECORD)
    with pytest.raises(OutageError, match=rf"a\.0000\.json: could not be committed: .*{said}"):
        write_commit(storage, make_commit())


def test_a_corpus_on_s3_is_tried_in_short_turns_and_told_by_the_status(direct, proxy, monkeypatch):
    """Most of the waiting is the process's patience, and none of it botocore's."""
    monkeypatch.setattr("pipeline.base.remote_copy.PATIENCE", make_patience(0))
    put(direct, "a.tar", b"tar")
    s3fs.S3FileSystem.clear_instance_cache()
    rule, url = proxy.add("throttled", "GET"), f"{direct.url}/a.tar"
    filesystem, path = open_filesystem(url)
    with pytest.raises(OutageError, match=r"a\.tar: could not be read: HTTP 503 SlowDown; s3://"):
        retry(lambda: filesystem.cat_file(path, start=0, end=1), what=url)
    assert rule.hits == filesystem.retries
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_server_that_was_never_there_is_an_error_after_a_short_time(s3_url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    time = FakeTime()
    storage, began_s = ObjectStorage(s3_url, patience=make_patience(600, time)), time.now_s
    with pytest.raises(OutageError, match=r"/x: could not read: connection refused.*the way to"):
        storage.read("x")
    assert time.now_s - began_s == pytest.approx(FIRST_S, abs=0.1)


def test_a_denied_request_fails_at_once_and_is_not_taken_for_missing(storage, direct, proxy):
    assert direct.create("there", b"1")
    file = storage.open_write("large")
    proxy.add("denied")
    uses = (
        lambda: storage.read("there"),
        lambda: storage.read_range("there", 0, 1),
        lambda: storage.size("there"),
        lambda: storage.exists("none"),
        lambda: storage.digest("there"),
        lambda: list(storage.list_names()),
        lambda: list(storage.list_files()),
        lambda: storage.create("new", b""),
        lambda: put(storage, "new", b""),
        lambda: file.write(bytes(PART_BYTES)),
    )
    for use in uses:
        before = len(proxy.requests)
        with pytest.raises(PermissionError, match=r"HTTP 403 ?\w*\. Look at the credentials"):
            use()
        assert len(proxy.requests) == before + 1
    for use in (lambda: write_commit(storage, make_commit()), lambda: check_create(storage)):
        with pytest.raises(PermissionError, match="HTTP 403"):
            use()
    assert sorted(path for path, _ in direct.list_files()) == ["there"]


@pytest.mark.parametrize("num_bytes", [10, 100_000])
def test_a_body_that_stays_cut_is_an_error(storage, direct, proxy, num_bytes):
    put(direct, "file", os.urandom(num_bytes))
    for fault in ("cut", "short"):
        proxy.rules.clear()
        proxy.add(fault, "GET")
        for use in (
            lambda: storage.read("file"),
            lambda: storage.read_range("file", 1, num_bytes - 2),
            lambda: storage.read_range("file", 1, num_bytes + 2),
            lambda: read_parts(storage, "file", (0, [num_bytes])),
            lambda: storage.digest("file"),
        ):
            with pytest.raises(OutageError, match=r"file: (could not read|expected \d+ bytes)"):
                use()


def test_what_is_not_stored_as_written_is_not_committed(storage, direct):
    written = write_bytes(storage, "x", b"content")
    verify_written(storage, [written])
    put(direct, "x", b"contenu")
    with pytest.raises(DamagedStoreError, match=r"x: read back 7 bytes.*nothing was committed"):
        verify_written(storage, [written])
    direct.remove_tree("x")
    with pytest.raises(FileNotFoundError, match="x: no such object"):
        verify_written(storage, [written])


def write_parts(storage, name, num=3):
    with storage.open_write(name) as file:
        for _ in range(num):
            file.write(os.urandom(PART_BYTES))
        file.write(b"end")
    return file


@pytest.mark.parametrize("fault", ["lost", "failed"])
@pytest.mark.parametrize("step", ["PUT.*partNumber=2", "POST.*uploadId", "POST.*uploads"])
def test_an_upload_whose_answer_is_lost_is_whole(storage, direct, proxy, fault, step):
    method, path = step.split(".*")
    rule = proxy.add(fault, method, path, times=1)
    file = write_parts(storage, "large")
    assert rule.hits == 1
    assert direct.digest("large") == (file.num_bytes, file.sha256)
    assert list(direct.list_names()) == ["large"]


def test_an_upload_that_ended_and_is_forgotten_is_whole(storage, direct, proxy):
    """The answer is lost, and asked again the server knows no such upload."""
    rules = [proxy.add(fault, "POST", "uploadId", times=1) for fault in ("lost", "forgotten")]
    file = write_parts(storage, "large")
    assert [rule.hits for rule in rules] == [1, 1]
    assert direct.digest("large") == (file.num_bytes, file.sha256)
    proxy.add("forgotten", "POST", "uploadId")
    with pytest.raises(StorageError, match=r"gone: could not end the upload: HTTP 404 NoSuchUp"):
        write_parts(storage, "gone")


@pytest.mark.thorough
@pytest.mark.parametrize("fault", ["throttled", "reset"])
def test_an_outage_in_mid_upload_is_ridden_out(s3_url, direct, proxy, fault):
    storage = ObjectStorage(s3_url, patience=Patience(60))
    with storage.open_write("large") as file:
        file.write(os.urandom(2 * PART_BYTES))
        rule = proxy.add(fault, times=12)  # of every request
        file.write(os.urandom(4 * PART_BYTES))
        file.write(b"end")
    assert rule.hits == 12
    assert direct.digest("large") == (file.num_bytes, file.sha256)
    assert not any(method == "DELETE" for method, _ in proxy.requests)


@pytest.mark.thorough
def test_a_wait_in_mid_upload_is_ended_by_who_asks(s3_url, direct, proxy, monkeypatch):
    monkeypatch.setattr("pipeline.storage.s3_upload.LOOK_AFTER_S", 1.0)
    patience, asked = Patience(600), []
    patience.askers.append(lambda: bool(asked.append(None)) or len(asked) > 2)
    storage = ObjectStorage(s3_url, patience=patience)
    file = storage.open_write("large")
    file.write(bytes(PART_BYTES))
    rule = proxy.add("throttled")
    with pytest.raises(OutageError, match=r"large: could not look at: HTTP 503.*answered since"):
        file.write(bytes(9 * PART_BYTES))
    assert rule.hits > 0
    with pytest.raises(StorageError, match="the upload has failed"):
        file.write(b"more")
    file.abandon()
    assert list(direct.list_files()) == []


@pytest.mark.parametrize("step", ["POST uploads", "PUT partNumber=2", "POST uploadId"])
def test_an_upload_that_fails_is_aborted_and_leaves_nothing(storage, direct, proxy, step):
    proxy.add("denied", *step.split())
    with pytest.raises(PermissionError, match=r"large: could not .*HTTP 403"):
        write_parts(storage, "large", num=6)
    assert list(direct.list_files()) == []
    aborted = any(method == "DELETE" and "uploadId" in url for method, url in proxy.requests)
    assert aborted == (step != "POST uploads")  # then none began


def test_an_abandoned_upload_is_aborted(storage, direct, proxy):
    file = storage.open_write("large")
    for _ in range(3):
        file.write(bytes(PART_BYTES))
    file.abandon()
    file.abandon()
    with pytest.raises(StorageError, match="the upload has ended"):
        file.write(b"more")
    assert sum(method == "DELETE" and "uploadId" in url for method, url in proxy.requests) == 1
    assert list(direct.list_files()) == []


def test_a_small_file_is_one_request(storage, proxy):
    write_bytes(storage, "a/small", bytes(PART_BYTES - 1))
    assert [method for method, _ in proxy.requests] == ["PUT"]


def test_a_server_that_ignores_conditions_is_refused(storage, direct, proxy):
    proxy.add("unconditional", "PUT")
    with pytest.raises(StorageError, match=r"refused to write: 9 writers .* honours If-None-Match"):
        check_create(storage)
    assert list(direct.list_files()) == []


def test_what_cannot_be_removed_is_logged_and_left(storage, direct, proxy, caplog):
    direct.create("a/x", b"")
    proxy.add("denied", "POST")
    with pytest.raises(OSError, match="HTTP 403"):
        storage.remove_tree("a")
    assert "left for gc" not in caplog.text
    remove_leftovers(storage, "a")
    assert "a: left for gc" in caplog.text
    assert "HTTP 403" in caplog.text
    assert direct.exists("a/x")


def test_a_bucket_that_is_not_there_is_said_so(s3_url):
    storage = open_storage("s3://no-such-bucket-at-all/store")
    for use in (
        lambda: storage.read("x"),
        lambda: [*storage.list_files("x")],
        lambda: [*storage.list_names()],
    ):
        with pytest.raises(StorageError, match=r"NoSuchBucket.* Create the bucket"):
            use()


def test_no_error_shows_the_secret(storage, direct, proxy, monkeypatch):
    monkeypatch.setattr("pipeline.storage.s3.NUM_RETRIES", 0)
    hasty = make_patience(0)
    ours = ObjectStorage(storage.url, patience=hasty)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    wrong = ObjectStorage(storage.url, patience=hasty)
    texts = [repr(wrong), repr(wrong._store), repr(wrong.__reduce__())]
    for fault in (None, "denied", "reset", "cut", "failed"):
        proxy.rules.clear()
        if fault:
            proxy.add(fault)
        texts += [text for each in (ours, wrong) for text in fail_all_ways(each)]
    assert len(texts) > 40
    assert not [text for text in texts if SECRET_KEY in text]


def fail_all_ways(storage):
    """The traceback of every step that fails."""
    for step in (
        lambda: storage.read("x"),
        lambda: storage.create("x", b""),
        lambda: put(storage, "x", b""),
        lambda: list(storage.list_names()),
        lambda: list(storage.list_files()),
        lambda: check_create(storage),
        lambda: write_parts(storage, "large", num=1),
    ):
        try:
            step()
        except OSError as error:
            yield "".join(traceback.format_exception(error))
