"""Commands that show or keep a store, where there is none: the error says what is there instead."""

import json

import pytest
from typer.testing import CliRunner

from jobs.__main__ import app

VERBS = {
    "inspect": ["inspect", "{}"],
    "inspect --rejects": ["inspect", "--rejects", "{}"],
    "verify": ["verify", "{}"],
    "gc": ["gc", "{}"],
    "rm": ["rm", "{}", "--task", "x"],
    "snapshot": ["snapshot", "{}"],
    "train": ["train", "--store", "{}", "--config", "{config}", "--out", "{out}", "--workers", "0"],
    "sweep": ["sweep", "--store", "{}", "--config", "{sweep}", "--out", "{out}"],
    "encode": ["encode", "--store", "{}", "--spec", "{spec}"],
    "bench train": ["bench", "train", "--store", "{}"],
}


@pytest.fixture
def run(tmp_path, spec):
    """A function: a verb of ``VERBS`` on a store, and further arguments."""
    paths = {name: tmp_path / f"{name}.yaml" for name in ("config", "sweep", "spec")}
    config = {"head": {"name": "probe"}, "num_steps": 1}
    paths["config"].write_text(json.dumps(config))
    paths["sweep"].write_text(json.dumps({"base": config}))
    paths["spec"].write_text(spec.model_dump_json())
    paths["out"] = tmp_path / "out"

    def run(verb, store, *arguments):
        given = [text.format(store, **paths) for text in VERBS[verb]]
        return CliRunner().invoke(app, [*given, *map(str, arguments)])

    return run


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_there_instead_is_said(run, verb, tmp_path, store_folder):
    layer = next(store_folder.glob("latents-*"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    for name in "abcd":
        (tmp_path / "other" / f"{name}\x1b.tar").touch()
    (tmp_path / "above").mkdir()
    store = tmp_path / "above" / "store"
    store.symlink_to(store_folder)
    layer = store / layer.name
    expected = {
        tmp_path / "none": "expected a store, found no layer there: nothing is there; give the",
        tmp_path / "other": "found no layer there: it holds a?.tar, b?.tar, c?.tar and 1 more; ",
        tmp_path / "file": f"expected a folder or s3:// URL, got {tmp_path / 'file'}: ",
        tmp_path / "above": f"found no layer there: it holds store; did you mean {store}?",
        layer: f"{layer}: expected a store, found no layer there: it holds ",
        layer / "commits": f"did you mean {store}?",
        "S3://bucket/x": "expected s3://bucket/prefix, with s3:// as it is here",
        "s3:/bucket/x": "expected s3://bucket/prefix, with s3:// as it is here",
    }
    for path, what in expected.items():
        result = run(verb, path)
        assert result.exit_code == 2, path
        assert what in result.output
    assert not (tmp_path / "none").exists()


def test_a_snapshot_of_a_layer_that_is_not_there_lists_those_that_are(run, store_folder):
    result = run("snapshot", store_folder, "--layer", "latents-x")
    assert result.exit_code == 2
    assert "--layer: expected one of latents-" in result.output
    assert "got latents-x; these are the layers of " in result.output


@pytest.mark.parametrize("verb", VERBS)
def test_a_bucket_that_is_not_there_and_an_empty_prefix_are_said(run, verb, s3_url, tmp_path):
    result = run(verb, s3_url.split(" ")[0] + "-nothing")
    assert result.exit_code == 2
    assert "expected a store, found no layer there: nothing is there" in result.output
    result = run(verb, "s3://ldznet-none-such/x")
    assert result.exit_code == 1
    assert "NoSuchBucket. Create the bucket, or correct the URL" in result.output
