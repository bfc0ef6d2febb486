"""Every reject of a store is found again, with its task, key, reason and detail."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.__main__ import app
from pipeline.base.yaml import SpecError
from pipeline.corpus.members import RejectReason
from pipeline.encode.prepare import prepare_encode
from pipeline.spec.fields import LatentsSpec, Spec
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.commit import DamagedStoreError, read_commit, seal_record, write_commit
from pipeline.store.current import list_current
from pipeline.store.layout import FIRST_REJECTS, REJECTS
from pipeline.store.store import Store
from pipeline.upkeep import rejects as listing
from pipeline.upkeep.inspect import inspect_store
from pipeline.upkeep.rejects import RejectList, format_rejects, write_rejects

GOLDEN = Path(__file__).parents[2] / "golden" / "store_v1"
RED = "\N{RIGHT-TO-LEFT OVERRIDE}"  # a phrase may hold it, and it would turn a terminal's line


def to_bytes(image, form):
    data = io.BytesIO()
    image.save(data, form)
    return data.getvalue()


def write_tar(path, keys, **others):
    """Write samples of 192 by 64 px: "left" lies outside the centre crop, "middle" in it."""
    masks = [Image.fromarray(np.zeros((64, 192), bool)) for _ in range(2)]
    for mask, left in zip(masks, (0, 64), strict=True):
        mask.paste(1, (left, 0, left + 60, 64))
    image = to_bytes(Image.new("RGB", (192, 64), "red"), "JPEG")
    text = json.dumps({"phrases": ["left: of it", "middle"]}).encode()
    files = {}
    for key in keys:
        files |= {f"{key}.jpg": image, f"{key}.json": text}
        files |= {f"{key}.mask{i}.png": to_bytes(mask, "PNG") for i, mask in enumerate(masks)}
    with tarfile.open(path, "w") as tar:
        for name, data in (files | others).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def rejecting(tmp_path_factory, ldm_folder):
    """A store of three tasks: a.tar with rejects of each level, b.tar and c.tar with a pair's."""
    folder = tmp_path_factory.mktemp("rejecting")
    write_tar(
        folder / "a.tar", ["k"], **{"notes.txt": b"x", "bad.jpg": b"no", "bad.mask1.png": b"no"}
    )
    write_tar(folder / "b.tar", ["m/1"])
    write_tar(folder / "c.tar", ["m/2"])
    spec = Spec(latents=LatentsSpec(model=str(ldm_folder), size=64, crop="center"))
    run = prepare_encode(spec, [str(folder / "*.tar")], str(folder / "store"), batch=8)
    stage = EncodeStage(run.config)
    for item in run.items:
        outcome = stage.encode(item)
        assert outcome.status == "committed", outcome.error
    return folder / "store"


@pytest.fixture
def copied(tmp_path, rejecting):
    return shutil.copytree(
        rejecting, tmp_path / "store", ignore=shutil.ignore_patterns("inventory")
    )


def make_first(folder):
    """Make a store's records and rejects what the first version wrote."""
    store = Store.open(str(folder))
    (layer,) = store.list_layers()
    for record in list_current(store, layer.folder).current.values():
        commit = read_commit(store.storage, layer.folder, record)
        path = folder / commit.data_folder / REJECTS
        pq.write_table(pq.read_table(path).select(FIRST_REJECTS), path)
        plain = json.loads(commit.model_dump_json())
        num_bytes, sha256 = store.storage.digest(f"{commit.data_folder}/{REJECTS}")
        for file in plain["files"]:
            if file["path"].endswith(REJECTS):
                file |= {"num_bytes": num_bytes, "sha256": sha256}
        for name in ("rejected_pairs", "rejects", "notes"):
            del plain["accounting"][name]
        plain["schema_version"] = 1
        (folder / commit.name).write_bytes(seal_record(json.dumps(plain, indent=1).encode()))


def list_all(folder, *reasons):
    return [row for t in RejectList(Store.open(str(folder)), reasons) for row in t.to_pylist()]


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def shorten(rows):
    return [(r["url"][-5:], r["level"], r["reason"], r["key"], r["phrase"]) for r in rows]


EXPECTED = [
    ("a.tar", "member", "unexpected_member", "notes.txt", None),
    ("a.tar", "sample", "missing_mask", "bad", None),
    ("a.tar", "pair", "outside_view", "k", "left: of it"),
    ("b.tar", "pair", "outside_view", "m/1", "left: of it"),
    ("c.tar", "pair", "outside_view", "m/2", "left: of it"),
]


def test_the_summary_counts_pairs_and_reasons(rejecting):
    (layer,) = inspect_store(str(rejecting))
    assert (layer.stored_samples, layer.rejected_samples) == (3, 1)
    assert (layer.rejected_members, layer.rejected_pairs, layer.num_untold) == (1, 3, 0)
    assert list(layer.rejects.items()) == [
        ("outside_view", 3),
        ("missing_mask", 1),
        ("unexpected_member", 1),
    ]
    text = " ".join(layer.as_text().split())
    assert (
        "input 3 samples stored, 1 rejected; 1 other member, 3 pairs rejected "
        "(outside_view 3, missing_mask 1, unexpected_member 1); --rejects lists them"
    ) in text
    assert max(map(len, layer.as_text().splitlines()[2:])) <= 80
    (plain,) = json.loads(run(rejecting, "--json").stdout)
    assert plain["rejected_pairs"] == 3
    assert plain["rejects"] == layer.rejects


def test_every_reject_is_listed_with_its_place_and_detail(rejecting):
    rows = list_all(rejecting)
    assert sorted(shorten(rows)) == sorted(EXPECTED)
    assert [row["task"] for row in rows] == sorted(row["task"] for row in rows)
    (layer,) = Store.open(str(rejecting)).list_layers()
    assert {row["layer"] for row in rows} == {layer.folder}
    detail = {row["reason"]: row["detail"] for row in rows}
    assert "expected an image beside the caption" in detail["unexpected_member"]
    assert "no pixel of the mask falls into view 0" in detail["outside_view"]


def test_reasons_filter_and_only_tasks_that_have_them_are_read(rejecting, monkeypatch):
    assert sorted(shorten(list_all(rejecting, "outside_view"))) == sorted(EXPECTED[2:])
    store = Store.open(str(rejecting))
    read = []
    real = store.read_rejects
    monkeypatch.setattr(store, "read_rejects", lambda commit: read.append(commit) or real(commit))
    found = RejectList(store, ["missing_mask", "unexpected_member"])
    rows = [row for table in found for row in table.to_pylist()]
    assert sorted(shorten(rows)) == sorted(EXPECTED[:2])
    assert [commit.source.url[-5:] for commit in read] == ["a.tar"]
    assert found.counts == {"missing_mask": 1, "unexpected_member": 1}
    assert list_all(rejecting, "bad_image") == []


def test_an_unknown_reason_is_an_error_that_lists_the_known(rejecting):
    with pytest.raises(SpecError, match=r"--reason: expected one of .*too.*got outside-view"):
        list_all(rejecting, "outside-view", "bad_image")
    assert list_all(rejecting, "not_adjacent") == []  # what an earlier version said


def test_records_of_the_first_version_are_read_for_their_rejects(copied):
    make_first(copied)
    (layer,) = inspect_store(str(copied))
    assert (layer.rejected_samples, layer.rejected_pairs, layer.num_untold) == (1, 0, 3)
    text = " ".join(layer.as_text().split())
    assert "3 samples stored, 1 rejected; 1 other member rejected rejected pairs" in text
    assert "of 3 tasks are not in the records, which are of version 1; --rejects reads" in text
    assert sorted(shorten(list_all(copied))) == sorted(EXPECTED)


def test_rejects_of_a_retired_task_are_not_listed(copied):
    store = Store.open(str(copied))
    (layer,) = store.list_layers()
    task = next(row["task"] for row in list_all(copied) if row["url"].endswith("a.tar"))
    record = list_current(store, layer.folder).current[task]
    commit = read_commit(store.storage, layer.folder, record)
    retired = commit.model_copy(update={"status": "retired", "generation": 1})
    assert write_commit(store.storage, retired) == "won"
    assert shorten(list_all(copied)) == EXPECTED[3:]


def test_a_store_of_the_first_version_is_listed(tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "store")
    result = run(folder, "--rejects")
    assert (result.exit_code, result.stdout) == (0, "0 rejects\n")


@pytest.mark.parametrize("alter", ["flip", "cut", "remove"])
def test_a_damaged_file_of_rejects_is_named_with_what_to_do(copied, alter):
    path = next(copied.glob("latents-*/data/*/*/rejects.parquet"))
    data = path.read_bytes()
    if alter == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-9] if alter == "cut" else data[:50] + b"~" + data[51:])
    with pytest.raises(DamagedStoreError) as caught:
        list_all(copied)
    assert str(path.relative_to(copied)) in str(caught.value)
    assert f"ldznet verify {copied}" in str(caught.value)
    (copied / "out.parquet").write_text("old")
    result = run(copied, "--rejects", "--out", copied / "out.parquet")
    assert result.exit_code == 1
    assert (copied / "out.parquet").read_text() == "old"


def test_the_parquet_file_has_the_same_in_row_groups(rejecting, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "_GROUP_BYTES", 1)
    monkeypatch.setattr(listing, "_AT_ONCE", 1)
    write_rejects(tmp_path / "new" / "r.parquet", RejectList(Store.open(str(rejecting))))
    file = pq.ParquetFile(tmp_path / "new" / "r.parquet")
    assert file.read().to_pylist() == list_all(rejecting)
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [3, 1, 1]
    none = RejectList(Store.open(str(rejecting)), ["bad_image"])
    write_rejects(tmp_path / "none.parquet", none)
    assert pq.read_table(tmp_path / "none.parquet").schema == listing.REJECT_SCHEMA


def test_text_is_a_line_a_reject_that_moves_no_terminal(rejecting):
    (table, *_) = RejectList(Store.open(str(rejecting)), ["outside_view"])
    hostile = table.set_column(
        table.column_names.index("detail"), "detail", [[f"{RED}\x1b[2Jx\ny"] * table.num_rows]
    )
    lines = format_rejects(hostile).split("\n")
    assert len(lines) == table.num_rows
    assert all(line.endswith("??[2Jx?y") and line.isprintable() for line in lines)


def test_the_command_lists_as_text_json_and_parquet(rejecting, tmp_path):
    text = run(rejecting, "--rejects", "--reason", "outside_view").stdout.splitlines()
    assert text[0] == inspect_store(str(rejecting))[0].folder
    assert text[-1] == "3 rejects: outside_view 3"
    assert "  outside_view  pair  k: left: of it  no pixel of the mask" in "".join(text)
    lines = run(rejecting, "--rejects", "--json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == list_all(rejecting)
    out = tmp_path / "r.parquet"
    result = run(rejecting, "--rejects", "--out", out)
    assert f"5 rejects in {out}: outside_view 3, " in result.stdout
    assert pq.read_table(out).to_pylist() == list_all(rejecting)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--reason", "bad_image"], "--reason: goes with --rejects"),
        (["--out", "r.parquet"], "--out: goes with --rejects"),
        (["--rejects", "--watch", "5", "--fast"], "expected no --fast or --watch"),
        (["--rejects", "--out", "r.json"], "expected FILE.parquet and no --json, got r.json"),
        (["--rejects", "--out", "r.parquet", "--json"], "expected FILE.parquet and no --json"),
        (["--rejects", "--reason", "x"], f"{RejectReason.BAD_IMAGE}, .*got x"),
    ],
)
def test_options_that_do_not_go_together_are_refused(rejecting, options, what):
    result = run(rejecting, *options)
    assert result.exit_code == 2
    assert re.search(what, result.output)


def test_a_reader_that_leaves_early_is_no_error(rejecting):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "jobs", "inspect", str(rejecting), "--rejects"]
    root = Path(__file__).parents[3]
    result = subprocess.run(
        command, cwd=root, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")
