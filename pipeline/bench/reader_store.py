"""A store of random features at real sizes, and a plain file with the same chunks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.bench.store import make_layer
from pipeline.read.source import Source, open_layers
from pipeline.spec.fields import FeaturesSpec, LatentsSpec
from pipeline.storage.interface import Storage
from pipeline.storage.local import LocalStorage
from pipeline.store.attempt import Attempt
from pipeline.store.commit import record_path, seal_record, unseal_record
from pipeline.store.layout import INDEX_SCHEMA, block_name, features_row_shapes, latents_row_shapes
from pipeline.store.snapshot import create_snapshot
from pipeline.store.store import Store

BLOCKS = (6, 7, 8, 9, 10)
BLOCK_SHAPE = (1280, 12, 12)  # SD 1.4's blocks 6-8 at 384 px
CHUNK_BYTES = int(np.prod(BLOCK_SHAPE)) * 2
TINY_BLOCK = (16, 8, 8)
_TEXT_SHAPE, _TINY_TEXT = (77, 768), (4, 8)
_NO_DIGEST = "0" * 64


def write_reader_store(
    storage: Storage,
    *,
    num_tasks: int,
    task_pairs: int,
    size: int = 64,
    block_shape: tuple[int, int, int] = BLOCK_SHAPE,
    text_shape: tuple[int, int] = _TEXT_SHAPE,
) -> Source:
    """Write tasks of random features: one draw, blocks 6 to 10, each ``block_shape`` float16.

    Latents and masks are those of views of ``size`` px: small, for they are read too.
    """
    latents = make_layer(LatentsSpec(model="none", size=size), scaling_factor=1.0, text_pooled=None)
    features = make_layer(
        FeaturesSpec(blocks=BLOCKS, timesteps=(400,)), latents=latents.fingerprint
    )
    store = Store(storage)
    for layer in (latents, features):
        store.add_layer(layer)
    rng = np.random.default_rng(0)
    for number in range(num_tasks):
        task = f"bench-{number:05d}-{number:08x}"
        rows = {"pairs": task_pairs, "views": task_pairs, "prompts": task_pairs}
        with Attempt(storage, latents, task, generation=0) as attempt:
            shapes = latents_row_shapes(latents.latents, num_channels=4, text_shape=text_shape)
            for name, writer in attempt.open_arrays(shapes).items():
                values = rng.integers(0, 2, (task_pairs, *shapes[name]))
                writer.append_rows(values.astype(writer.schema.dtype))
            attempt.write_table("index.parquet", _make_index(task, task_pairs))
            attempt.write_table("rejects.parquet", pa.table({"name": pa.array([], pa.string())}))
            attempt.commit(rows=rows, pairs_sha256=_NO_DIGEST, provenance={})
        with Attempt(storage, features, task, generation=0) as attempt:
            shapes = features_row_shapes(features.features, dict.fromkeys(BLOCKS, block_shape))
            arrays = attempt.open_arrays(shapes)
            arrays["timestep"].append_rows(np.full((task_pairs, 1), 400, np.int16))
            for _ in range(task_pairs):
                for block in BLOCKS:
                    arrays[block_name(block)].append_chunks(make_chunk(rng, block_shape)[None])
            attempt.commit(rows=rows, pairs_sha256=_NO_DIGEST, provenance={}, latents_generation=0)
    return open_layers(store, write=True)


def write_tiny_tasks(storage: LocalStorage, *, num_tasks: int, task_pairs: int) -> Source:
    """Write one task, and the others as links to its folder with records of their own."""
    source = write_reader_store(
        storage, num_tasks=1, task_pairs=task_pairs, block_shape=TINY_BLOCK, text_shape=_TINY_TEXT
    )
    for layer, (record,) in source.snapshot.records.items():
        first = storage.local_path(f"{layer}/data/{record.task}")
        data = unseal_record(storage.read(record_path(layer, record.task, record.generation)))
        for number in range(1, num_tasks):
            task = f"copy-{number:06d}"
            first.with_name(task).symlink_to(first.name)
            path = storage.local_path(record_path(layer, task, record.generation))
            path.write_bytes(seal_record(data.replace(record.task.encode(), task.encode())))
    return replace(source, snapshot=create_snapshot(source.store, source.snapshot.records))


def make_chunk(rng: np.random.Generator, shape: tuple[int, int, int] = BLOCK_SHAPE) -> np.ndarray:
    """Return random float16 features of one block and draw."""
    return rng.standard_normal(shape, np.float32).astype(np.float16)


def _make_index(task: str, num: int) -> pa.Table:
    rows = [
        {
            **dict.fromkeys(("latent_row", "text_row", "mask_row"), row),
            **dict.fromkeys(("view", "instance"), 0),
            "key": f"{task}-{row:06d}",
            "phrase": "circle",
            "prompt": "a photo of a circle.",
            "mask_area": 0.5,
        }
        for row in range(num)
    ]
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


def write_plain_file(source: Source, path: Path) -> None:
    """Write all chunks of the features to one file, pair by pair and block by block."""
    assert source.features is not None
    commits = source.store.newest_commits(source.features.folder)
    with path.open("wb") as file:
        for commit in commits.values():
            arrays = [
                source.store.open_array(source.features, commit, block_name(block))
                for block in BLOCKS
            ]
            for row in range(commit.rows["pairs"]):
                for array in arrays:
                    file.write(array.read_rows([row]).tobytes())
