"""Remote patterns: fsspec's globs, sizes that a listing does not tell, and what is denied."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
import s3fs
from fsspec.implementations.local import LocalFileSystem

import pipeline.base.remote_copy
from pipeline.corpus.http_files import resolve_dots
from pipeline.corpus.tasks import CorpusError, list_tasks
from pipeline.storage.s3 import ObjectStorage
from tests.support.fake_time import make_patience
from tests.support.s3_server import put


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(pipeline.base.remote_copy, "PATIENCE", make_patience(60))


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


class Server(ThreadingHTTPServer):
    """Serves ``files`` (path -> bytes, or a status) with pages that list folders.

    ``tells``: what answers tell of a size: to "head", to "range" requests, or to "none".
    """

    redirects = True  # a folder's name to that with a slash

    def __init__(self, files, tells):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.tells, self.asked = files, tells, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.rstrip("/")
        self.server.asked.append((self.command, path))
        held = self.server.files.get(path)
        below = {name.removeprefix(f"{path}/") for name in self.server.files if path + "/" in name}
        if isinstance(held, int):
            self.answer(held, {"Content-Length": "0"}, b"")
        elif held is not None:
            self.answer_file(held)
        elif below and not self.path.endswith("/"):
            status = 301 if self.server.redirects else 404
            self.answer(status, {"Location": f"{self.path}/", "Content-Length": "0"}, b"")
        elif below:
            links = {name.split("/")[0] + "/" * ("/" in name) for name in below}
            page = "".join(
                f'<a href="{link}">x</a>' for link in ["../", "?C=N;O=D", *sorted(links)]
            )
            headers = {"Content-Type": "text/html", "Content-Length": str(len(page))}
            self.answer(200, headers, page.encode())
        else:
            self.answer(404, {"Content-Length": "0"}, b"")

    def answer_file(self, data):
        tells, is_head = self.server.tells, self.command == "HEAD"
        marks = {"ETag": '"abc"', "Last-Modified": "Mon, 30 Nov 2026 10:00:00 GMT"}
        if is_head and tells == "head":
            self.answer(200, marks | {"Content-Length": str(len(data))}, b"")
        elif is_head and tells == "refused head":
            self.answer(403, {"Content-Length": "0"}, b"")
        elif is_head:
            self.answer(200, marks, b"")
        elif "Range" in self.headers and tells in ("range", "refused head"):
            total = {"Content-Range": f"bytes 0-0/{len(data)}", "Content-Length": "1"}
            self.answer(206, marks | total, data[:1])
        else:  # of no stated length
            self.close_connection = True
            self.answer(200, marks | {"Connection": "close"}, data)

    def answer(self, status, headers, data):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serve(files, tells="head"):
    server = Server(files, tells)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


FILES = {f"/data/{name}.tar": b"x" * size for size, name in enumerate(("a", "b", "c"), start=1)}


@pytest.mark.parametrize("tells", ["head", "range", "refused head"])
@pytest.mark.parametrize("pattern", ["*.tar", "[ab]*.tar", "{a,b}.tar", "a.tar"])
def test_a_tar_whose_size_no_listing_tells_is_asked_for_it(tells, pattern):
    with serve(FILES | {"/data/README": b"text"}, tells) as server:
        tasks = list_tasks([f"{server.url}/data/{pattern}"])
    wanted = {"*.tar": 3, "a.tar": 1}.get(pattern, 2)
    assert [task.below for task in tasks] == ["a.tar", "b.tar", "c.tar"][:wanted]
    assert [task.num_bytes for task in tasks] == [1, 2, 3][:wanted]
    assert not any(task.fault for task in tasks)
    assert tasks[0].marks.etag == "abc"
    assert tasks[0].marks.mtime == "Mon, 30 Nov 2026 10:00:00 GMT"
    assert ("HEAD", "/data/README") not in server.asked
    assert server.asked.count(("HEAD", "/data/a.tar")) == 1


def test_a_server_that_tells_no_size_costs_that_tar_alone(memory):
    memory.pipe_file("/corpus/a.tar", b"x")
    with serve(FILES, "none") as server:
        with pytest.raises(CorpusError, match=r"no tar can be read: .*the server tells none"):
            list_tasks([f"{server.url}/data/*.tar"])
        tasks = list_tasks(["memory://corpus/a.tar", f"{server.url}/data/a.tar"])
    assert [bool(task.fault) for task in tasks] == [True, False]
    assert f"{server.url}/data/a.tar: expected a size in bytes" in tasks[0].fault


def test_an_empty_tar_is_not_one_without_a_size():
    with serve({"/data/a.tar": b"", "/data/b.tar": b"x"}) as server:
        tasks = list_tasks([f"{server.url}/data/*.tar"])
    assert [(task.num_bytes, bool(task.fault)) for task in tasks] == [(0, True), (1, False)]


def test_pages_that_list_folders_are_globbed_as_fsspec_does():
    files = {"/d/x/a.tar": b"1", "/d/y/b.tar": b"2", "/d/y/z/c.tar": b"3", "/d/d.tar": b"4"}
    with serve(files) as server:
        filesystem = fsspec.filesystem("http")
        for pattern in ("d/*.tar", "d/*/*.tar", "d/**/*.tar", "d/**", "*/[xy]/*", "d/y/**/*.tar"):
            filesystem.invalidate_cache()
            globbed = set(filesystem.glob(f"{server.url}/{pattern}"))
            wanted = {u for u in globbed if u.endswith(".tar")}
            tasks = list_tasks([f"{server.url}/{pattern}"])
            assert {task.url for task in tasks if not task.fault} == wanted, pattern
        (fault,) = [task.fault for task in list_tasks([f"{server.url}/d/y/*"]) if task.fault]
        assert "expected a tar, got a folder" in fault


def test_folders_are_asked_for_by_their_names_with_a_slash(monkeypatch):
    monkeypatch.setattr(Server, "redirects", False)
    with serve({"/d/x/a.tar": b"1", "/d/y/b.tar": b"2"}) as server:
        assert len(list_tasks([f"{server.url}/d/*/*.tar"])) == 2


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("pattern", ["*.tar", "a.tar", "x/*.tar", "**/*.tar", "[a].tar"])
def test_http_that_denies_a_listing_is_not_found_none(status, pattern):
    files = {"/data": status, "/data/a.tar": status, "/data/x": status}
    with serve(files) as server:
        with pytest.raises(PermissionError, match=r"/data/?.*: access denied"):
            list_tasks([f"{server.url}/data/{pattern}"])


def test_a_folder_that_is_denied_below_others_is_not_skipped():
    files = {"/d/x/a.tar": b"1", "/d/y": 403, "/d/y/b.tar": b"2"}  # linked as y and as y/
    with serve(files) as server:
        for pattern in ("d/*/*.tar", "d/**/*.tar"):
            with pytest.raises(PermissionError, match=r"/d/y: access denied"):
                list_tasks([f"{server.url}/{pattern}"])
        assert len(list_tasks([f"{server.url}/d/x*/*.tar"])) == 1  # and is not asked needlessly


@pytest.mark.parametrize("pattern", ["*.tar", "{a,b}.tar"])
def test_a_tar_that_is_denied_costs_that_tar_alone(pattern):
    with serve({"/d/a.tar": 403, "/d/b.tar": b"22"}) as server:
        tasks = list_tasks([f"{server.url}/d/{pattern}"])
    assert [task.num_bytes for task in tasks] == [0, 2]
    assert "/d/a.tar: access denied" in tasks[0].fault


def test_a_server_that_fails_is_told_as_it_is():
    with serve({"/d": 500, "/d/a.tar": 500}) as server:
        for pattern in ("*.tar", "a.tar"):
            with pytest.raises(OSError, match=r"could not be read: ClientResponseError"):
                list_tasks([f"{server.url}/d/{pattern}"])
    with pytest.raises(OSError, match="could not be read: ClientConnectorError"):
        list_tasks(["http://127.0.0.1:1/d/*.tar"])


@pytest.mark.parametrize("given", ["d", "d/", "d/x", "{d,d/x}"])
def test_an_http_folder_is_no_tar(given):
    with serve({"/d/x/a.tar": b"1"}) as server:
        with pytest.raises(CorpusError, match=r"/d(/x)?/?: expected a tar, got a folder; name"):
            list_tasks([f"{server.url}/{given}"])


def test_two_spellings_of_a_url_are_one_tar():
    with serve(
        {"/d/a.tar": b"1", "/d/b c.tar": b"1", "/d/b%20c.tar": b"1", "//d/a.tar": b"1"}
    ) as s:
        plain = list_tasks([f"{s.url}/d/a.tar"])
        assert list_tasks([f"{s.url}/x/../d/./a.tar"]) == plain
        for other in ("d/../d/a.tar", "/d/a.tar"):
            with pytest.raises(CorpusError, match=r"d/a\.tar and .*d/a\.tar are one file"):
                list_tasks([f"{s.url}/d/a.tar", f"{s.url}/{other}"])


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://h/a/../b", "http://h/b"),
        ("http://h/../b", "http://h/b"),
        ("http://h/a/./b/..", "http://h/a/"),
        ("http://h/..a/b..", "http://h/..a/b.."),
    ],
)
def test_dots_of_a_url(url, wanted):
    assert resolve_dots(url) == wanted


def test_a_link_with_a_query_is_a_fault_that_shows_no_secret(monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", _page_with_a_signed_link)
    with serve({"/d/a.tar": b"1"}) as server:
        tasks = list_tasks([f"{server.url}/d/*.tar"])
    assert [bool(task.fault) for task in tasks] == [False, True]
    assert "SECRET" not in str(tasks)


def _page_with_a_signed_link(self):
    if self.path.rstrip("/") == "/d":
        page = b'<a href="a.tar">x</a><a href="b.tar?signature=SECRET&x=.tar">x</a>'
        self.answer(200, {"Content-Type": "text/html", "Content-Length": str(len(page))}, page)
    else:
        self.answer_file(b"1")


@pytest.mark.parametrize(
    ("folder", "below", "pattern"),
    [
        ("data[v1]", "a.tar", "*.tar"),
        ("data[v1]", "a.tar", "a.tar"),
        ("data[v1]", "x/a.tar", "**/*.tar"),
        ("data", "train[1].tar", "train[1].tar"),
        ("data/[x]/y[2]", "a.tar", "*.tar"),
        ("data/[x]/z/y[2]", "z/a.tar", "*/a.tar"),
    ],
)
def test_what_exists_literally_is_literal(memory, folder, below, pattern):
    memory.pipe_file(f"/c/{folder}/{below}", b"x")
    (task,) = list_tasks([f"memory://c/{folder}/{pattern}"])
    assert task.url == f"memory:///c/{folder}/{below}"
    assert task.below == below


def test_hidden_names_match_as_fsspec_has_it(memory):
    for name in (".a.tar", "b.tar", ".x/c.tar", "y/d.tar"):
        memory.pipe_file(f"/c/{name}", b"x")
    for pattern in ("c/*.tar", "c/**/*.tar", "c/*/*.tar", "c/[!b]*.tar", "c/**"):
        files = {name for name in memory.glob(f"/{pattern}") if memory.isfile(name)}
        tasks = list_tasks([f"memory://{pattern}"])
        assert {task.url.removeprefix("memory://") for task in tasks if not task.fault} == files


class Linked(LocalFileSystem):
    """A server's file system with links, which a listing does not follow, as SFTP's."""

    protocol = "linked"


def test_links_on_a_server_are_followed(tmp_path):
    fsspec.register_implementation("linked", Linked, clobber=True)
    for name in ("data/part-0/a.tar", "far/b.tar"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"12")
    (tmp_path / "data" / "part-0" / "c.tar").symlink_to("../../far/b.tar")
    (tmp_path / "data" / "part-0" / "d.tar").symlink_to("gone")
    (tmp_path / "data" / "part-1").symlink_to("../far")
    for pattern in ("*/*.tar", "**/*.tar"):
        tasks = list_tasks([f"linked://{tmp_path}/data/{pattern}"])
        assert [(task.below, task.num_bytes, bool(task.fault)) for task in tasks] == [
            *(("part-0/a.tar", 2, False), ("part-0/c.tar", 2, False)),
            *(("part-0/d.tar", 0, True), ("part-1/b.tar", 2, False)),
        ]
        assert "a link that leads nowhere" in tasks[2].fault


def test_a_pattern_that_is_none_is_an_error(memory):
    memory.pipe_file("/c/a.tar", b"x")
    with pytest.raises(CorpusError, match=r"memory:///c/a\*\*: Invalid pattern"):
        list_tasks(["memory://c/a**"])


def test_a_remote_folder_is_no_corpus(memory):
    memory.pipe_file("/c/a.tar/x", b"x")
    memory.pipe_file("/c/b.tar", b"x")
    with pytest.raises(CorpusError, match=r"corpus: memory:///c: expected a tar, got a folder"):
        list_tasks(["memory://c"])
    folder, tar = list_tasks(["memory://c/*.tar"])
    assert "memory:///c/a.tar: expected a tar, got a folder" in folder.fault
    assert not tar.fault


def test_many_tars_of_a_folder_are_not_asked_one_by_one(memory, monkeypatch):
    for number in range(1500):
        memory.pipe_file(f"/c/{number:04d}.tar", b"x")
    pattern = "memory://c/{0000..1499}.tar"
    wanted = list_tasks(["memory://c/*.tar"])
    monkeypatch.setattr(type(memory), "info", lambda *_, **__: pytest.fail("asked for one"))
    assert list_tasks([pattern]) == wanted
    with pytest.raises(CorpusError, match=r"memory:///c/1500\.tar, found none"):
        list_tasks(["memory://c/{0000..1500}.tar"])


def test_who_may_read_and_not_list_names_many_tars(memory, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError("no list")

    for number in range(1500):
        memory.pipe_file(f"/c/{number:04d}.tar", b"x")
    monkeypatch.setattr(type(memory), "ls", refuse)
    tasks = list_tasks(["memory://c/{0000..1499}.tar"])
    assert len(tasks) == 1500
    assert not any(task.fault for task in tasks)


@pytest.fixture
def s3_corpus(s3_url, proxy):
    """A corpus on the S3 server, behind a fault proxy; s3fs made to see the environment of now."""
    s3fs.S3FileSystem.clear_instance_cache()
    url = s3_url.replace("store ", "listed-")
    storage = ObjectStorage(url)
    for name in ("a.tar", "x/b.tar", "x/y/c.tar"):
        put(storage, name, b"data")
    yield url
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3_lists_marks_and_asks_no_tar(s3_corpus, proxy):
    proxy.add("denied", "HEAD")
    for pattern, num in (("*.tar", 1), ("*/*.tar", 1), ("**/*.tar", 3), ("x/**/*.tar", 2)):
        tasks = list_tasks([f"{s3_corpus}/{pattern}"])
        assert len(tasks) == num
        assert {task.num_bytes for task in tasks} == {4}
        assert {len(task.marks.etag) for task in tasks} == {32}
    listed = {task.url: task.marks for task in tasks}
    proxy.rules.clear()
    (task,) = list_tasks([f"{s3_corpus}/x/b.tar"])
    assert task.marks == listed[task.url]


@pytest.mark.parametrize("pattern", ["*.tar", "a.tar", "*/*.tar", "**/*.tar", "{a,b}.tar"])
def test_s3_that_denies_a_listing_is_not_found_none(s3_corpus, proxy, pattern):
    proxy.add("denied", "GET|HEAD", "listed-")
    with pytest.raises(PermissionError, match=r"listed-.*: access denied"):
        list_tasks([f"{s3_corpus}/{pattern}"])


@pytest.mark.parametrize("pattern", ["*.tar", "**/*.tar", "a.tar", "x/*.tar"])
def test_a_bucket_that_is_not_there_has_no_tar_and_is_named(s3_corpus, pattern):
    with pytest.raises(CorpusError, match=r"at s3://none-such/.*, found none") as error:
        list_tasks([f"s3://none-such/{pattern}"])
    if "*" in pattern:
        assert "bucket does not exist" in str(error.value)
    with pytest.raises(CorpusError, match="the name of a bucket cannot be a pattern"):
        list_tasks([f"s3://none-*/{pattern}"])


def test_an_s3_folder_that_is_denied_below_others_is_not_skipped(s3_corpus, proxy):
    proxy.add("denied", "GET", "prefix=listed-[0-9]*%2Fx%2F")
    with pytest.raises(PermissionError, match=r"/x: access denied"):
        list_tasks([f"{s3_corpus}/*/*.tar"])


class _Status(Exception):
    """As aiohttp's, azure's and gcsfs' errors tell a status."""

    __module__ = "gcsfs.retry"

    def __init__(self, code):
        super().__init__("no")
        self.code = code


@pytest.mark.parametrize("error", [_Status(401), _Status(403), OSError("Forbidden: b/x\nno")])
@pytest.mark.parametrize("pattern", ["*.tar", "**/*.tar", "a.tar"])
def test_what_other_libraries_raise_where_access_is_denied(memory, monkeypatch, error, pattern):
    def refuse(*args, **options):
        raise error

    for method in ("ls", "info"):
        monkeypatch.setattr(type(memory), method, refuse)
    with pytest.raises(PermissionError, match=r"memory:///c.*: access denied"):
        list_tasks([f"memory://c/{pattern}"])
