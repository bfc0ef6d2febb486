"""Parquet files that hold images: Hugging Face's (``{bytes, path}``) and img2dataset's (binary).

A key is the number of the file, in sorted order, and that of the row. A file's row group is read a
few rows at a time, once an image in it is asked for; a page of it must fit into memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import has_magic

from pipeline.base.remote_copy import as_oserror, open_filesystem
from pipeline.base.secrets import find_url_fault
from pipeline.ingest.sample import IngestError, Listing, Phrase, Sample
from pipeline.store.read_many import read_many

_AT_ONCE = 1024
_BATCH_ROWS = 16
_BUFFER_BYTES = 1024 * 1024
_ADVICE = (
    "the pictures are not in the file: fetch them with img2dataset, or write the file with them "
    "(Hugging Face's datasets: push_to_hub, or map(embed_table_storage) before to_parquet)"
)


def list_parquet(files: Sequence[str], *, image: str, text: str | None) -> Listing:
    """List the rows of files, paths or fsspec URLs with or without globs, as images.

    Raises:
        ValueError: nothing matches, or a file is no Parquet or lacks a column of the right type.
        OSError: a file cannot be read.
    """
    urls = sorted({url for pattern in files for url in _match(pattern)})
    columns = [image] if text is None else [image, text]
    parts = read_many(lambda url: _count_rows(url, image, text), urls, at_once=_AT_ONCE)
    counts = [number for part in parts for number in part]

    def list_recipes() -> Iterator[ParquetRecipe]:
        for number, (url, num_rows) in enumerate(zip(urls, counts, strict=True)):
            table = _Table(url, columns)
            for row in range(num_rows):
                yield ParquetRecipe(f"{number:05d}-{row:09d}", table, row)

    return Listing(list_recipes(), "images", listed={"images": sum(counts), "files": len(urls)})


class _Table:
    """Some columns of a file, read from the start of a row group onwards."""

    def __init__(self, url: str, columns: Sequence[str]) -> None:
        self._url, self._columns = url, columns
        self._file: pq.ParquetFile | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._group, self._first = -1, 0  # of the batch at hand
        self._batch: list[dict[str, Any]] = []
        self._end = 0  # of the row group that is read
        self._damaged = range(0)

    def read(self, row: int) -> list[Any]:
        """Return a row's columns; fast for the row after the last one.

        Raises:
            IngestError: the row's group is damaged, from this row on or from one before.
        """
        if row in self._damaged:
            raise IngestError("damaged_file", f"{self._url}: its row group cannot be read")
        with as_oserror(self._url):
            if not self._first <= row < self._first + len(self._batch):
                try:
                    self._seek(row)
                except (pa.ArrowException, OSError) as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise  # of the storage
                    self._damaged = range(row, self._end)
                    self._group, self._batch = -1, []
                    raise IngestError("damaged_file", f"{self._url}: {error}") from error
        return [self._batch[row - self._first][name] for name in self._columns]

    def _seek(self, row: int) -> None:
        self._file = self._file or _open(self._url)
        metadata, group, start = self._file.metadata, 0, 0
        while row >= start + metadata.row_group(group).num_rows:
            start += metadata.row_group(group).num_rows
            group += 1
        self._end = start + metadata.row_group(group).num_rows
        if group != self._group or row < self._first:
            self._batches = self._file.iter_batches(
                _BATCH_ROWS, row_groups=[group], columns=list(self._columns), use_threads=False
            )
            self._group, self._first, self._batch = group, start, []
        while row >= self._first + len(self._batch):
            self._first += len(self._batch)
            self._batch = next(self._batches).to_pylist()


@dataclass(frozen=True, slots=True)
class ParquetRecipe:
    """A row."""

    key: str
    table: _Table
    row: int

    def build(self) -> Sample:
        """Read the row.

        Raises:
            IngestError: it has no image's bytes.
        """
        image, *texts = self.table.read(self.row)
        data = image.get("bytes") if isinstance(image, dict) else image
        if not data:
            path = image.get("path") if isinstance(image, dict) else None
            got = f"the path {path!r} alone; {_ADVICE}" if path else "null"
            raise IngestError("no_bytes", f"expected an image's bytes, got {got}")
        phrases = [text for text in _flatten(texts) if text.strip()]
        return Sample(data, tuple(map(Phrase, phrases)))


def _flatten(texts: Any) -> list[str]:
    """Return the strings of nested lists, without nulls."""
    if isinstance(texts, list):
        return [text for inner in texts for text in _flatten(inner)]
    return [] if texts is None else [texts]


def _match(pattern: str) -> list[str]:
    """Return the URLs of what a path or URL matches."""
    if fault := find_url_fault(pattern):
        raise ValueError(f"ingest parquet: {fault}")
    filesystem, path = open_filesystem(pattern)
    with as_oserror(pattern):
        if filesystem.isdir(path):
            found = filesystem.glob(f"{path.rstrip('/')}/*.parquet")
        elif filesystem.exists(path):
            found = [path]  # a name such as x[1].parquet is meant as it stands
        else:
            found = filesystem.glob(path) if has_magic(path) else []
    if not found:
        raise ValueError(f"ingest parquet: expected at least one file at {pattern}, found none")
    return [filesystem.unstrip_protocol(one) for one in found]


def _open(url: str) -> pq.ParquetFile:
    filesystem, path = open_filesystem(url)
    try:
        return pq.ParquetFile(filesystem.open(path), buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{url}: expected a Parquet file: {error}") from error


def _count_rows(url: str, image: str, text: str | None) -> int:
    """Return a file's number of rows; ValueError if its columns are not of images and texts."""
    with as_oserror(url), _open(url) as file:
        schema = file.schema_arrow
        for name in (image, text):
            if name is not None and name not in schema.names:
                raise ValueError(f"{url}: expected a column {name}, got {', '.join(schema.names)}")
        kind = schema.field(image).type
        inner = kind.field("bytes").type if _is_struct_of(kind, "bytes") else kind
        if not _is_any(inner, "is_binary", "is_large_binary", "is_binary_view", "is_null"):
            advice = f"; {_ADVICE}" if _is_any(inner, *_STRINGS) else ""
            raise ValueError(f"{url}: expected bytes in column {image}, got {kind}{advice}")
        if text is not None and not _holds_text(schema.field(text).type):
            got = schema.field(text).type
            raise ValueError(f"{url}: expected text or lists of it in column {text}, got {got}")
        return int(file.metadata.num_rows)


_STRINGS = ("is_string", "is_large_string", "is_string_view")


def _is_any(kind: pa.DataType, *names: str) -> bool:
    return any(getattr(pa.types, name)(kind) for name in names)


def _is_struct_of(kind: pa.DataType, name: str) -> bool:
    return _is_any(kind, "is_struct") and kind.get_field_index(name) >= 0


def _holds_text(kind: pa.DataType) -> bool:
    while _is_any(kind, "is_list", "is_large_list", "is_fixed_size_list", "is_dictionary"):
        kind = kind.value_type
    return _is_any(kind, *_STRINGS, "is_null")
