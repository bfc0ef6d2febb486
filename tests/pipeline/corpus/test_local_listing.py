"""Local patterns: what Python's glob matches, and what it loses silently."""

import glob
import logging
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.corpus.tasks import CorpusError, list_tasks

NOBODY = 65534


def put(folder, *names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (number + 1))


def split(tasks, folder):
    """Names of readable tars, and name -> fault of the others, below a folder."""
    names = {task.url.removeprefix(f"file://{folder}/"): task.fault for task in tasks}
    return [name for name in names if not names[name]], {n: f for n, f in names.items() if f}


@contextmanager
def as_somebody_else():
    """Without root's right to read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that another user may reach, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="ldznet-test-") as name:
        Path(name).chmod(0o777)
        yield Path(os.path.realpath(name))
        for folder in Path(name).iterdir():
            if folder.is_dir():
                folder.chmod(0o777)


@pytest.fixture
def hub(tmp_path):
    """A hub's cache: every file of a snapshot is a link to a blob."""
    put(tmp_path, "blobs/0000", "blobs/1111")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, blob in enumerate(("0000", "1111")):
        (snapshot / f"train-{number}.tar").symlink_to(f"../../blobs/{blob}")
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    ["snapshots/abc/*.tar", "snapshots/*/train-{0..1}.tar", "**/*.tar", "snapshots/**/*.tar"],
)
def test_linked_tars_are_read_under_their_own_names(hub, pattern):
    tasks = list_tasks([f"{hub}/{pattern}"], root=str(hub))
    assert split(tasks, hub) == (["snapshots/abc/train-0.tar", "snapshots/abc/train-1.tar"], {})
    assert [task.num_bytes for task in tasks] == [1, 2]
    blobs = sorted(hub.glob("blobs/*"))
    assert [task.marks.mtime for task in tasks] == [str(b.stat().st_mtime_ns) for b in blobs]


@pytest.mark.parametrize("pattern", ["data/*/*.tar", "data/**/*.tar", "**/data/part-?/a.tar"])
def test_linked_folders_are_entered(tmp_path, pattern):
    put(tmp_path, "data/part-0/a.tar", "data/part-1/a.tar", "elsewhere/part-2/a.tar")
    (tmp_path / "data" / "part-2").symlink_to("../elsewhere/part-2")
    tasks = list_tasks([f"{tmp_path}/{pattern}"], root=str(tmp_path))
    assert split(tasks, tmp_path) == ([f"data/part-{i}/a.tar" for i in range(3)], {})


@pytest.mark.parametrize(
    "pattern",
    [
        *("*.tar", "**/*.tar", "**", "x/**", "*/*.tar", "[!a]*.tar", "[]a].tar", "[a-b].tar", "*"),
        *(".*.tar", ".h/*.tar", "?.tar", "x*/*", "**/y/*", "**/**/c.tar", "[*].tar", "*/é.tar"),
        *("x/**/*.tar", "x/[.]h/*", "./*.tar", "x//*.tar", "x1/../a.tar", "*/../b.tar", "x/**.tar"),
        *("**/x/*.tar", "x/../x/../*.tar", "linked/*", "**/linked/*.tar", "*/", "none/*"),
    ],
)
def test_local_patterns_mean_what_pythons_glob_means(tmp_path, pattern):
    put(
        tmp_path,
        *("a.tar", "b.tar", ".hidden.tar", "x/a.tar", "x/y/c.tar", ".h/a.tar", "x/.h/a.tar"),
        *("x/y/A.TAR", "-.tar", "].tar", "a b.tar", "x1/é.tar", "*.tar"),
    )
    (tmp_path / "linked").symlink_to("x1")
    matches = glob.glob(f"{tmp_path}/{pattern}", recursive=True)
    files = {os.path.normpath(name) for name in matches if os.path.isfile(name)}
    folders = {os.path.normpath(name) for name in matches if not os.path.isfile(name)}
    num_files = len({os.path.realpath(name) for name in matches if os.path.isfile(name)})
    if num_files < len({name for name in matches if os.path.isfile(name)}):
        wanted = "are one file"
    elif not matches:
        wanted = "found none"
    elif not files:
        wanted = "no tar can be read: .*got a folder"
    else:
        tasks = list_tasks([f"{tmp_path}/{pattern}"])
        assert {t.url.removeprefix("file://") for t in tasks if not t.fault} == files
        found = {t.url.removeprefix("file://") for t in tasks if t.fault}
        assert found == (set() if pattern.endswith("**") else folders)
        return
    with pytest.raises(CorpusError, match=wanted):
        list_tasks([f"{tmp_path}/{pattern}"])


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("data[v1]/a.tar", "data[v1]/*.tar"),
        ("data[v1]/a.tar", "data[v1]/a.tar"),
        ("data[v1]/x/a.tar", "data[v1]/**/*.tar"),
        ("sets/data[v1]/a.tar", "*/data[v1]/a.tar"),
        ("sets/data[v1]/a.tar", "*/data[v1]/*.tar"),
        ("data/train[1].tar", "data/train[1].tar"),
        ("data/[x]/y[2]/a.tar", "data/[x]/y[2]/*.tar"),
        ("data{a,b}/a.tar", "data{a,b}/*.tar"),
        ("data{a,b}/a.tar", "data{a,b}/{a,b}.ta[r]"),
        ("data{1..3}.tar", "data{1..3}.tar"),
        ("{a/a.tar", "{a/*.tar"),
        ("{a}[b]{c,d}/a.tar", "{a}[b]{c,d}/a.tar"),
        ("a\\b{c,d}/a.tar", "a\\b{c,d}/*.tar"),
    ],
)
@pytest.mark.parametrize("how", ["absolute", "relative", "url"])
def test_what_exists_literally_is_literal(tmp_path, monkeypatch, name, pattern, how):
    put(tmp_path, name)
    if "{a,b}.ta" in pattern:
        put(tmp_path, "data{a,b}/b.tar")
    monkeypatch.chdir(tmp_path)
    start = {"absolute": f"{tmp_path}/", "relative": "", "url": f"file://{tmp_path}/"}[how]
    tasks = list_tasks([start + pattern])
    assert split(tasks, tmp_path)[0][0] == name
    if "*/" not in pattern:
        assert tasks[0].below == os.path.relpath(name, os.path.dirname(pattern))


def test_a_literal_name_that_is_also_a_pattern_says_what_it_leaves_out(tmp_path, caplog):
    put(tmp_path, "data[v1]/a.tar", "datav/b.tar", "x{1,2}/a.tar", "x1/a.tar", "x2/a.tar")
    assert split(list_tasks([f"{tmp_path}/data[v1]/*.tar"]), tmp_path)[0] == ["data[v1]/a.tar"]
    assert "it would match 1 others, which are left out, such as" in caplog.text
    caplog.clear()
    assert split(list_tasks([f"{tmp_path}/x{{1,2}}/*.tar"]), tmp_path)[0] == ["x{1,2}/a.tar"]
    assert "it would match 2 others" in caplog.text


def test_a_star_in_a_name_does_not_hide_the_others(tmp_path):
    put(tmp_path, "*.tar", "a.tar", "a?.tar", "ab.tar")
    assert len(list_tasks([f"{tmp_path}/*.tar"])) == 4
    assert split(list_tasks([f"{tmp_path}/a?.tar"]), tmp_path)[0] == ["a?.tar", "ab.tar"]


def test_what_stands_in_a_tars_place_is_a_fault(tmp_path):
    put(tmp_path, "a.tar", "dir/README")
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "gone.tar").symlink_to("nowhere/else")
    (tmp_path / "loop.tar").symlink_to("pool.tar")
    (tmp_path / "pool.tar").symlink_to("loop.tar")
    (tmp_path / "through.tar").symlink_to("dir/README/x")
    (tmp_path / "null.tar").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "colons::x.tar").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tar")).write_bytes(b"x")
    names, faults = split(list_tasks([f"{tmp_path}/*.tar"]), tmp_path)
    assert names == ["a.tar"]
    for name, says in {
        "folder.tar": "expected a tar, got a folder",
        "gone.tar": "got a link to nowhere/else, where nothing is; restore that",
        "loop.tar": "got links that lead in a circle",
        "pool.tar": "got links that lead in a circle",
        "through.tar": "Not a directory",
        "null.tar": "or a device; remove it",
        "pipe.tar": "got a named pipe",
        "colons::x.tar": "its name holds '::'",
        "caf\\xe9.tar": "its name holds bytes that are not UTF-8; rename it",
    }.items():
        fault = faults.pop(name)
        assert says in fault
        assert name in fault
    assert faults == {}


@pytest.mark.parametrize("pattern", ["data/*/a.tar", "data/*/*.tar", "data/**/*.tar", "data/**"])
@pytest.mark.parametrize("target", ["../unmounted", "part.v2"])
def test_a_linked_folder_that_leads_nowhere_is_a_fault(tmp_path, pattern, target):
    put(tmp_path, "data/part-0/a.tar", "data/part-1/a.tar")
    (tmp_path / "data" / "part.v2").symlink_to(target)
    (tmp_path / "data" / "notes.txt").symlink_to(target)  # by its looks a file
    names, faults = split(list_tasks([f"{tmp_path}/{pattern}"]), tmp_path)
    assert names == ["data/part-0/a.tar", "data/part-1/a.tar"]
    if pattern.endswith("**"):  # which matches files of any name
        assert "data/notes.txt" in faults
        faults.pop("data/notes.txt")
    assert list(faults) == ["data/part.v2"]
    assert ("in a circle" if target == "part.v2" else "where nothing is") in faults["data/part.v2"]


@pytest.mark.parametrize("pattern", ["data/**/*.tar", "**/*.tar", "data/**"])
def test_a_folder_that_links_to_one_above_it_is_entered_once(tmp_path, pattern):
    put(tmp_path, "data/a.tar", "data/x/b.tar", "data/x/y/c.tar")
    (tmp_path / "data" / "x" / "up").symlink_to("..")
    (tmp_path / "data" / "self").symlink_to(".")
    assert split(list_tasks([f"{tmp_path}/{pattern}"]), tmp_path) == (
        ["data/a.tar", "data/x/b.tar", "data/x/y/c.tar"],
        {},
    )


@pytest.mark.parametrize("pattern", ["*/*.tar", "*/a.tar", "**/*.tar", "**"])
def test_a_folder_without_permission_is_a_fault(open_folder, pattern):
    put(open_folder, "fine/a.tar", "locked/a.tar", "lost+found/a.tar")
    (open_folder / "link").symlink_to("locked/deeper")
    for name in ("locked", "lost+found"):
        (open_folder / name).chmod(0)
    with as_somebody_else():
        tasks = list_tasks([f"{open_folder}/{pattern}"])
    names, faults = split(tasks, open_folder)
    assert names == ["fine/a.tar"]
    assert [name for name in faults if not name.startswith("link")] == ["locked"]
    assert all("permission denied" in fault for fault in faults.values())


@pytest.mark.parametrize("pattern", ["locked/*.tar", "locked/a.tar", "*/*.tar"])
def test_no_permission_at_all_is_not_found_none(open_folder, pattern):
    put(open_folder, "locked/a.tar")
    (open_folder / "locked").chmod(0)
    with as_somebody_else():
        with pytest.raises(CorpusError, match=r"no tar can be read: .*permission denied"):
            list_tasks([f"{open_folder}/{pattern}"])


def test_nothing_that_can_be_read_is_an_error_that_says_why(tmp_path):
    (tmp_path / "a.tar").symlink_to("gone")
    (tmp_path / "b.tar").mkdir()
    for pattern in ("a.tar", "*.tar"):
        with pytest.raises(CorpusError, match=r"no tar can be read: .*a\.tar: .*a link to gone"):
            list_tasks([f"{tmp_path}/{pattern}"])


@pytest.mark.parametrize(
    "spellings",
    [
        ("a/x.tar", "a/../a/x.tar"),
        ("a/x.tar", "a//x.tar"),
        ("a/x.tar", "a/./x.tar"),
        ("a/x.tar", "linked.tar"),
        ("a/x.tar", "hard.tar"),
        ("a/x.tar", "b/x.tar"),
        ("b/*.tar", "a/*.tar"),
        ("a//*.tar", "a/*.tar"),
        ("linked.tar", "hard.tar"),
        ("**/*.tar",),
        ("{a,b}/x.tar",),
    ],
)
def test_two_names_of_one_file_are_an_error_that_has_both(tmp_path, monkeypatch, spellings):
    put(tmp_path, "a/x.tar", "other.tar")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "linked.tar").symlink_to("a/x.tar")
    os.link(tmp_path / "a" / "x.tar", tmp_path / "hard.tar")
    monkeypatch.chdir(tmp_path)
    for patterns in (list(spellings), [f"{tmp_path}/{spelling}" for spelling in spellings]):
        with pytest.raises(CorpusError, match="are one file") as error:
            list_tasks(["other.tar", *patterns])
        for spelling in spellings if "*" not in "".join(spellings) else ():
            if "{" not in spelling:
                assert f"{tmp_path}/{spelling}" in str(error.value)


def test_equal_bytes_are_not_one_file(tmp_path):
    put(tmp_path, "a/x.tar", "b/y.tar")
    (tmp_path / "b" / "y.tar").write_bytes((tmp_path / "a" / "x.tar").read_bytes())
    os.utime(tmp_path / "a" / "x.tar", ns=(1, 1))
    os.utime(tmp_path / "b" / "y.tar", ns=(1, 1))
    assert len(list_tasks([f"{tmp_path}/*/*.tar"])) == 2


@pytest.mark.parametrize(
    "spelling",
    ["a/../a/{}", "a//{}", "./a/{}", "a/./{}", "../{here}/a/{}", "//{whole}/a/{}", "c/../a/{}"],
)
@pytest.mark.parametrize("name", ["x.tar", "*.tar"])
def test_one_path_has_one_id_whatever_its_spelling(tmp_path, monkeypatch, spelling, name):
    put(tmp_path, "a/x.tar", "c/d/y.tar")
    monkeypatch.chdir(tmp_path)
    spelling = spelling.format(name, here=tmp_path.name, whole=str(tmp_path)[1:])
    assert list_tasks([spelling]) == list_tasks([f"a/{name}"])
    assert list_tasks([spelling], root="a/../c/..") == list_tasks([f"a/{name}"], root=".")


def test_two_dots_behind_a_link_lead_above_its_target(tmp_path):
    put(tmp_path, "far/away/y.tar", "far/x.tar")
    (tmp_path / "link").symlink_to("far/away")
    (task,) = list_tasks([f"{tmp_path}/link/../x.tar"])
    assert task.url == f"file://{tmp_path}/far/x.tar"


def test_a_link_above_the_corpus_does_not_change_its_urls(tmp_path):
    put(tmp_path, "disk/data/x.tar")
    (tmp_path / "home").symlink_to("disk")
    (task,) = list_tasks([f"{tmp_path}/home/data/../data/x.tar"])
    assert task.url == f"file://{tmp_path}/home/data/x.tar"


@pytest.mark.parametrize("pattern", ["*/*.tar", "**/*.tar", "{0..6}/*.tar", "0/{0..98..7}.tar"])
def test_a_listing_asks_each_tar_once(tmp_path, monkeypatch, pattern):
    put(tmp_path, *(f"{i % 7}/{i}.tar" for i in range(100)))
    stat, asked = os.stat, []
    monkeypatch.setattr(
        os, "stat", lambda path, **options: asked.append(path) or stat(path, **options)
    )
    monkeypatch.setattr(os.path, "realpath", lambda path: pytest.fail("resolved"))
    num_tars = len(list_tasks([f"{tmp_path}/{pattern}"]))
    assert num_tars in (15, 100)
    assert len([path for path in asked if str(path).endswith(".tar")]) == num_tars


def test_the_ways_of_a_listing_are_no_warnings(hub, caplog):
    caplog.set_level(logging.WARNING)
    list_tasks([f"{hub}/**/*.tar"])
    assert not caplog.text
