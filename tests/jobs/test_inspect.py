"""``ldznet inspect``: arguments in; lines, JSON or a page out."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from jobs import inspect as verb
from jobs.__main__ import app


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_lines_json_and_a_page_say_the_same(store_folder, tmp_path):
    page = tmp_path / "made" / "store.html"
    result = run(store_folder, "--html", page)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any(line.startswith("  holds  3 tasks, ") for line in lines)
    layers = json.loads(run(store_folder, "--json").stdout)
    assert [layer["num_tasks"] for layer in layers] == [3, 3]
    text = page.read_text()
    assert all(layer["folder"] in text for layer in layers)
    assert f"{layers[0]['rows']['pairs']} pairs" in text


def test_a_corpus_is_held_to_the_store(store_folder, corpus_folder):
    result = run(store_folder, "--corpus", corpus_folder / "*.tar", "--fast")
    assert "corpus 3 of its 3 tasks committed" in result.stdout


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_watch_looks_until_it_is_interrupted(store_folder, monkeypatch, options):
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(verb.time, "sleep", wait)
    result = run(store_folder, "--watch", 5, *options)
    assert result.exit_code == 0, result.output
    assert waits == [5.0] * 3
    if options:
        looks = [json.loads(line) for line in result.stdout.splitlines()]
        assert [len(look["layers"]) for look in looks] == [2, 2, 2]
    else:
        assert result.stdout.count("  holds  3 tasks") == 6
        assert "\x1b" not in result.stdout  # not a terminal


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_watch_waits_for_the_first_layer(store_folder, tmp_path, monkeypatch, options):
    """Began before the run that writes the store: which comes at the third look."""
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            shutil.copytree(store_folder, tmp_path / "store")
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(verb.time, "sleep", wait)
    result = run(tmp_path / "store", "--watch", 5, *options)
    assert result.exit_code == 0, result.output
    said = result.stderr if options else result.stdout
    assert said.count("store: waiting for the first layer") == 1
    if options:
        (look,) = map(json.loads, result.stdout.splitlines())
        assert [layer["num_tasks"] for layer in look["layers"]] == [3, 3]
    else:
        assert result.stdout.count("  holds  3 tasks") == 2


def test_a_watch_that_is_interrupted_before_there_is_a_layer_ends_well(tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb.time, "sleep", interrupt)
    result = run(tmp_path / "none", "--watch", 5)
    assert (result.exit_code, result.stdout.count("waiting for")) == (0, 1), result.output
    assert not (tmp_path / "none").exists()


def test_where_there_is_no_store_it_says_so(tmp_path):
    result = run(tmp_path / "none")
    assert result.exit_code == 2
    assert "found no layer there" in result.output


@pytest.mark.parametrize("options", [("--html",), ("--rejects", "--out")])
def test_a_file_is_not_written_to_a_folder_named_like_a_url(store_folder, options):
    result = run(store_folder, *options, "s3://bucket/name.parquet")
    assert result.exit_code == 2
    assert (
        f"{options[-1]}: expected a path of a file system, got the URL s3://bucket/"
        in result.output
    )
