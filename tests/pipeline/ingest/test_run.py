"""Tars of ``ingest``: the same at every run, finished or made anew, none half."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from pipeline.ingest.folder import FolderRecipe, list_folder
from pipeline.ingest.run import run_ingest
from tests.pipeline.ingest.test_folder import save_image


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Nine images, of which the fourth is broken and the last is none."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(9):
        save_image(folder / f"image_{number}.jpg", size=(60, 40 + number))
    (folder / "image_3.jpg").write_bytes(b"GIF89a")
    (folder / "image_8.jpg").write_bytes(b"")
    return folder


def ingest(folder, out, **options):
    listing = list_folder(folder, captions="filename", masks=None)
    options = {"arguments": {"kind": "folder"}, "shard_bytes": 8000, **options}
    return run_ingest(listing, str(out), **options)


def read_files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_rerun_keeps_finished_tars_and_reads_no_image(images, tmp_path, monkeypatch):
    done = ingest(images, tmp_path)
    before = read_files(tmp_path)
    assert len([name for name in before if name.endswith(".tar")]) > 2
    assert (done.recipes, done.images, done.pairs, done.rejects) == (9, 7, 7, {"bad_image": 2})
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(Path, "read_bytes", None)
    assert ingest(images, tmp_path) == done
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


def test_an_unfinished_tar_is_made_anew_with_the_same_bytes(images, tmp_path):
    done = ingest(images, tmp_path)
    before = read_files(tmp_path)
    (tmp_path / "images-00001_stats.json").unlink()
    (tmp_path / "images-00001.tar").write_bytes(before["images-00001.tar"][:5000])
    (tmp_path / "images-00002.tar").write_bytes(b"short, and its stats are there")
    assert ingest(images, tmp_path) == done
    assert read_files(tmp_path) == before


def test_rejects_stand_beside_their_tar(images, tmp_path):
    ingest(images, tmp_path)
    lines = [
        json.loads(line)
        for path in sorted(tmp_path.glob("*_rejects.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert [(line["key"], line["phrase"], line["reason"]) for line in lines] == [
        ("image_3", None, "bad_image"),
        ("image_8", None, "bad_image"),
    ]
    counts = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("*_stats.json"))]
    assert sum(one["recipes"] for one in counts) == 9


def ingest_until_killed(folder, out, *, steps):
    """Ingest in a child process that is killed after so many steps; return its status."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = steps

    def count_down(wrapped):
        def act(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return wrapped(*arguments)

        return act

    FolderRecipe.build = count_down(FolderRecipe.build)
    Path.replace = count_down(Path.replace)
    try:
        ingest(folder, out)
    finally:
        os._exit(0)


def test_a_killed_run_is_continued_and_no_half_tar_counts(images, tmp_path):
    """Killed before each image and before each file gets its name."""
    done = ingest(images, tmp_path / "whole")
    whole = read_files(tmp_path / "whole")
    status, steps = -signal.SIGKILL, 0
    while status == -signal.SIGKILL:
        out = tmp_path / str(steps)
        status = ingest_until_killed(images, out, steps=steps)
        for stats in out.glob("*_stats.json"):
            tar = stats.name.replace("_stats.json", ".tar")
            assert (out / tar).read_bytes() == whole[tar]
        assert ingest(images, out) == done
        left = read_files(out)
        assert {name: left[name] for name in left if not name.startswith(".")} == whole, steps
        steps += 1
    assert status == 0
    assert steps > len(whole) + 9, (
        "a step for each file and each image, and the last was not killed"
    )


@pytest.mark.parametrize(
    ("other", "got"),
    [
        ({"shard_bytes": 9000}, "shard_bytes 9000"),
        ({"limit": 3}, "limit 3"),
        ({"arguments": {"kind": "folder", "text": "x"}}, "text 'x'"),
        ({"arguments": {}}, "kind None"),
    ],
)
def test_other_arguments_into_the_same_folder_are_refused(images, tmp_path, other, got):
    ingest(images, tmp_path)
    before = read_files(tmp_path)
    with pytest.raises(ValueError, match=f"expected the same, got {got}; give another --out"):
        ingest(images, tmp_path, **other)
    assert read_files(tmp_path) == before


def test_a_source_that_changed_is_told(images, tmp_path):
    for path in images.iterdir():
        (tmp_path / "in" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    ingest(tmp_path / "in", tmp_path / "out")
    save_image(tmp_path / "in" / "image_11.jpg")
    with pytest.raises(ValueError, match=r"images-0000\d.tar: expected images 'image_"):
        ingest(tmp_path / "in", tmp_path / "out")
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"images-00000.tar: expected images for it, got none"):
        ingest(tmp_path / "in", tmp_path / "out")


def test_an_image_renamed_in_the_middle_is_told_and_a_kept_tar_is_counted(images, tmp_path):
    shutil.copytree(images, tmp_path / "in")
    first = ingest(tmp_path / "in", tmp_path / "out")
    kept = ingest(tmp_path / "in", tmp_path / "out").num_kept
    assert (first.num_kept, kept) == (0, len(list((tmp_path / "out").glob("*.tar"))))
    (tmp_path / "in" / "image_1.jpg").rename(tmp_path / "in" / "image_1z.jpg")
    with pytest.raises(ValueError, match=r"images-00000.tar: expected images 'image_"):
        ingest(tmp_path / "in", tmp_path / "out")


def test_what_beside_a_tar_is_damaged_or_old_is_made_anew_or_named(images, tmp_path):
    shutil.copytree(images, tmp_path / "in")
    ingest(tmp_path / "in", tmp_path / "out")
    before = read_files(tmp_path / "out")
    for damage in (b"{", b"[]", b'{"x": 1}'):
        (tmp_path / "out" / "images-00001_stats.json").write_bytes(damage)
        ingest(tmp_path / "in", tmp_path / "out")
        assert read_files(tmp_path / "out") == before
    rejects = next(path for path in sorted((tmp_path / "out").glob("*_rejects.jsonl")))
    key = json.loads(rejects.read_text().splitlines()[0])["key"]
    save_image(tmp_path / "in" / f"{key}.jpg")  # mended
    for path in (tmp_path / "out").glob("images-0*.tar"):
        path.unlink()
    ingest(tmp_path / "in", tmp_path / "out")
    assert key not in rejects.read_text()
    (tmp_path / "out" / "images_ingest.json").write_bytes(b"[1]")
    with pytest.raises(ValueError, match=r"images_ingest.json: expected the arguments"):
        ingest(tmp_path / "in", tmp_path / "out")


def test_two_runs_of_other_arguments_do_not_mix(images, tmp_path, monkeypatch):
    """The other one begins while this one writes its first tar."""
    build = FolderRecipe.build

    def begin_another(recipe):
        monkeypatch.setattr(FolderRecipe, "build", build)
        ingest(images, tmp_path, shard_bytes=9000)
        return build(recipe)

    monkeypatch.setattr(FolderRecipe, "build", begin_another)
    with pytest.raises(ValueError, match="expected the same, got shard_bytes 8000"):
        ingest(images, tmp_path)


def test_tars_of_another_program_are_not_overwritten(images, tmp_path):
    (tmp_path / "images-00000.tar").write_bytes(b"precious")
    with pytest.raises(
        ValueError, match=r"images-00000\.tar is there, and ingest did not write it"
    ):
        ingest(images, tmp_path)
    assert read_files(tmp_path) == {"images-00000.tar": b"precious"}


def test_where_no_image_is_left_nothing_is_written(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"<html>")
    done = ingest(tmp_path / "in", tmp_path / "out")
    assert (done.images, done.rejects) == (0, {"bad_image": 1})
    assert "HTML" in done.examples["bad_image"]
    assert not (tmp_path / "out").exists()


def test_temporary_files_are_gone(images, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    ingest(images, tmp_path / "out")
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
