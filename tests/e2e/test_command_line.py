"""The commands as a user runs them: exit statuses, messages, Ray underneath.

Those without Ray are forked from a process that has its imports done (``tests.support.writers``).
"""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from jobs import __main__ as commands

ROOT = Path(__file__).parents[2]


def ldznet(*arguments, cwd=ROOT, timeout=200):
    command = [sys.executable, "-m", "jobs", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip


@pytest.fixture
def forked(writers):
    """A function: what ``ldznet`` above does, at a tenth of the start-up."""

    def run(*arguments, cwd=ROOT):
        return writers.run_in(cwd, *arguments)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def spec_file(folder, spec):
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    return path


@pytest.fixture(scope="module")
def encoded(folder, spec_file, corpus_folder):
    """The corpus encoded by two Ray actors."""
    result = ldznet(
        "encode", "--corpus", corpus_folder / "scenes-{train,val}-*.tar", "--store",
        folder / "store", "--spec", spec_file, "--actors", 2, "--metrics", folder / "m.jsonl",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result


def test_encode_says_what_it_did(encoded, folder):
    assert "3 tasks: 0 committed, 3 to encode" in encoded.stdout
    assert "stored 12 samples" in encoded.stdout
    assert "encode done 3/3 tasks" in encoded.stderr
    assert f"records: {folder / 'm.jsonl'}" in encoded.stdout
    records = [json.loads(line) for line in (folder / "m.jsonl").read_text().splitlines()]
    assert records[-1]["status"] == "done"
    assert records[-1]["done"] == 3


def test_encode_again_does_nothing(encoded, folder, spec_file, corpus_folder, forked):
    result = forked(
        "encode", "--corpus", corpus_folder / "*.tar", "--store", folder / "store",
        "--spec", spec_file, cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0
    assert "3 tasks: 3 committed, 0 to encode" in result.stdout
    assert "nothing to do: all committed (3 tasks)" in result.stdout
    assert not (folder / "ldznet-runs").exists()


def test_inspect(encoded, folder, forked):
    result = forked("inspect", folder / "store", "--json")
    latents, features = json.loads(result.stdout)
    assert latents["stored_samples"] == 12
    assert features["num_tasks"] == 3
    assert latents["folder"] in forked("inspect", folder / "store").stdout


def test_the_documented_lines_read_the_store(encoded, folder):
    text = (ROOT / "docs" / "reference" / "store.md").read_text()
    (snippet,) = re.findall(r"```python\n(import json, pathlib.*?)```", text, re.DOTALL)
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 11
    assert "ldznet" not in snippet
    result = subprocess.run(
        [sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, check=True
    )
    assert len(result.stdout.splitlines()) == 3


@pytest.mark.thorough
def test_train_evaluate_and_segment(encoded, folder, corpus_folder, forked):
    config = {"head": {"name": "ldznet"}, "num_steps": 2, "batch_size": 4, "log_every": 1}
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    out = folder / "run"
    arguments = ("--store", folder / "store", "--config", folder / "train.yaml", "--out", out)
    trained = ldznet("train", *arguments, "--workers", 2)
    assert trained.returncode == 0, trained.stderr
    assert "train done 2/2 steps" in trained.stderr
    again = forked("train", *arguments)
    assert again.returncode == 2
    assert "add --resume" in again.stderr
    scored = ldznet("evaluate", "--store", folder / "store", "--checkpoint", out, "--json")
    assert scored.returncode == 0, scored.stderr
    rows = json.loads(scored.stdout)
    assert [row["baseline"] for row in rows] == [False, True, True]
    with tarfile.open(corpus_folder / "scenes-val-00000.tar") as tar:
        (folder / "image.jpg").write_bytes(tar.extractfile("val-000000.jpg").read())
    result = forked(
        "segment", "--checkpoint", out, "--image", folder / "image.jpg", "--text", "red circle",
        "--out", folder / "mask.png", "--overlay", folder / "overlay.png",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (
        Image.open(folder / "mask.png").size == Image.open(folder / "overlay.png").size == (64, 64)
    )
    broken = ROOT / "README.md"
    result = forked("segment", "--checkpoint", out, "--image", broken, "--text", "red circle")
    assert result.returncode == 2
    assert f"error: {broken}: corrupt: expected JPEG or PNG or WEBP, got bytes" in result.stderr


def test_broken_input_exits_0_with_rejects_and_3_when_cut(folder, spec_file, corpus_folder, forked):
    """A stranger and a broken image are rejects; the same tar cut short fails alone."""
    corpus = folder / "broken"
    corpus.mkdir()
    for name in ("scenes-train-00000.tar", "scenes-train-00001.tar"):
        data = bytearray((corpus_folder / name).read_bytes())
        if name.endswith("0.tar"):
            start = data.index(b"\xff\xd8\xff")
            data[start : start + 2] = b"no"
        (corpus / name).write_bytes(data)
    arguments = ("--corpus", corpus / "*.tar", "--spec", spec_file, "--actors", 0)
    first = forked("encode", *arguments, "--store", folder / "s0", cwd=folder)
    assert first.returncode == 0, first.stderr
    assert "rejected 1: bad_image" in first.stdout
    assert f"which ones: ldznet inspect {folder / 's0'} --rejects" in first.stdout
    strict = forked(
        "encode", *arguments, "--store", folder / "s1", "--max-rejects", 0, cwd=folder,
    )  # fmt: skip
    assert strict.returncode == 3
    assert "over --max-rejects 0" in strict.stderr
    path = corpus / "scenes-train-00000.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    cut = forked("encode", *arguments, "--store", folder / "s2", cwd=folder)
    assert cut.returncode == 3
    assert re.search(r"failed scenes-train-00000-\w+: DamagedTarError: ", cut.stdout)
    assert "stored 4 samples" in cut.stdout
    assert str(path) in cut.stdout
    assert "encode ended 1/2 tasks" in cut.stderr


def test_a_tar_of_which_nothing_is_stored_ends_with_3_and_one_without_samples_with_0(
    tmp_path, spec_file, corpus_folder, forked
):
    def encode(*names):
        """Encode the tests' first tar, of which the named extensions were left out."""
        path = tmp_path / f"without-{'-'.join(names)}.tar"
        source = corpus_folder / "scenes-train-00000.tar"
        with tarfile.open(source) as whole, tarfile.open(path, "w") as tar:
            for member in whole:
                if member.name.rpartition(".")[2] not in names:
                    tar.addfile(member, whole.extractfile(member))
        arguments = ("--spec", spec_file, "--store", tmp_path / "store", "--actors", 0)
        return path, forked("encode", "--corpus", path, *arguments, cwd=tmp_path)

    path, first = encode("json")
    assert first.returncode == 3, first.stderr
    assert f"nothing stored of file://{path}: 4 samples, rejected bad_text 4" in first.stdout
    _, again = encode("json")
    assert again.returncode == 0  # the run that did it has said so
    assert "0 to encode, 1 of tars whose samples were all rejected\nnothing to do" in again.stdout
    _, empty = encode("json", "jpg", "png")
    assert (empty.returncode, "nothing stored" in empty.stdout) == (0, False), empty.stdout
    _, again = encode("json", "jpg", "png")
    assert "1 committed, 0 to encode\n" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encode", "--corpus", "x.tar"), "expected --store and --spec"),
        (("frobnicate",), "No such command 'frobnicate'"),
        (("inspect", "nowhere"), "expected a store, found no layer there"),
        (
            ("segment", "--checkpoint", ".", "--image", "README.md", "--text", "x"),
            "error: ",
        ),
        (
            ("segment", "--checkpoint", ".", "--image", "no/where.jpg", "--text", "x"),
            "'no/where.jpg' does not exist",
        ),
        (("segment", "--checkpoint", ".", "--image", "docs", "--text", "x"), "'docs' is a direct"),
        (("demo", "--size", "huge"), "expected one of default, smallest, got 'huge'"),
    ],
)
def test_bad_arguments_exit_2(forked, arguments, message):
    result = forked(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_bad_specs_exit_2_and_name_the_field(folder, forked):
    (folder / "bad.yaml").write_text("latents: {model: x, size: 100, colour: red}\n")
    result = forked(
        "encode", "--corpus", "x.tar", "--store", folder / "no", "--spec", folder / "bad.yaml"
    )
    assert result.returncode == 2
    assert "latents.size: Input should be a multiple of 64" in result.stderr
    assert "latents.colour" in result.stderr
    assert not (folder / "no").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--actors", "many"), "actors: expected N, or MIN:MAX"),
        (("--metrics", "."), "--metrics: expected a file that can be written, got ."),
    ],
)
def test_bad_options_exit_2_before_a_layer_is_made(
    folder, spec_file, corpus_folder, forked, options, message
):
    result = forked(
        "encode", "--corpus", corpus_folder / "*.tar", "--store", folder / "no", "--spec",
        spec_file, *options,
    )  # fmt: skip
    assert result.returncode == 2
    assert message in result.stderr
    assert not (folder / "no").exists()


def test_verify_of_no_store_leaves_nothing(tmp_path):
    result = ldznet("verify", "nowhere", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "expected a store, found no layer there" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["encode", "--store", "my store"], "to go on:\n  ldznet encode --store 'my store'"),
        (["train", "--out", "x"], "to go on:\n  ldznet train --out x --resume"),
        (["train", "--resume"], "to go on:\n  ldznet train --resume"),
        (["verify", "x"], "interrupted."),
    ],
)
def test_an_interrupted_command_is_given_to_go_on(monkeypatch, capsys, arguments, said):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["ldznet", *arguments])
    assert commands._run(interrupt) == 130
    assert capsys.readouterr().err.endswith(f"{said}\n")
