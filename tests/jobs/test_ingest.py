"""``ldznet ingest``: what every kind's command has: counts, statuses, dry runs."""

import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.__main__ import app
from tests.pipeline.ingest.test_folder import save_image


@pytest.fixture
def images(tmp_path):
    for name in ("a", "b", "c"):
        save_image(tmp_path / "in" / f"{name}.jpg")
    (tmp_path / "in" / "d.jpg").write_bytes(b"GIF89a")
    (tmp_path / "in" / "e.txt").write_text("a caption of no image")
    return tmp_path / "in"


def ingest(images, *options):
    command = ["ingest", "folder", str(images), "--out", str(images.parent / "out"), *options]
    return CliRunner().invoke(app, command)


def test_counts_rejects_and_notes_are_told_and_rejects_are_no_failure(images):
    done = ingest(images, "--captions", "filename")
    assert done.exit_code == 0, done.output
    assert "images: images 3, pairs 3, negatives 0\n" in done.output
    assert "rejected: bad_image 1, such as d: expected JPEG or PNG or WEBP, got GIF" in done.output
    assert "note: files that are no images: .txt 1" in done.output
    assert (images.parent / "out" / "images-00000.tar").is_file()


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--expect-images", "3", "--expect-pairs", "0"], 0, ""),
        (["--expect-images", "4"], 1, "--expect-images: expected 4, got 3"),
        (["--expect-pairs", "3"], 1, "--expect-pairs: expected 3, got 0"),
        (["--limit", "2", "--expect-images", "2"], 0, ""),
        (["--shard-mb", "0"], 2, "shard-mb"),
        (["--masks", "{stem}.png"], 2, "--masks: expected phrases for the masks"),
        (["--captions", "words"], 2, "captions"),
    ],
)
def test_statuses(images, options, status, said):
    done = ingest(images, *options)
    assert done.exit_code == status, done.output
    assert said in done.output


def test_a_dry_run_knows_what_it_knows(images):
    limited = ingest(images, "--dry-run", "--limit", "1", "--expect-images", "1")
    assert limited.exit_code == 0, limited.output
    unknown = ingest(images, "--dry-run", "--expect-pairs", "99")
    assert unknown.exit_code == 1
    assert "got a number that is known once the images are read" in unknown.output


def test_relative_globs_are_those_of_their_folder(images, tmp_path, monkeypatch):
    for name in ("one", "two"):
        shutil.copytree(images, tmp_path / name)
        pixels = Image.fromarray(np.zeros((20, 30), np.uint8))
        for picture in "abc":
            pixels.save(tmp_path / name / f"{picture}.png")
    names = tmp_path / "names.txt"
    names.write_text("thing\n")
    command = ["ingest", "labels", "--images", "*.jpg", "--labels", "*.png"]
    command += ["--names", str(names), "--out", str(tmp_path / "tars")]
    monkeypatch.chdir(tmp_path / "one")
    assert CliRunner().invoke(app, command).exit_code == 0
    monkeypatch.chdir(tmp_path / "two")
    again = CliRunner().invoke(app, command, standalone_mode=False)
    assert "were made with images '" in str(again.output) + str(again.exception)


def test_splits_of_one_folder_have_names_of_their_own(images):
    assert ingest(images, "--split", "train").exit_code == 0
    assert ingest(images, "--split", "val").exit_code == 0
    names = sorted(path.name for path in (images.parent / "out").glob("*.tar"))
    assert names == ["train-00000.tar", "val-00000.tar"]


def test_where_nothing_is_written_the_status_is_that_of_an_encode_without_a_sample(images):
    for name in "abc":
        (images / f"{name}.jpg").unlink()
    done = ingest(images)
    assert done.exit_code == 3
    assert "nothing was written" in done.output
    assert not (images.parent / "out").exists()


def test_a_dry_run_shows_three_samples_and_writes_nothing(images):
    save_image(images / "a_0.png")
    done = ingest(images, "--captions", "filename", "--dry-run", "--expect-images", "5")
    assert done.exit_code == 0, done.output
    assert "images 5; nothing is written" in done.output
    shown = [line for line in done.output.splitlines() if line.startswith(("a", "b", "c", "d"))]
    assert [line.split(":")[0] for line in shown] == ["a", "a_0", "b"]
    assert "'a 0'" in done.output
    assert not (images.parent / "out").exists()
