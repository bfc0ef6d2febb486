"""Arguments, configs and stores are checked before torch and Ray are imported."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "diffusers", "transformers", "matplotlib", "zarr")
# Runs one command in this process and says its status, and which of HEAVY it has imported.
RUN = f"""
import sys
from jobs.__main__ import app
try:
    app(sys.argv[1:])
except SystemExit as left:
    print("status", left.code)
print("heavy", [name for name in {HEAVY} if name in sys.modules])
"""


def run(*command):
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, command)], capture_output=True, text=True, timeout=300
    )
    return done.stdout.splitlines()[-2:], done.stderr


@pytest.fixture
def bad(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("nope: 1\n")
    return path


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text("head: {name: znet}\nnum_steps: 1\n")
    return path


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--store", "STORE", "--config", "BAD", "--out", "OUT"),
        ("sweep", "--store", "STORE", "--config", "BAD", "--out", "OUT"),
        ("encode", "--corpus", "none/*.tar", "--store", "OUT", "--spec", "BAD"),
        ("plan", "--corpus", "none/*.tar", "--spec", "BAD"),
    ],
    ids=lambda command: command[0],
)
def test_a_wrong_key_is_told_without_torch(command, bad, store_folder, tmp_path):
    places = {"STORE": store_folder, "BAD": bad, "OUT": tmp_path / "out"}
    told, error = run(*(places.get(word, word) for word in command))
    assert "nope: no such field" in error
    assert told == ["status 2", "heavy []"]


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--config", "GOOD", "--out", "OUT", "--store", "NONE"),
        ("inspect", "NONE"),
        ("verify", "NONE"),
        ("gc", "NONE"),
        ("snapshot", "NONE"),
    ],
    ids=lambda command: command[0],
)
def test_a_missing_store_is_told_without_torch(command, good, tmp_path):
    places = {"GOOD": good, "OUT": tmp_path / "out", "NONE": tmp_path / "none"}
    told, error = run(*(places.get(word, word) for word in command))
    assert "expected a store, found no layer there" in error
    assert told == ["status 2", "heavy []"]


def test_a_missing_checkpoint_is_told_without_torch(store_folder, tmp_path):
    told, error = run("evaluate", "--store", store_folder, "--checkpoint", tmp_path / "none")
    assert "expected a checkpoint" in error
    assert told == ["status 2", "heavy []"]


def test_what_a_store_holds_is_told_without_torch(store_folder):
    told, error = run("inspect", store_folder)
    assert (told, error) == (["status 0", "heavy []"], "")


def test_a_home_in_quotes_is_the_home(bad, store_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    command = ("train", "--store", store_folder, "--config", f"~/{bad.name}", "--out", "~/out")
    _, error = run(*command)
    assert f"{bad}: is not a valid TrainConfig" in error
