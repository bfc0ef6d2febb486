"""Commands that show or keep a store, where there is none: the error says what is there instead."""

import pytest
from typer.testing import CliRunner

from jobs.__main__ import app

VERBS = ["inspect", "inspect --rejects", "verify", "gc", "snapshot"]


def run(verb, *arguments):
    return CliRunner().invoke(app, [*verb.split(), *map(str, arguments)])


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_there_instead_is_said(verb, tmp_path, store_folder):
    layer = next(store_folder.glob("latents-*"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    for name in "abcd":
        (tmp_path / "other" / f"{name}\x1b.tar").touch()
    expected = {
        tmp_path / "none": "expected a store, found no layer there: nothing is there; give the",
        tmp_path / "other": "found no layer there: it holds a?.tar, b?.tar, c?.tar and 1 more; ",
        tmp_path / "file": f"expected a folder or s3:// URL, got {tmp_path / 'file'}: ",
        layer: f"{layer}: expected a store, found one of its layers there; give the folder above",
    }
    for path, what in expected.items():
        result = run(verb, path)
        assert result.exit_code == 2, path
        assert what in result.output
    assert not (tmp_path / "none").exists()


def test_a_snapshot_of_a_layer_that_is_not_there_lists_those_that_are(store_folder):
    result = run("snapshot", store_folder, "--layer", "latents-x")
    assert result.exit_code == 2
    assert "--layer: expected one of latents-" in result.output
    assert "got latents-x; these are the layers of " in result.output
