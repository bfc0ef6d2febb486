"""A corpus: which tars a pattern names, what identifies them, and reading what was listed."""

import hashlib
import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import fsspec
import pytest

import pipeline.base.remote_copy
from pipeline.corpus.source import HEAD_BYTES, SourceChangedError, digest_head, open_source
from pipeline.corpus.tar import list_members
from pipeline.corpus.tasks import CorpusError, Task, first_tar_id, list_tasks, split_tasks
from tests.support.fake_time import make_patience


@pytest.fixture
def corpus(tmp_path):
    """Files a.tar, b.tar, c.tar of 1, 2, 3 bytes in train/, and a.tar of 1 in val/."""
    folder = tmp_path / "corpus"
    for name, data in (
        ("train/a.tar", b"1"),
        ("train/b.tar", b"12"),
        ("train/c.tar", b"123"),
        ("val/a.tar", b"1"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(pipeline.base.remote_copy, "PATIENCE", make_patience(60))


def names(tasks):
    return ["/".join(task.url.split("/")[-2:]) for task in tasks]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("train/a.tar", ["train/a.tar"]),
        ("train/{a,c}.tar", ["train/a.tar", "train/c.tar"]),
        ("train/{a..c}.tar", ["train/a.tar", "train/b.tar", "train/c.tar"]),
        ("train/*.tar", ["train/a.tar", "train/b.tar", "train/c.tar"]),
        ("train/[ab].tar", ["train/a.tar", "train/b.tar"]),
        ("{train,val}/a.tar", ["train/a.tar", "val/a.tar"]),
        ("{val,train}/[a-b]*.tar", ["train/a.tar", "train/b.tar", "val/a.tar"]),
        ("**/*.tar", ["train/a.tar", "train/b.tar", "train/c.tar", "val/a.tar"]),
        ("?????/c.tar", ["train/c.tar"]),
    ],
)
def test_patterns_take_braces_and_globs(corpus, pattern, expected):
    assert names(list_tasks([f"{corpus}/{pattern}"])) == expected


def test_numbered_braces_keep_their_zeros(tmp_path):
    for number in range(8, 12):
        (tmp_path / f"x-{number:04d}.tar").write_bytes(b"x")
    tasks = list_tasks([f"{tmp_path}/x-{{0008..0011}}.tar"])
    assert [task.id[:6] for task in tasks] == ["x-0008", "x-0009", "x-0010", "x-0011"]


def test_a_tar_named_twice_is_listed_once(corpus):
    patterns = [f"{corpus}/train/*.tar", f"{corpus}/train/a.tar", f"file://{corpus}/train/b.tar"]
    assert names(list_tasks(patterns)) == ["train/a.tar", "train/b.tar", "train/c.tar"]


def test_a_relative_path_is_the_same_tar(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    assert list_tasks(["train/a.tar"]) == list_tasks([f"{corpus}/train/a.tar"])


@pytest.mark.parametrize("pattern", ["none.tar", "none/*.tar", "train/{a,x}.tar", "**/x"])
def test_a_pattern_that_names_nothing_is_an_error(corpus, pattern):
    with pytest.raises(CorpusError, match=r"expected at least one tar at .*, found none"):
        list_tasks([f"{corpus}/train/a.tar", f"{corpus}/{pattern}"])


def test_no_pattern_at_all_is_an_error():
    with pytest.raises(CorpusError, match="expected at least one pattern"):
        list_tasks([])


def test_unbalanced_braces_are_an_error(corpus):
    with pytest.raises(
        CorpusError, match=r"in .*: Unbalanced braces.*; close the brace, or write \\{"
    ):
        list_tasks([f"{corpus}/train/{{a.tar"])


@pytest.mark.parametrize(
    "pattern",
    ["simplecache::s3://b/a.tar", "zip://a::file:///x.zip", "s3:{:,}//b/a", "pipe:cat a.tar"],
)
def test_chained_and_command_urls_are_refused(pattern):
    with pytest.raises(CorpusError, match="chained and command URLs are refused"):
        list_tasks([pattern])


@pytest.mark.parametrize(
    "pattern",
    [
        "s3://key:secret@bucket/a.tar",
        "https://user:secret@host/a.tar",
        "https://host/a.tar?X-Amz-Signature=secret",
        "http://host/{a,b}.tar?token=secret",
        "ftp://u:secret@host/{a.tar",
    ],
)
def test_urls_with_secrets_are_refused_without_showing_them(pattern):
    with pytest.raises(CorpusError, match="without a password or a query") as error:
        list_tasks([pattern])
    assert "secret" not in str(error.value)


def test_an_unknown_scheme_is_an_error():
    with pytest.raises(CorpusError, match=r"nosuch://x/a\.tar cannot be opened: .*nosuch"):
        list_tasks(["nosuch://x/a.tar"])


def test_no_permission_is_not_no_tar(corpus, memory, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(f"403: {path}")

    monkeypatch.setattr(type(memory), "info", lambda self, path, **options: refuse(path))
    with pytest.raises(PermissionError, match="403"):
        list_tasks(["memory://corpus/a.tar"])


def test_an_id_is_the_stem_and_a_digest_of_the_path(corpus):
    tasks = list_tasks([f"{corpus}/*/*.tar"])
    assert [task.num_bytes for task in tasks] == [1, 2, 3, 1]
    assert [re.fullmatch(r"([abc])-[0-9a-f]{12}", task.id)[1] for task in tasks] == list("abca")
    assert tasks[1].id == f"b-{hashlib.sha256(b'train/b.tar').hexdigest()[:12]}"
    first = hashlib.sha256(b"train/b.tar\x002").hexdigest()[:8]
    assert first_tar_id(tasks[1]) == f"b-{first}"  # what the first ldznet gave it
    assert len({task.id for task in tasks}) == 4


def test_ids_survive_a_move_of_the_whole_corpus(corpus, tmp_path):
    before = [task.id for task in list_tasks([f"{corpus}/*/*.tar"])]
    (tmp_path / "far").mkdir()
    corpus.rename(tmp_path / "far" / "away")
    assert [task.id for task in list_tasks([f"{tmp_path}/far/away/*/*.tar"])] == before


def test_ids_are_the_same_on_another_file_system(corpus, memory):
    for path in corpus.rglob("*.tar"):
        memory.pipe_file(f"/corpus/{path.relative_to(corpus)}", path.read_bytes())
    there = list_tasks(["memory://corpus/*/*.tar"])
    assert [t.id for t in there] == [t.id for t in list_tasks([f"{corpus}/*/*.tar"])]


def test_a_root_makes_ids_independent_of_the_pattern(corpus, monkeypatch):
    whole = {task.url: task.id for task in list_tasks([f"{corpus}/*/*.tar"])}
    pattern = f"{corpus}/train/*.tar"
    assert [t.id for t in list_tasks([pattern])] != [whole[t.url] for t in list_tasks([pattern])]
    monkeypatch.chdir(corpus.parent)
    for root in (f"{corpus}", f"{corpus}/", f"file://{corpus}", "corpus"):
        tasks = list_tasks([pattern], root=root)
        assert [task.id for task in tasks] == [whole[task.url] for task in tasks]


@pytest.mark.parametrize("root", ["val", "trai", "elsewhere"])
def test_a_root_that_is_not_above_is_an_error(corpus, root):
    with pytest.raises(CorpusError, match=rf"every tar below the root .*{root}, got .*a\.tar"):
        list_tasks([f"{corpus}/train/*.tar"], root=f"{corpus}/{root}")


def test_a_tar_that_changed_keeps_its_id_and_not_its_marks(corpus):
    before = list_tasks([f"{corpus}/train/a.tar"])[0]
    (corpus / "train" / "a.tar").write_bytes(b"longer")
    after = list_tasks([f"{corpus}/train/a.tar"])[0]
    assert before.id == after.id
    assert before.marks != after.marks


def test_ids_are_plain_whatever_the_name(tmp_path):
    name = "ä b:c.d" + "x" * 200 + ".tar"
    (tmp_path / name).write_bytes(b"x")
    task = list_tasks([str(tmp_path / name)])[0]
    assert re.fullmatch(r"[A-Za-z0-9_-]{80}-[0-9a-f]{12}", task.id)


def test_two_tars_of_one_id_are_an_error(corpus, memory):
    """Of two file systems there is no folder above both."""
    memory.pipe_file(f"{corpus}/train/a.tar", b"1")
    patterns = [f"{corpus}/train/a.tar", f"memory://{corpus}/train/a.tar"]
    with pytest.raises(CorpusError, match=r"share the id a-[0-9a-f]{12} .*give --root"):
        list_tasks(patterns)


@pytest.mark.parametrize(
    ("num_bytes", "split_bytes", "num_parts"),
    [
        (10, 10, 1),
        (11, 10, 2),
        (20, 10, 2),
        (21, 10, 3),
        (0, 10, 1),
        (1, 1, 1),
        (10**13, 10**9, 10**4),
    ],
)
def test_a_long_tar_is_as_many_parts_as_it_has_lengths(num_bytes, split_bytes, num_parts):
    tar = Task("a-01234567", "file:///a.tar", num_bytes)
    parts = split_tasks([tar], split_bytes)
    assert [task.part for task in parts] == list(range(num_parts))
    assert {(t.url, t.num_bytes, t.num_parts, t.tar_id) for t in parts} == {
        (tar.url, tar.num_bytes, num_parts, tar.id)
    }
    if num_parts == 1:
        assert parts == [tar]
    else:
        assert parts[1].id == f"a-01234567-p0001of{num_parts:04d}"
        assert [task.id for task in parts] == sorted({task.id for task in parts})


def test_parts_stand_in_their_tars_place():
    tars = [
        Task(f"{x}-01234567", f"file:///{x}.tar", size)
        for x, size in zip("abc", (5, 25, 5), strict=True)
    ]
    ends = ["", "-p0000of0003", "-p0001of0003", "-p0002of0003", ""]
    expected = [f"{x}-01234567{end}" for x, end in zip("abbbc", ends, strict=True)]
    assert [task.id for task in split_tasks(tars, 10)] == expected
    assert split_tasks(tars, None) == tars


def test_a_local_source_is_described(corpus_folder):
    task = list_tasks([f"{corpus_folder}/scenes-val-*.tar"])[0]
    data = (corpus_folder / "scenes-val-00000.tar").read_bytes()
    with open_source(task) as (file, source):
        assert file.read() == data
    assert source.url == task.url == f"file://{corpus_folder}/scenes-val-00000.tar"
    assert source.num_bytes == len(data)
    assert source.sha256 == hashlib.sha256(data).hexdigest()
    assert source.head_sha256 == hashlib.sha256(data[:HEAD_BYTES]).hexdigest() == digest_head(task)


def test_a_remote_source_is_read_through_a_copy(corpus_folder, memory):
    data = (corpus_folder / "scenes-val-00000.tar").read_bytes()
    memory.pipe_file("/corpus/val.tar", data)
    task = list_tasks(["memory://corpus/val.tar"])[0]
    with open_source(task) as (file, source):
        members = list_members(file, num_bytes=task.num_bytes)
        assert os.fstat(file.fileno()).st_nlink == 0  # a process that is killed leaves no copy
    assert file.closed
    assert members == list_members(io.BytesIO(data), num_bytes=len(data))
    assert source.sha256 == hashlib.sha256(data).hexdigest()
    assert source.head_sha256 == digest_head(task)


@pytest.mark.parametrize("url", ["file://{}/scenes-val-00000.tar", "memory://corpus/val.tar"])
def test_bytes_are_told_while_a_source_is_opened(corpus_folder, memory, url):
    data = (corpus_folder / "scenes-val-00000.tar").read_bytes()
    memory.pipe_file("/corpus/val.tar", data)
    told = []
    with open_source(list_tasks([url.format(corpus_folder)])[0], on_bytes=told.append):
        assert sum(told) == len(data)
        assert told[-1] == 0 or url.startswith("file")  # a copy that is hashed shows life


def test_one_thread_may_open_a_source_and_another_close_it(corpus_folder, memory):
    data = (corpus_folder / "scenes-val-00000.tar").read_bytes()
    memory.pipe_file("/corpus/val.tar", data)
    task = list_tasks(["memory://corpus/val.tar"])[0]
    with ThreadPoolExecutor(1) as fetch, ThreadPoolExecutor(1) as close:
        stack = ExitStack()
        file, _ = fetch.submit(stack.enter_context, open_source(task)).result()
        assert file.read() == data
        close.submit(stack.close).result()
    assert file.closed


def test_a_remote_source_is_fetched_again_after_a_fault(corpus_folder, memory, monkeypatch):
    data = (corpus_folder / "scenes-val-00000.tar").read_bytes()
    memory.pipe_file("/corpus/val.tar", data)
    task = list_tasks(["memory://corpus/val.tar"])[0]
    copy, faults = type(memory).get_file, [ConnectionResetError("reset"), TimeoutError("slow")]

    def get_file(self, *args, **options):
        if faults:
            raise faults.pop()
        return copy(self, *args, **options)

    monkeypatch.setattr(type(memory), "get_file", get_file)
    with open_source(task) as (file, _):
        assert file.read() == data
    assert faults == []


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_tar_of_another_size_than_listed_is_an_error(corpus, memory, size):
    local = list_tasks([f"{corpus}/train/b.tar"])[0]
    memory.pipe_file("/b.tar", b"12")
    remote = list_tasks(["memory://b.tar"])[0]
    (corpus / "train" / "b.tar").write_bytes(b"x" * size)
    memory.pipe_file("/b.tar", b"x" * size)
    for task in (local, remote):
        with pytest.raises(SourceChangedError, match=f"expected 2 bytes as listed, got {size}"):
            with open_source(task):
                pytest.fail("opened")


def test_a_tar_written_to_while_it_is_read_is_an_error(corpus):
    path = corpus / "train" / "b.tar"

    def read_meanwhile(task):
        with open_source(task):
            path.write_bytes(b"xy")  # of the same size
            os.utime(path, ns=(0, 0))

    task = list_tasks([str(path)])[0]
    with pytest.raises(SourceChangedError, match=r"b\.tar: was written to while it was read"):
        read_meanwhile(task)


def test_a_tar_that_is_gone_is_an_error(corpus):
    task = Task("a-00000000", f"file://{corpus}/none.tar", 1)
    with pytest.raises(FileNotFoundError), open_source(task):
        pytest.fail("opened")


def test_errors_of_remote_libraries_name_the_tar_and_not_the_request(monkeypatch):
    exceptions = pytest.importorskip("botocore.exceptions")
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.tar", b"x")

    def refuse(*args, **kwargs):
        raise exceptions.HTTPClientError(error="https://host/?X-Amz-Signature=SECRET")

    for method in ("get_file", "cat_file", "info"):
        monkeypatch.setattr(type(memory), method, refuse)
    task = Task("a-00000000", "memory://corpus/a.tar", 1)
    calls = (
        lambda: open_source(task).__enter__(),
        lambda: digest_head(task),
        lambda: list_tasks(["memory://corpus/a.tar"]),
    )
    for call in calls:
        with pytest.raises(OSError, match=r"a\.tar: could not be read: HTTPClientError") as error:
            call()
        assert "SECRET" not in str(error.value)


def test_a_folder_is_no_corpus_and_the_error_says_what_is(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x")
    with pytest.raises(
        CorpusError, match=rf"{tmp_path}: .*, got a folder; name .*{tmp_path}/\*\.tar'"
    ):
        list_tasks([str(tmp_path)])


def test_a_server_that_refuses_is_named():
    """FTP connects as soon as it is opened; port 9 has no server."""
    with pytest.raises(OSError, match=r"corpus: ftp://127\.0\.0\.1:9/x\.tar cannot be opened: "):
        list_tasks(["ftp://127.0.0.1:9/x.tar"])
