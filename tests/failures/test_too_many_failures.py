"""Bad tars never stop the others; more of them than ``--max-failures`` end the run."""

import json
import shutil

import pytest
import yaml


@pytest.fixture
def encode(tmp_path, corpus_folder, spec):
    """The arguments of an encode run over three tars, the first two of them cut."""
    for path in sorted(corpus_folder.glob("*.tar")):
        shutil.copy(path, tmp_path)
    for path in tmp_path.glob("scenes-train-*.tar"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    return (
        "encode", "--corpus", tmp_path / "*.tar", "--store", tmp_path / "store",
        "--spec", tmp_path / "spec.yaml", "--actors", 0, "--threads", 1,
        "--metrics", tmp_path / "m.jsonl",
    )  # fmt: skip


def list_commits(tmp_path):
    return [path.name.split("-")[1] for path in tmp_path.glob("store/features-*/commits/*.json")]


def test_as_many_as_are_allowed_are_reported_and_the_rest_is_done(tmp_path, encode, writers):
    status, output = writers.run(*encode, "--max-failures", 2)
    assert status == 3, output
    assert output.count("DamagedTarError") >= 2
    assert "tasks failed: 2; the same command tries them again" in output
    assert "stopped" not in output
    assert list_commits(tmp_path) == ["val"]


@pytest.mark.parametrize("most", [0, 1])
def test_one_more_ends_the_run(tmp_path, encode, writers, most):
    status, output = writers.run(*encode, "--max-failures", most)
    assert status == 3, output
    assert "stopped: too many tasks failed (--max-failures)" in output
    assert f"tasks failed: {most + 1};" in output
    last = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[-1])
    assert (last["status"], last["done"]) == ("stopped", 0)
    assert list_commits(tmp_path) == []
