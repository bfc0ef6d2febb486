"""Web corpora are encoded as their producers leave them, and as they would be in our own layout."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from jobs.__main__ import app
from pipeline.store.store import Store
from tests.support.web_tars import KINDS, WebTar

GOLDEN = Path(__file__).parents[2] / "golden" / "img2dataset"
EXTENSIONS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}
MEANT = {  # the captions of tests/golden/make_img2dataset.py in one line; page.jpg is no picture
    "lake.png": "Ein See Foto: N. N., über dem « Möwen » kreisen \N{WATER WAVE}",
    "sea.webp": None,
    "wide.jpg": ("a long caption; " * 70)[:1000].rstrip(),
    "turned.jpg": "A picture that lies on its side",
}


def read_img2dataset(path):
    """Read a tar that img2dataset wrote; by the address that its JSON tells we know the caption."""
    web = WebTar()
    with tarfile.open(path) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}
    for name, data in members.items():
        if name.endswith(".json"):
            key = name.removesuffix(".json")
            address = json.loads(data)["url"].rpartition("/")[2]
            picture = members.get(f"{key}.jpg") or members[f"{key}.webp"]
            if address in MEANT:
                web.samples[key] = (picture, MEANT[address])
                web.num_set_aside += 1
    return web


def write_our_layout(path, samples):
    """Write samples in our own layout: extensions that say the format, phrases in the JSON."""
    with tarfile.open(path, "w") as tar:
        for i, (picture, caption) in enumerate(samples.values()):
            text = json.dumps({"phrases": [caption or "nothing was said"]}).encode()
            for extension, data in ((EXTENSIONS[picture[:2]], picture), ("json", text)):
                info = tarfile.TarInfo(f"{i}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def encode(pattern, store, ldm_folder, **fields):
    spec = store.parent / "spec.yaml"
    latents = {"model": str(ldm_folder), "size": 64, "keep_image": True, **fields}
    spec.write_text(json.dumps({"latents": latents}))
    folders = ["--store", str(store), "--spec", str(spec), "--metrics", str(store.parent / "run")]
    options = ["--actors", "0", "--batch", "1", "--decoders", "1"]
    command = ["encode", "--corpus", str(pattern), *folders, *options]
    return CliRunner().invoke(app, command)


def read_tasks(folder):
    """Return by tar's stem: the commit, its rows, and its arrays."""
    store = Store.open(str(folder))
    (layer,) = store.list_layers()
    tasks = {}
    for task, commit in store.newest_commits(layer.folder).items():
        group = zarr.open_group(folder / commit.data_folder / "arrays.zarr", mode="r")
        arrays = {name: array[:] for name, array in group.arrays()}
        tasks[task.rpartition("-")[0]] = (commit, store.read_index(commit).to_pylist(), arrays)
    return tasks


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Tars of every producer as they come, and each once more in our layout (``NAME_ours.tar``)."""
    folder = tmp_path_factory.mktemp("web")
    webs = {}
    for name, make in KINDS.items():
        webs[name] = make()
        webs[name].write(folder / f"{name}.tar")
    for path in GOLDEN.glob("*/*.tar"):
        name = f"{path.parent.name}_{path.stem}"
        shutil.copy(path, folder / f"{name}.tar")
        webs[name] = read_img2dataset(path)
    for name, web in webs.items():
        write_our_layout(folder / f"{name}_ours.tar", web.samples)
    return folder, webs


@pytest.fixture(scope="module")
def encoded(corpora, ldm_folder, tmp_path_factory):
    folder, _ = corpora
    store = tmp_path_factory.mktemp("web-store") / "store"
    result = encode(folder / "*.tar", store, ldm_folder, keep_json=["uid", "url"])
    assert result.exit_code == 0, result.output
    return result.output, read_tasks(store)


NAMES = [*KINDS, *(f"{path.parent.name}_{path.stem}" for path in sorted(GOLDEN.glob("*/*.tar")))]


@pytest.mark.parametrize("name", NAMES)
def test_latents_and_prompts_equal_those_of_our_own_layout(name, corpora, encoded):
    samples = corpora[1][name].samples
    _, rows, arrays = encoded[1][name]
    _, our_rows, our_arrays = encoded[1][f"{name}_ours"]
    assert [row["key"] for row in rows] == [*samples]
    for row, ours, (_, caption) in zip(rows, our_rows, samples.values(), strict=True):
        for array in ("latent_mean", "latent_logvar", "image"):
            found, expected = arrays[array], our_arrays[array]
            np.testing.assert_array_equal(found[row["latent_row"]], expected[ours["latent_row"]])
        assert row["image_sha256"] == ours["image_sha256"]
        assert row["phrase"] == caption
        assert (row["mask_row"], row["negative"], row["mask_area"]) == (None, False, None)
        if caption is None:
            assert (row["prompt"], row["text_row"]) == ("", 0)
        else:
            assert row["prompt"] == ours["prompt"] == f"a photo of a {caption}."
            found, expected = arrays["text"], our_arrays["text"]
            np.testing.assert_array_equal(found[row["text_row"]], expected[ours["text_row"]])


@pytest.mark.parametrize("name", NAMES)
def test_the_accounting_is_closed(name, corpora, encoded):
    web = corpora[1][name]
    commit, rows, _ = encoded[1][name]
    accounting = commit.accounting
    assert accounting.balanced
    assert accounting.stored_samples == len(web.samples) == len(rows)
    assert accounting.rejects == ({"bad_image": 1} if name.startswith("kept") else {})
    assert (accounting.rejected_members, accounting.rejected_pairs) == (0, 0)
    assert accounting.set_aside_members == web.num_set_aside


def test_what_is_odd_of_captions_and_pages_is_counted_and_told(encoded):
    output, tasks = encoded
    assert tasks["datacomp"][0].accounting.notes == {"cut_captions": 1, "cut_prompts": 1}
    assert tasks["captions"][0].accounting.notes == {"recoded_captions": 1}
    expected = {"cut_captions": 1, "cut_prompts": 1, "turned_images": 1}
    assert tasks["kept_00000"][0].accounting.notes == expected
    assert "4 captions cut at 1,000 characters" in output
    assert "1 caption with bytes" in output
    assert "rejected 1: bad_image" in output


def test_kept_columns_are_those_of_the_json(corpora, encoded):
    folder, _ = corpora
    for name in ("datacomp", "cc12m", "resized_00000000", "captions"):
        with tarfile.open(folder / f"{name}.tar") as tar:
            documents = {
                info.name.removesuffix(".json"): json.load(tar.extractfile(info))
                for info in tar
                if info.name.endswith(".json")
            }
        for row in encoded[1][name][1]:
            document = documents.get(row["key"], {})
            assert (row["uid"], row["url"]) == (document.get("uid"), document.get("url"))


def test_captions_may_stay_in_the_index_alone(corpora, encoded, ldm_folder, tmp_path):
    result = encode(corpora[0] / "datacomp.tar", tmp_path / "store", ldm_folder, text="none")
    assert result.exit_code == 0, result.output
    _, rows, arrays = read_tasks(tmp_path / "store")["datacomp"]
    _, stored_rows, stored = encoded[1]["datacomp"]
    assert len(arrays["text"]) == 1
    assert len(stored["text"]) == 1 + len({row["prompt"] for row in stored_rows} - {""})
    for row, other in zip(rows, stored_rows, strict=True):
        assert (row["phrase"], row["prompt"]) == (other["phrase"], other["prompt"])
        assert row["text_row"] == (0 if row["prompt"] == "" else None)
    np.testing.assert_array_equal(arrays["latent_mean"], stored["latent_mean"])


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:num_bytes])


def test_a_killed_download_is_a_failed_task_and_the_others_go_on(corpora, ldm_folder, tmp_path):
    """Cut within a picture, and between two members, where tar itself would notice nothing."""
    names = ("within", "between", "whole")
    for name in names:
        shutil.copy(corpora[0] / "cc12m.tar", tmp_path / f"{name}.tar")
    with tarfile.open(tmp_path / "whole.tar") as tar:
        middle = tar.getmembers()[3]
    cut(tmp_path / "within.tar", middle.offset_data + middle.size // 2)
    cut(tmp_path / "between.tar", middle.offset)
    result = encode(tmp_path / "*.tar", tmp_path / "store", ldm_folder)
    assert result.exit_code == 3
    for name in names:
        assert (f"{name}.tar" in result.output) == (name != "whole")
    assert list(read_tasks(tmp_path / "store")) == ["whole"]


def test_a_range_with_a_gap_names_the_shard_and_a_glob_takes_the_others(
    corpora, ldm_folder, tmp_path
):
    """As where some shards failed: nor does it matter that none has its ``_stats.json``."""
    for number in (0, 1, 3):
        shutil.copy(corpora[0] / "images.tar", tmp_path / f"0000{number}.tar")
    result = encode(tmp_path / "0000{0..3}.tar", tmp_path / "store", ldm_folder)
    assert result.exit_code == 2
    assert "00002.tar, found none; of a range with gaps, a glob (*.tar) takes" in result.output
    result = encode(tmp_path / "*.tar", tmp_path / "store", ldm_folder)
    assert result.exit_code == 0, result.output
    assert [*read_tasks(tmp_path / "store")] == ["00000", "00001", "00003"]
