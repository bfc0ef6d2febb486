"""One writer's try at one task of one layer: open arrays, write tables, commit or abandon."""

import io
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.failpoints import pass_step
from pipeline.base.machine import name_hardware
from pipeline.spec.layer import LayerSpec
from pipeline.storage.interface import Storage, remove_leftovers
from pipeline.store.array_writer import ArrayWriter, WrittenFile, write_bytes, write_group
from pipeline.store.commit import (
    Accounting,
    Commit,
    DamagedStoreError,
    new_attempt,
    record_path,
    to_committed,
    verify_written,
    write_commit,
)
from pipeline.store.layout import GROUP, list_arrays

if TYPE_CHECKING:  # a writer of arrays alone needs no diffusers, which takes seconds to import
    from models.ldm.encoders import FeatureEncoder, LatentEncoder

_LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow", "pyarrow")


class Attempt:
    """Writes a task's files under a fresh name; nobody reads them before ``commit``.

    As a context manager, or by ``abandon``, it removes its own files again unless it came as far as
    the commit record: from there on only ``gc`` may tell whether they are orphans.
    """

    def __init__(self, storage: Storage, layer: LayerSpec, task: str, *, generation: int) -> None:
        self.layer = layer
        self.task = task
        self.generation = generation
        self.name = new_attempt(generation)
        self._storage = storage
        self._folder = f"{layer.folder}/data/{task}/{self.name}"
        self._tables: list[WrittenFile] = []
        self._reached_commit = False
        self._arrays: dict[str, ArrayWriter] = {}

    def open_arrays(
        self, row_shapes: Mapping[str, tuple[int, ...]], rows: Mapping[str, int] | None = None
    ) -> dict[str, ArrayWriter]:
        """Open a writer for each of the layer's arrays (``list_arrays``) that has none yet."""
        pass_step("attempt.opened", self._folder)
        group = f"{self._folder}/{GROUP}"
        for name, kind in list_arrays(self.layer, rows).items():
            if name not in self._arrays:
                schema = kind.schema(name, row_shapes[name])
                self._arrays[name] = ArrayWriter(self._storage, group, schema)
        return self._arrays

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file beside the arrays."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        path = f"{self._folder}/{name}"
        self._tables.append(write_bytes(self._storage, path, buffer.getvalue()))

    def commit(
        self, *, accounting: Accounting | None = None, **fields: Any
    ) -> tuple[Commit, Literal["won", "lost"]]:
        """Flush, read everything back, and publish the attempt; tell who won.

        ``fields`` are those of the ``Commit`` that the attempt does not know itself.

        Raises:
            DamagedStoreError: the storage did not give back what was written.
            OSError: the storage failed; nothing was committed.
        """
        assert accounting is None or accounting.balanced, f"samples got lost: {accounting}"
        files = [file for writer in self._arrays.values() for file in writer.close()]
        files += self._tables
        files.append(write_group(self._storage, f"{self._folder}/{GROUP}"))
        pass_step("arrays.closed", self._folder)
        self._storage.sync_folders(self._folder)
        pass_step("folders.synced", self._folder)
        self._verify(files)
        pass_step("files.verified", self._folder)
        commit = Commit(
            layer=self.layer.folder,
            task=self.task,
            generation=self.generation,
            attempt=self.name,
            accounting=accounting,
            files=to_committed(self.layer.folder, files),
            **fields,
        )
        self._reached_commit = True
        return commit, write_commit(self._storage, commit)

    def _verify(self, files: list[WrittenFile]) -> None:
        """Read everything back; a race that is lost already is left to the record to tell.

        Once another writer's record is there, ``gc`` may have taken what this attempt wrote.
        """
        try:
            verify_written(self._storage, files)
        except (DamagedStoreError, FileNotFoundError):
            record = record_path(self.layer.folder, self.task, self.generation)
            if not self._storage.exists(record):
                raise

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, *error: object) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Let go of what is open; see the class for what is removed."""
        for writer in self._arrays.values():
            writer.abandon()
        if not self._reached_commit:
            remove_leftovers(self._storage, self._folder)


def describe_provenance(
    encoder: "LatentEncoder | FeatureEncoder", *, batch: int, run: str
) -> dict[str, Any]:
    """Return what a commit records beside its values: libraries, hardware, run options, the run."""
    device = encoder.device
    return {
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "device": f"{device.type}: {name_hardware(device)}",
        "batch": batch,
        "run": run,
        **asdict(encoder.tuning),
    }
