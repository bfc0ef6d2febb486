"""A store: its layers, and what is committed in each.

Reading starts from commit records: ``newest_commits`` of a layer, then a task's index and arrays.
"""

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline.base.job_copy import outlive_job
from pipeline.base.progress_text import make_printable
from pipeline.base.yaml import SpecError
from pipeline.spec.fields import DEFAULT_SPLIT_BYTES, GIB
from pipeline.spec.layer import SCHEMA_VERSION, LayerSpec
from pipeline.storage.interface import Storage
from pipeline.storage.open import open_storage
from pipeline.store.array_reader import ShardedArray
from pipeline.store.commit import Commit, DamagedStoreError, list_records, read_commit
from pipeline.store.layout import (
    FIRST_COLUMNS,
    FIRST_REJECTS,
    GROUP,
    INDEX,
    REJECTS,
    REJECTS_SCHEMA,
    ROWS_OF_DIMENSION,
    complete_index,
    complete_rejects,
    list_arrays,
)
from pipeline.store.read_many import read_many

logger = logging.getLogger(__name__)
_RECORDS_AT_ONCE = 1024
_LAYER = re.compile(r"(latents|features)-[0-9a-f]{16}")
_LOOKED_INTO = 32  # names in a folder that is no store, to find one
_LEVELS = 6  # folders above it: STORE/layer/data/task/attempt/arrays.zarr


class MissingStoreError(DamagedStoreError):
    """A store or a layer that was being read is not there any more, or not on this node."""


class Store:
    """The layers of one store. Opening reads nothing."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @classmethod
    def open(cls, url: str) -> "Store":
        """Open the store at a path, ``file://`` or ``s3://`` URL, which need not exist yet."""
        return cls(open_storage(url))

    def add_layer(self, layer: LayerSpec) -> None:
        """Write a layer's ``spec.json`` unless it is there already.

        A model in a Ray job's copy of the project is recorded by its path from the current folder:
        the copy is gone when the layer is read.

        Raises:
            SpecError: another spec is there under the same fingerprint, or one that splits tars
                otherwise.
        """
        model = outlive_job(layer.source["model"])
        recorded = layer.model_copy(update={"source": {**layer.source, "model": model}})
        data = recorded.model_dump_json(indent=1).encode()
        path = f"{layer.folder}/spec.json"
        # Asked for first: a store that may only be read has it, and nothing is to be written.
        if not self.storage.exists(path) and self.storage.create(path, data):
            if recorded.source != layer.source and layer.kind == "latents":
                logger.warning(
                    "%s: its model lies in this job's copy of the project, which Ray deletes, and "
                    "is recorded as %s; who opens the layer later must have it there below the "
                    "current folder, or name it (head.model, segment --model). A hub id or a URL "
                    "would hold everywhere",
                    *(layer.folder, model),
                )
            return
        there = self.read_layer(layer.folder)
        if there.canonical != layer.canonical:
            raise SpecError(f"{layer.folder}/spec.json: another spec has this fingerprint")
        if there.split_bytes != layer.split_bytes:  # a run beside this one was first
            raise _split_error(layer.folder, layer.split_bytes, there.split_bytes)

    def adopt_split(self, layer: LayerSpec, *, split_bytes: int | None = None) -> LayerSpec:
        """Return a latents layer with the ``split_bytes`` that its tars have in this store.

        Where the layer is not there yet that is the one given, by default 1 GiB. Writes nothing.

        Raises:
            SpecError: the layer is there and splits otherwise than given.
            DamagedStoreError: as ``read_layer``.
        """
        if self.storage.exists(f"{layer.folder}/spec.json"):
            there = self.read_layer(layer.folder).split_bytes
            if split_bytes not in (None, there):
                raise _split_error(layer.folder, split_bytes, there)
        else:
            there = split_bytes or DEFAULT_SPLIT_BYTES
        return layer.model_copy(update={"split_bytes": there})

    def read_layer(self, folder: str) -> LayerSpec:
        """Read a layer's spec.

        Raises:
            SpecError: no such layer, or one of a later version of ldznet.
            DamagedStoreError: the file is not a layer's spec.
        """
        path = f"{folder}/spec.json"
        try:
            data = json.loads(self.storage.read(path))
            version = int(data["schema_version"])
        except FileNotFoundError as error:
            raise SpecError(f"{self.storage.url}: expected a layer {folder!r}, got none") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedStoreError(f"{path}: is not a layer's spec: {error!r}") from error
        check_version(f"{self.storage.url}/{path}", version)
        try:
            layer = LayerSpec.model_validate(data)
        except ValidationError as error:
            raise DamagedStoreError(f"{path}: is not a layer's spec: {error}") from error
        if layer.folder != folder:
            raise DamagedStoreError(f"{path}: is the spec of {layer.folder}")
        return layer

    def list_layers(self, *, required: bool = False) -> list[LayerSpec]:
        """Return every layer's spec, latents layers first.

        Raises:
            SpecError, DamagedStoreError: as ``read_layer``; a layer with commits has no spec; one
                is ``required`` and there is none.
        """
        layers, names = [], sorted(self.storage.list_names())
        for name in names:
            if not name.startswith(("latents-", "features-")):
                continue
            if self.storage.exists(f"{name}/spec.json"):
                layers.append(self.read_layer(name))
            elif any(True for _ in self.storage.list_names(f"{name}/commits")):
                raise DamagedStoreError(
                    f"{name}/spec.json: is missing, but the layer has commits; run encode with "
                    "its spec again to write it anew"
                )
        if required and not layers:
            where = self.storage.url
            raise SpecError(f"{where}: expected a store, {_describe_other(where, names)}")
        return sorted(layers, key=lambda layer: (layer.kind != "latents", layer.folder))

    def check_there(self, layer: str) -> None:
        """Check that a layer is still there, for who misses a file of it.

        Raises:
            MissingStoreError: it is gone; says whether the store is.
        """
        if not self.storage.exists(f"{layer}/spec.json"):
            try:
                self.list_layers(required=True)
                what = f"{self.storage.url}: expected the layer {layer}, which was there, got none"
            except SpecError as error:
                what = str(error).split("; give")[0]
            raise MissingStoreError(
                f"{what}, as {os.uname().nodename} sees it. Was it moved, removed or unmounted, or "
                "is it not on every node? Bring it back and run this again, train with --resume"
            )

    def newest_commits(self, layer: str) -> dict[str, Commit]:
        """Return task → its newest commit in a layer, sorted by task, without retired ones."""
        return {commit.task: commit for commit in self.read_commits(layer)}

    def read_commits(self, layer: str) -> Iterator[Commit]:
        """Yield the newest commit of every task of a layer that is not retired, sorted by task.

        Few are held at once: a record of 40 files takes 30 KB of memory.
        """
        newest = list_records(self.storage, layer)
        records = [newest[task] for task in sorted(newest)]
        read = partial(read_commit, self.storage, layer)
        for commits in read_many(read, records, at_once=_RECORDS_AT_ONCE):
            yield from (commit for commit in commits if commit.status == "stored")

    def read_index(self, commit: Commit) -> pa.Table:
        """Return a latents commit's ``index.parquet`` with all columns, a row a pair.

        Raises:
            DamagedStoreError: the file is missing, altered or has another number of rows.
        """
        table = self.read_parquet(commit, INDEX)
        if table.num_rows != commit.rows["pairs"]:
            raise DamagedStoreError(
                f"{commit.data_folder}/{INDEX}: expected {commit.rows['pairs']} rows, "
                f"got {table.num_rows}"
            )
        first = commit.has_first_files and table.column_names == FIRST_COLUMNS
        return complete_index(table) if first else table

    def read_rejects(self, commit: Commit) -> pa.Table:
        """Return a latents commit's ``rejects.parquet`` with all columns, a row a reject.

        Raises:
            DamagedStoreError: the file is missing, altered or no table of rejects.
        """
        path = f"{commit.data_folder}/{REJECTS}"
        try:
            table = self.read_parquet(commit, REJECTS)
        except pa.ArrowException as error:
            raise DamagedStoreError(f"{path}: is no Parquet file: {error}") from error
        if commit.has_first_files and table.column_names == FIRST_REJECTS:
            table = complete_rejects(table)
        if not table.schema.equals(REJECTS_SCHEMA):
            raise DamagedStoreError(f"{path}: has other columns than this schema version's")
        return table

    def read_parquet(self, commit: Commit, name: str) -> pa.Table:
        """Return one of a commit's Parquet files, its SHA-256 checked."""
        return pq.read_table(io.BytesIO(self._read_committed(commit, name)))

    def _read_committed(self, commit: Commit, name: str) -> bytes:
        path = f"{commit.data_folder}/{name}"
        listed = {f"{commit.layer}/{file.path}": file for file in commit.files}
        try:
            data = self.storage.read(path)
        except FileNotFoundError as error:
            raise DamagedStoreError(f"{path}: a committed file is missing") from error
        if path not in listed or hashlib.sha256(data).hexdigest() != listed[path].sha256:
            raise DamagedStoreError(f"{path}: SHA-256 is not the one committed")
        return data

    def open_array(self, layer: LayerSpec, commit: Commit, name: str) -> ShardedArray:
        """Open one of a commit's arrays.

        Raises:
            SpecError: the task has no array of this name; lists those it has.
            DamagedStoreError: the array's metadata are not those committed, or not the spec's.
        """
        kinds = list_arrays(layer, commit.rows)
        if name not in kinds:
            raise SpecError(f"{commit.name}: holds no array {name!r}, only {', '.join(kinds)}")
        num_rows = commit.rows[ROWS_OF_DIMENSION[kinds[name].dimensions[0]]]
        kind = kinds[name].as_first() if commit.has_first_files else kinds[name]
        metadata = self._read_committed(commit, f"{GROUP}/{name}/zarr.json")
        folder = f"{commit.data_folder}/{GROUP}/{name}"
        return ShardedArray(self.storage, folder, kind, num_rows=num_rows, metadata=metadata)


def _describe_other(url: str, names: Sequence[str]) -> str:
    """Return what a folder with these names in it is, if it is no store, and what to do."""
    held = "nothing is there"
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        held = f"it holds {make_printable(', '.join(names[:3]))}{more}"
    near = _find_near(url, names)
    hint = (
        f"did you mean {near}?" if near else "give the folder or URL that encode --store was given"
    )
    return f"found no layer there: {held}; {hint}"


def _find_near(url: str, names: Sequence[str]) -> str | None:
    """Return the store that is in a folder of these names or above it, None where none is."""
    above = [url.rsplit("/", number)[0] for number in range(1, _LEVELS)]
    for near in (*(f"{url}/{name}" for name in names[:_LOOKED_INTO]), *above):
        with suppress(ValueError, OSError):  # no folder, or none of ours: it is a hint alone
            if any(map(_LAYER.fullmatch, open_storage(near).list_names())):
                return near
    return None


def _split_error(folder: str, asked: int | None, there: int | None) -> SpecError:
    says = [
        "no split" if num_bytes is None else f"{num_bytes / GIB:g} GiB ({num_bytes} bytes)"
        for num_bytes in (asked, there)
    ]
    return SpecError(
        f"{folder}: expected tars split as the layer has them, {says[1]}, got {says[0]}; one rule "
        "holds for all of a layer, or a tar would be encoded twice: run again without --split-gb"
    )


def check_version(where: str, version: int) -> None:
    """Raise SpecError where something was written by a later version of ldznet than this."""
    if version > SCHEMA_VERSION:
        raise SpecError(
            f"{where}: has schema version {version}, this ldznet reads up to {SCHEMA_VERSION}; "
            "install a later one"
        )
