"""Models from URLs: one copy a node, whole or not there, told anew when the source changes."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time

import fsspec
import pytest

import pipeline.spec.fetch_model
from models.ldm.files import ModelFilesError
from pipeline.spec.build_layers import build_layers
from pipeline.spec.fetch_model import fetch_model
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec
from pipeline.spec.open_model import open_model

FETCH = """
import sys, time
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem
from pipeline.spec.fetch_model import fetch_model

copy, log = LocalFileSystem.get_file, open(sys.argv[2], "a", buffering=1)

def count(self, path, *args, **kwargs):
    log.write(path + "\\n")
    time.sleep(float(sys.argv[3]))
    return copy(self, path, *args, **kwargs)

LocalFileSystem.get_file = count
print(fetch_model(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDZNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def memory(ldm_folder):
    """The tiny model at memory://bucket/ldm, with what published folders hold beside it."""
    filesystem = fsspec.filesystem("memory")
    for path in ldm_folder.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"/bucket/ldm/{path.relative_to(ldm_folder)}", path.read_bytes())
    for extra in ("unet/weights.bin", "safety_checker/model.safetensors", "v1.ckpt", "README.md"):
        filesystem.pipe_file(f"/bucket/ldm/{extra}", b"not asked for")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture
def small_folder(tmp_path):
    """Files laid out as a model's, a few bytes each."""
    for name in ("model_index.json", "vae/config.json", "unet/a.safetensors", "unet/b.safetensors"):
        path = tmp_path / "small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "small"


def read_tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def start(url, log, pause_s=0.0):
    command = [sys.executable, "-c", FETCH, url, str(log), str(pause_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def count_folders(cache):
    return len([path for path in cache.iterdir() if path.is_dir()])


def test_a_folder_is_itself(ldm_folder, cache):
    assert fetch_model(str(ldm_folder)) == ldm_folder
    assert not cache.exists()


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_url_becomes_a_copy_of_what_is_read(memory, ldm_folder, cache, ending):
    folder = fetch_model("memory://bucket/ldm" + ending)
    assert folder.parent == cache
    assert read_tree(folder) == read_tree(ldm_folder)
    assert count_folders(cache) == 1


def test_layers_of_a_url_are_those_of_the_folder(memory, ldm_folder):
    sections = {"features": FeaturesSpec()}
    here = build_layers(Spec(latents=LatentsSpec(model=str(ldm_folder)), **sections))
    there = build_layers(Spec(latents=LatentsSpec(model="memory://bucket/ldm"), **sections))
    assert [x.fingerprint for x in there] == [x.fingerprint for x in here]
    assert there[0].source["model"] == "memory://bucket/ldm"
    assert open_model(there[1]) == fetch_model("memory://bucket/ldm")


def test_a_spec_is_checked_and_resolved_with_one_listing_of_its_model(memory, monkeypatch):
    spec = Spec(latents=LatentsSpec(model="memory://bucket/ldm"))
    expected = build_layers(spec)
    find, looks = type(memory).find, []

    def count(self, path, *arguments, **options):
        looks.append(path)
        return find(self, path, *arguments, **options)

    monkeypatch.setattr(type(memory), "find", count)
    assert build_layers(spec) == expected
    assert len(looks) == 1


def test_a_copy_that_rotted_is_told_by_its_contents(memory):
    layer, _ = build_layers(Spec(latents=LatentsSpec(model="memory://bucket/ldm")))
    path = fetch_model("memory://bucket/ldm") / "vae" / "config.json"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(ModelFilesError, match=r"differ in SHA-256; .*remove that copy"):
        open_model(layer)


def test_a_second_use_copies_nothing(memory, monkeypatch):
    first = fetch_model("memory://bucket/ldm")
    monkeypatch.setattr(type(memory), "get_file", None)  # would raise if called
    assert fetch_model("memory://bucket/ldm") == first


def test_a_model_written_anew_is_copied_anew(small_folder):
    url = small_folder.as_uri()
    before = fetch_model(url)
    path = small_folder / "unet" / "a.safetensors"
    path.write_text("UNET/a.safetensors")  # of the same size
    os.utime(path, ns=(1, 1))
    after = fetch_model(url)
    assert after != before
    assert read_tree(after)["unet/a.safetensors"] == b"UNET/a.safetensors"


def test_a_copy_with_a_file_cut_is_made_again(small_folder, cache):
    folder = fetch_model(small_folder.as_uri())
    (folder / "unet" / "b.safetensors").write_bytes(b"")
    assert fetch_model(small_folder.as_uri()) == folder
    assert read_tree(folder) == read_tree(small_folder)
    assert count_folders(cache) == 1


def test_processes_that_race_make_one_copy(small_folder, tmp_path, cache):
    log = tmp_path / "log"
    racers = [start(small_folder.as_uri(), log, pause_s=0.2) for _ in range(3)]
    said = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert said == {str(fetch_model(small_folder.as_uri()))}
    assert len(log.read_text().splitlines()) == 4  # each file once
    assert count_folders(cache) == 1


def test_a_half_copy_of_a_killed_process_never_counts(small_folder, tmp_path, cache):
    log = tmp_path / "log"
    killed = start(small_folder.as_uri(), log, pause_s=1)
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".part"]
    folder = fetch_model(small_folder.as_uri())
    assert read_tree(folder) == read_tree(small_folder)
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_without_locks_one_copy_stays(small_folder, cache, monkeypatch, caplog):
    def unsupported(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    rename = pipeline.spec.fetch_model.Path.rename

    def lose(self, target):
        shutil.copytree(self, target)  # as one that was faster
        return rename(self, target)

    monkeypatch.setattr(pipeline.spec.fetch_model.Path, "rename", lose)
    folder = fetch_model(small_folder.as_uri())
    assert "has no locks; set LDZNET_CACHE" in caplog.text
    assert read_tree(folder) == read_tree(small_folder)
    assert count_folders(cache) == 1


def test_a_model_that_changes_while_it_is_copied_is_an_error(memory, cache, monkeypatch):
    copy = type(memory).get_file

    def change(self, path, *args, **kwargs):
        copy(self, path, *args, **kwargs)
        if path.endswith("unet/config.json"):
            self.pipe_file(path, self.cat_file(path))

    monkeypatch.setattr(type(memory), "get_file", change)
    with pytest.raises(ModelFilesError, match="was written to while it was copied; run again"):
        fetch_model("memory://bucket/ldm")
    assert count_folders(cache) == 0


@pytest.mark.parametrize("url", ["memory://none/ldm", "file:///none/ldm"])
def test_a_url_without_a_model_is_an_error(url):
    with pytest.raises(ModelFilesError, match=r"expected a folder in diffusers' layout .*ldm"):
        fetch_model(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://key:secret@bucket/sd14", "without a password or a query"),
        ("https://host/sd14?token=secret", "without a password or a query"),
        ("simplecache::s3://secret/sd14", "chained and command URLs are refused"),
        ("nosuch://bucket/sd14", "cannot be opened"),
    ],
)
def test_a_url_that_is_refused_shows_no_secret(url, message, cache):
    with pytest.raises(ModelFilesError, match=message) as error:
        fetch_model(url)
    assert "secret" not in str(error.value)
    assert not cache.exists()


def test_no_room_is_told_before_anything_is_copied(small_folder, cache, monkeypatch):
    usage = shutil.disk_usage(small_folder)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"small: expected room .* got 10 bytes free; .*LDZNET_CACHE"):
        fetch_model(small_folder.as_uri())
    assert count_folders(cache) == 0
