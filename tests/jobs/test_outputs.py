"""Where a command may write: what outlives a Ray job, and what is not in the way."""

from pathlib import Path

import pytest

from jobs.convert import convert
from jobs.demo import demo
from jobs.outputs import check_folder, check_outlives_job, check_writable
from jobs.pretrain import pretrain
from jobs.segment import segment
from jobs.sweep import sweep
from jobs.train import train
from pipeline.base.job_copy import JOB_COPIES, JOB_VARIABLE
from pipeline.runs.lock import RunHeldError, RunLock


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


NOWHERE = Path("nowhere.yaml")
CALLS = {  # each with an --out; what else is given is not there, and must not be asked for before
    "train": lambda out, store: train(store, NOWHERE, out),
    "sweep": lambda out, store: sweep(store, NOWHERE, out),
    "pretrain": lambda out, store: pretrain(out, NOWHERE),
    "demo": lambda out, store: demo(out),
    "convert": lambda out, store: convert(NOWHERE, out),
}
EVERY = pytest.mark.parametrize("verb", CALLS)


def list_tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@EVERY
@pytest.mark.parametrize("where", ["file", "file/below", "s3://bucket/run"])
def test_a_folder_that_cannot_be_is_refused_before_the_work(verb, where, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"^--out: expected a (folder that can|path of a file sys)"
    ):
        CALLS[verb](Path(where), "store")
    assert list_tree(tmp_path) == ["file"]


@EVERY
def test_the_current_folder_with_other_files_is_refused(verb, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "thesis.tex").write_text("mine")
    monkeypatch.chdir(tmp_path / "below")
    for place in (".", "..", str(tmp_path)):
        with pytest.raises(ValueError, match=r"--out: expected a folder for the results alone"):
            CALLS[verb](Path(place), "s3://bucket/store")
    assert list_tree(tmp_path) == ["below", "below/thesis.tex"]


@pytest.mark.parametrize("verb", ["train", "sweep"])
@pytest.mark.parametrize("out", ["a/store", "a/store/runs/x", "a", "linked"])
def test_results_and_store_are_apart(verb, out, tmp_path, monkeypatch):
    (tmp_path / "a" / "store").mkdir(parents=True)
    (tmp_path / "linked").symlink_to(tmp_path / "a" / "store")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--out: expected a folder apart from the store"):
        CALLS[verb](Path(out), "a/store")
    for name in ("store", "st%6Fre"):
        with pytest.raises(ValueError, match="--out: expected a folder apart from the store"):
            CALLS[verb](Path(out), f"file://{tmp_path}/a/{name}")
    assert list_tree(tmp_path / "a") == ["store"]


@pytest.mark.parametrize(
    ("verb", "there"),
    [
        ("train", "sweep.json"),
        ("sweep", "checkpoints"),
        ("train", "step-000012"),
        ("sweep", "step-000012"),
    ],
)
def test_runs_of_two_kinds_share_no_folder(verb, there, tmp_path):
    for name in (there, "lock"):
        (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"--out: .*/run, which has {there} of another run"):
        CALLS[verb](tmp_path / "run", "store")
    assert list_tree(tmp_path / "run") == sorted([there, "lock"])


@EVERY
def test_a_link_to_nowhere_is_no_folder(verb, tmp_path):
    (tmp_path / "out").symlink_to("gone")
    with pytest.raises(ValueError, match=r"^--out: .*/out is a link to gone, which is not there"):
        CALLS[verb](tmp_path / "out", "store")


def test_a_runs_own_folder_and_a_new_one_will_do(tmp_path, monkeypatch):
    (tmp_path / "run" / "lock").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    check_folder("--out", Path(), store="s3://bucket/store", own={"lock"})
    check_folder("--out", tmp_path / "run", store=str(tmp_path / "run" / "store"), own={"lock"})
    check_folder("--out", tmp_path / "a" / "b", store=str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path / "empty")
    check_folder("--out", Path())
    assert list_tree(tmp_path) == ["empty", "run", "run/lock"]


def test_a_folder_that_holds_something_is_no_place_to_convert_to(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ValueError, match="expected no file or folder, or an empty one"):
        CALLS["convert"](tmp_path / "out", "store")


@pytest.mark.parametrize(
    ("out", "overlay", "message"),
    [
        ("my.png", None, r"^--out: .*my.png is the same file as .*my.png, which would be lost"),
        ("link.png", None, r"^--out: .*link.png is the same file as .*my.png, which would be lost"),
        ("my.jpg", None, r"^--out: .*my.jpg is the same file as .*my.png, which would be lost"),
        (
            "m.png",
            "my.png",
            "^--overlay: .*my.png is the same file as .*my.png, which would be lost",
        ),
        (
            "m.png",
            "./m.png",
            "^--overlay: .*m.png is the same file as .*m.png, which would be lost",
        ),
        ("folder", None, "^--out: expected a file that can be written"),
        ("my.png/m.png", None, "^--out: expected a file that can be written"),
        ("m.jpg", None, "^--out: a PNG is written; expected a name in .png, got m.jpg"),
        ("m.png", "o.jpeg", "^--overlay: a PNG is written"),
        ("s3://bucket/m.png", None, "^--out: expected a path of a file system, got the URL"),
    ],
)
def test_segment_never_writes_over_a_picture(out, overlay, message, tmp_path, monkeypatch):
    (tmp_path / "my.png").write_bytes(b"a photograph")
    (tmp_path / "link.png").hardlink_to(tmp_path / "my.png")
    (tmp_path / "my.jpg").symlink_to(tmp_path / "my.png")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    before = list_tree(tmp_path)
    over = None if overlay is None else Path(overlay)
    with pytest.raises(ValueError, match=message):
        segment(tmp_path / "checkpoint", Path("my.png"), "sky", out=Path(out), overlay=over)
    assert list_tree(tmp_path) == before
    assert (tmp_path / "my.png").read_bytes() == b"a photograph"


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_is_under_way_is_named_and_not_called_an_earlier_one(tmp_path, resume):
    with RunLock(tmp_path / "out", "run"):
        (tmp_path / "out" / "checkpoints" / "step-000001").mkdir(parents=True)
        with pytest.raises(RunHeldError, match="another run writes here: process"):
            train("store", NOWHERE, tmp_path / "out", resume=resume)
