"""Arrays of a committed store encoded anew by zarr-python's codecs: the same values, or an error.

``encode_anew`` stands for another writer: it puts an array in its place and mends the record.
"""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
import zarr
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)

from pipeline.read.reader import PairReader
from pipeline.read.source import Source, choose_layers
from pipeline.store.commit import Commit, DamagedStoreError, seal_record
from pipeline.store.snapshot import create_snapshot
from pipeline.store.store import Store
from pipeline.upkeep.verify import verify_store

INPUTS = frozenset({"latent", "features"})
LITTLE, BIG = BytesCodec(endian="little"), BytesCodec(endian="big")
DRAWS = (0, 1, 1, 0, 1)


def sharding(codecs, index_codecs=(LITTLE, Crc32cCodec())):
    def make(shape):
        inner = (2, 1, *shape[2:])
        return (4, *shape[1:]), [
            ShardingCodec(chunk_shape=inner, codecs=codecs, index_codecs=index_codecs)
        ]

    return make


def plain(*codecs, rows=3):
    return lambda shape: ((rows, *shape[1:]), codecs)


def split_channels(shape):
    return (2, 1, shape[2] // 2, *shape[3:]), [LITTLE, ZstdCodec(level=1)]


def transposed(shape):
    order = TransposeCodec(order=tuple(reversed(range(len(shape)))))
    return (5, *shape[1:]), [order, LITTLE, GzipCodec(level=1)]


CODECS = {
    "bytes": plain(LITTLE),
    "big-endian": plain(BIG, rows=1),
    "crc": plain(LITTLE, Crc32cCodec()),
    "zstd": plain(LITTLE, ZstdCodec(level=3)),
    "gzip of transposed": transposed,
    "blosc": plain(LITTLE, BloscCodec(cname="lz4"), rows=2),
    "split channels": split_channels,
    "shards of zstd": sharding((LITTLE, ZstdCodec(level=3), Crc32cCodec())),
    "shards of big-endian without checksums": sharding((BIG,), (LITTLE,)),
}


@pytest.fixture
def folder(store_folder, tmp_path):
    return shutil.copytree(store_folder, tmp_path / "store", ignore=shutil.ignore_patterns("inv*"))


def open_reader(folder):
    store = Store.open(str(folder))
    latents, features = choose_layers(store, latents=None, features=None, reads_features=True)
    snapshot = create_snapshot(store, [latents.folder, features.folder])
    source = Source(store, latents, features, snapshot)
    return PairReader(source, tasks="*val*", inputs=INPUTS, blocks=(7,), num_threads=2)


def find_commit(folder):
    store = Store.open(str(folder))
    layer = next(layer for layer in store.list_layers() if layer.kind == "features")
    commits = store.newest_commits(layer.folder)
    return next(commit for task, commit in commits.items() if "val" in task)


def encode_anew(folder, make, *, name="block07", **changes):
    """Encode an array by other codecs; return the folder that holds it."""
    commit = find_commit(folder)
    group = folder / commit.data_folder / "arrays.zarr"
    values, old = zarr.open_array(group / name, mode="r")[:], json.loads(read(group / name))
    shutil.rmtree(group / name)
    chunks, codecs = make(values.shape)
    metadata = {
        **old,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "codecs": [codec.to_dict() for codec in codecs],
        **changes,
    }
    (group / name).mkdir()
    (group / name / "zarr.json").write_text(json.dumps(metadata))
    zarr.open_array(group / name, mode="r+")[:] = values
    mend_record(folder, commit, f"{name}/")
    return group / name


def read(array):
    return (array / "zarr.json").read_text()


def mend_record(folder, commit, part):
    data = folder / commit.data_folder
    plain = json.loads(commit.model_dump_json())
    plain["files"] = [file for file in plain["files"] if f"/{part}" not in file["path"]]
    for path in (path for path in data.rglob("*") if path.is_file() and f"/{part}" in str(path)):
        content = path.read_bytes()
        plain["files"].append(
            {
                "path": str(path.relative_to(folder / commit.layer)),
                "num_bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    record = Commit.model_validate(plain)
    (folder / record.name).write_bytes(seal_record(record.model_dump_json(indent=1).encode()))


@pytest.mark.parametrize("name", CODECS)
def test_any_codecs_read_the_same_and_damage_is_an_error(folder, name):
    numbers = [5, 0, 3, 3, 1]
    expected = open_reader(folder).read(numbers, draws=DRAWS)
    array = encode_anew(folder, CODECS[name])
    batch = open_reader(folder).read(numbers, draws=DRAWS)
    assert torch.equal(batch.inputs["features"][7], expected.inputs["features"][7])
    assert torch.equal(batch.inputs["latent"], expected.inputs["latent"])
    paths = sorted(path for path in (array / "c").rglob("*") if path.is_file())
    for path in paths:
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 0x10
        path.write_bytes(data)
    reader = open_reader(folder)
    every = range(len(reader))
    with pytest.raises(DamagedStoreError, match=r"block07/c/.*row \d+, split [01]: "):
        reader.read([*every, *every], draws=[0] * len(every) + [1] * len(every))
    for path in paths:
        path.unlink()
    with pytest.raises(DamagedStoreError, match=r"block07/c/.*row \d+, split 0: .* is missing"):
        open_reader(folder).read(every, draws=[0] * len(every))


def find_damage(folder):
    return [damage for check in verify_store(Store.open(str(folder))) for damage in check.damage]


@pytest.mark.parametrize("name", CODECS)
def test_verifying_takes_any_codecs_files_as_sound_and_names_what_they_lack(folder, name):
    array = encode_anew(folder, CODECS[name])
    assert find_damage(folder) == []
    left_out = max(path for path in (array / "c").rglob("*") if path.is_file())
    left_out.unlink()
    mend_record(folder, find_commit(folder), "block07/")
    (damage,) = find_damage(folder)
    assert damage.what == "the commit record does not list it"
    assert damage.path == str(left_out.relative_to(folder))


@pytest.mark.parametrize("separator", ["/", "."])
@pytest.mark.parametrize("encoding", ["default", "v2"])
def test_chunks_may_have_other_names(folder, encoding, separator):
    expected = open_reader(folder).read([0, 1], draws=[0, 0])
    keys = {"name": encoding, "configuration": {"separator": separator}}
    encode_anew(folder, CODECS["shards of zstd"], chunk_key_encoding=keys)
    batch = open_reader(folder).read([0, 1], draws=[0, 0])
    assert torch.equal(batch.inputs["features"][7], expected.inputs["features"][7])
    assert find_damage(folder) == []


def test_files_without_checksums_need_their_digests(folder):
    encode_anew(folder, CODECS["zstd"])
    store, commit = Store.open(str(folder)), find_commit(folder)
    array = store.open_array(store.read_layer(commit.layer), commit, "block07")
    array.hold_to(commit.layer, [])
    with pytest.raises(DamagedStoreError, match="no checksum, and it is not among the files"):
        array.read_row(0)
    array.hold_to(commit.layer, commit.files)
    assert np.isfinite(array.read_row(0)).all()
    assert [array.find_index_fault(number) for number in range(array.num_shards)] == [
        None
    ] * array.num_shards


def test_a_chunk_that_a_sound_shard_lacks_is_an_error(folder):
    """Its writer left it out, as zarr-python does with chunks of the fill value alone."""
    array = encode_anew(folder, CODECS["shards of zstd"])
    stored = zarr.open_array(array, mode="r+", config={"write_empty_chunks": False})
    stored[2] = np.nan
    mend_record(folder, find_commit(folder), "block07/")
    reader = open_reader(folder)
    reader.read([0, 1, 3], draws=[0] * 3)
    with pytest.raises(DamagedStoreError, match="row 2, split 1: the chunk is missing"):
        reader.read([0, 1, 2, 3], draws=[1] * 4)


@pytest.mark.parametrize(
    "codec",
    [
        {"name": "rot13"},
        {"name": "bytes", "configuration": {"endian": "middle"}},
        {"name": "zstd", "configuration": {"level": "high"}},
    ],
)
def test_codecs_that_zarr_does_not_know_are_refused(folder, codec):
    array = encode_anew(folder, CODECS["bytes"])
    metadata = json.loads(read(array))
    metadata["codecs"] = [codec]
    (array / "zarr.json").write_text(json.dumps(metadata))
    mend_record(folder, find_commit(folder), "block07/")
    with pytest.raises(DamagedStoreError, match=r"block07/zarr\.json: zarr-python .* does not"):
        open_reader(folder).read([0], draws=[0])


def test_another_fill_value_is_refused(folder):
    """One that can be data would hide what is missing."""
    array = encode_anew(folder, CODECS["zstd"])
    metadata = json.loads(read(array))
    metadata["fill_value"] = 0.0
    (array / "zarr.json").write_text(json.dumps(metadata))
    mend_record(folder, find_commit(folder), "block07/")
    with pytest.raises(DamagedStoreError, match=r'expected \{"fill_value": "NaN"\}, got'):
        open_reader(folder).read([0], draws=[0])


def test_masks_of_other_codecs_read_too(folder):
    expected = open_reader(folder).read_masks([4, 0])
    store = Store.open(str(folder))
    layer = next(layer for layer in store.list_layers() if layer.kind == "latents")
    commits = store.newest_commits(layer.folder)
    commit = next(commit for task, commit in commits.items() if "val" in task)
    path = folder / commit.data_folder / "arrays.zarr" / "mask"
    values, metadata = zarr.open_array(path, mode="r")[:], json.loads(read(path))
    metadata["codecs"] = [{"name": "bytes"}, BloscCodec().to_dict()]
    shutil.rmtree(path)
    path.mkdir()
    (path / "zarr.json").write_text(json.dumps(metadata))
    zarr.open_array(path, mode="r+")[:] = values
    mend_record(folder, commit, "mask/")
    assert torch.equal(open_reader(folder).read_masks([4, 0]), expected)
