"""A table kept in a store in a few immutable files, for what can be read or computed again.

A file is named by the digest of its content, so that writers of the same rows write one file, and a
damaged one is told by its name. The table is a cache: it may be deleted at any time, and nothing is
kept where the store may not be written.
"""

import hashlib
import io
import logging
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.interface import Storage

logger = logging.getLogger(__name__)
MAX_FILES = 16  # more than these are joined into one
_SUFFIX = ".table"  # Parquet: the first ldznet takes every *.parquet here for one of its own


class KeptTable:
    """The files ``FOLDER/<name>-<digest>.table``; ``name`` has the schema's version in it."""

    def __init__(self, storage: Storage, folder: str, name: str, schema: pa.Schema) -> None:
        self._storage, self._folder = storage, folder
        self._prefix, self._schema = f"{name}-", schema
        self._names: list[str] = []
        self._unkept = schema.empty_table()

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Return some columns of the rows that the sound files hold."""
        self._names, tables = self._read_files(columns)
        return pa.concat_tables([self._schema.empty_table().select(columns), *tables])

    def add(self, rows: pa.Table, *, at_least: int = 1) -> None:
        """Keep more rows, once ``at_least`` are there that no file holds."""
        self._unkept = pa.concat_tables([self._unkept, rows])
        if self._unkept.num_rows >= at_least:
            self._write()

    def _read_files(self, columns: Sequence[str]) -> tuple[list[str], list[pa.Table]]:
        names, tables = [], []
        try:
            listed = list(self._storage.list_names(self._folder))
        except OSError as error:
            logger.warning("%s: is not used, for it is a cache: %s", self._folder, error)
            return [], []
        for name in listed:
            if not (name.startswith(self._prefix) and name.endswith(_SUFFIX)):
                continue
            path = f"{self._folder}/{name}"
            try:
                data = self._storage.read(path)
            except FileNotFoundError:
                continue  # joined with others by another run meanwhile
            except OSError as error:
                logger.warning("%s: is not used, for it is a cache: %s", path, error)
                continue
            table = _parse(data, columns) if name == self._name_file(data) else None
            if table is not None:
                names.append(name)
                tables.append(table)
                continue
            logger.warning("%s: is damaged and not used; it is a cache, and is made anew", path)
            try:
                self._storage.remove_tree(path)  # or the same rows could not be written again
            except OSError as error:
                logger.info("%s: is not removed: %s", path, error)
        return names, tables

    def _write(self) -> None:
        """Write the rows that no file holds; with those of all files where there are many."""
        joined = len(self._names) >= MAX_FILES
        names, tables = self._read_files(self._schema.names) if joined else ([], [])
        rows = pa.concat_tables([self._unkept, *tables]).combine_chunks()
        buffer = io.BytesIO()
        pq.write_table(rows, buffer, compression="zstd", use_dictionary=False)
        data = buffer.getvalue()
        name = self._name_file(data)
        try:
            self._storage.write_content(f"{self._folder}/{name}", data)
            for old in set(names) - {name}:
                self._storage.remove_tree(f"{self._folder}/{old}")
        except OSError as error:  # a reader may have no right to write
            logger.info("%s: what was read of records is not kept: %s", self._folder, error)
        else:
            self._names = [name] if joined else [*self._names, name]
        self._unkept = self._schema.empty_table()

    def _name_file(self, data: bytes) -> str:
        return f"{self._prefix}{hashlib.sha256(data).hexdigest()[:16]}{_SUFFIX}"


def _parse(data: bytes, columns: Sequence[str]) -> pa.Table | None:
    """Return the columns of a file of the table, None where it is no such file."""
    try:
        return pq.read_table(io.BytesIO(data), columns=columns).select(columns)
    except (pa.ArrowException, OSError, KeyError):  # whatever pyarrow says of bytes not its own
        return None
