"""An array that another writer encoded: whatever zarr-python decodes, some ten times slower.

Data flow: ``zarr.json`` as committed -> zarr-python's codecs, over the store's own reads -> values.
A missing file, or a chunk of nothing but the fill value, which our data never are, is an error.
Where the codecs have no CRC-32C, every file is read whole and held to its committed SHA-256.
"""

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype

from pipeline.storage.interface import Storage
from pipeline.store.array_writer import ArraySchema
from pipeline.store.commit import DamagedStoreError

_METADATA = "zarr.json"


class ForeignArray:
    """The rows of an array by zarr-python. Threads may share it."""

    def __init__(
        self, storage: Storage, folder: str, schema: ArraySchema, metadata: bytes, fill_value: Any
    ) -> None:
        self._folder = folder
        self._schema = schema
        self._fill = np.array(fill_value, schema.dtype)
        self._files = _CommittedFiles(storage, folder, metadata)
        try:
            self._array = zarr.open_array(self._files, mode="r", zarr_format=3)
            self._chunks = self._array.chunks  # of a file with sharding: the inner ones
        except Exception as error:  # whatever a codec of anyone's refuses its configuration by
            raise DamagedStoreError(
                f"{folder}/{_METADATA}: zarr-python {zarr.__version__} does not read it: {error}"
            ) from error
        self._files.checks_itself = _has_checksums(self._array.metadata.to_dict()["codecs"])

    def hold_to(self, digests: Mapping[str, str]) -> None:
        """Take the SHA-256 (hex) of the committed files, by path in the store."""
        self._files.digests = digests

    def read_chunks(self, rows: Sequence[int], splits: Sequence[int]) -> np.ndarray:
        """Return (n, *chunk_values_shape): rows, or an entry of each where rows are cut.

        Raises:
            DamagedStoreError: missing or damaged; names file, row and split.
        """
        found = np.empty((len(rows), *self._schema.chunk_values_shape), self._schema.dtype)
        for split in sorted(set(splits)):
            places = [place for place, there in enumerate(splits) if there == split]
            wanted, of_place = np.unique([rows[place] for place in places], return_inverse=True)
            try:
                values = self._select(wanted.tolist(), split)
            except Exception:  # noqa: BLE001 - a codec's, of any type: whose row, is looked for
                values = np.stack([self._read_one(row, split) for row in wanted.tolist()])
            for row, value in zip(wanted.tolist(), values, strict=True):
                if (np.isnan(value) if np.isnan(self._fill) else value == self._fill).all():
                    raise self._damage(row, split, "the chunk is missing")
            found[places] = values[of_place]
        return found

    def list_keys(self) -> Iterator[str]:
        """Yield the paths below the folder of the files that hold the chunks."""
        sides = zip(self._array.shape, self._file_shape, strict=True)
        for place in itertools.product(*(range(-(-whole // part)) for whole, part in sides)):
            yield self._array.metadata.encode_chunk_key(place)

    @property
    def _file_shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._array.shards or self._array.chunks
        return shape

    def _select(self, rows: list[int], split: int) -> np.ndarray:
        chosen = (rows, split) if self._schema.split_rows else (rows,)
        return np.asarray(self._array.oindex[chosen])

    def _read_one(self, row: int, split: int) -> np.ndarray:
        try:
            return self._select([row], split)[0]
        except Exception as error:  # as above
            raise self._damage(row, split, str(error) or repr(error)) from error

    def _damage(self, row: int, split: int, what: str) -> DamagedStoreError:
        shape = self._file_shape
        first = (row // shape[0], *(0 for _ in shape[1:]))
        path = f"{self._folder}/{self._array.metadata.encode_chunk_key(first)}"
        return DamagedStoreError(
            f"{path}: row {row}, split {split}: {what.removeprefix(f'{path}: ')}"
        )


def _has_checksums(codecs: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether every byte that the codecs read is held to a CRC-32C."""
    last = codecs[-1]
    if last["name"] != "sharding_indexed":
        return bool(last["name"] == "crc32c")
    inner = last["configuration"]
    return _has_checksums(inner["codecs"]) and inner["index_codecs"][-1]["name"] == "crc32c"


class _CommittedFiles(Store):
    """An array's folder as zarr-python sees a store: read-only, and nothing may be missing."""

    supports_writes = False
    supports_deletes = False
    supports_listing = False

    def __init__(self, storage: Storage, folder: str, metadata: bytes) -> None:
        super().__init__(read_only=True)
        self._storage = storage
        self._folder = folder
        self._metadata = metadata
        self.checks_itself = False
        self.digests: Mapping[str, str] = {}

    def __eq__(self, other: object) -> bool:
        return self is other

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a file's bytes, or a part of them.

        Raises:
            DamagedStoreError: it is missing or altered.
        """
        if key == _METADATA:
            return prototype.buffer.from_bytes(self._metadata)
        data = await asyncio.to_thread(self._read, f"{self._folder}/{key}", byte_range)
        return prototype.buffer.from_bytes(data)

    def _read(self, path: str, part: ByteRequest | None) -> bytes:
        try:
            if part is None or not self.checks_itself:
                data = self._storage.read(path)
                self._check(path, data)
                return data if part is None else data[slice(*_bounds(part, len(data)))]
            if isinstance(part, RangeByteRequest):
                return self._storage.read_range(path, part.start, part.end - part.start)
            start, end = _bounds(part, self._storage.size(path))
            return self._storage.read_range(path, start, end - start)
        except FileNotFoundError as error:
            raise DamagedStoreError(f"{path}: a committed file is missing") from error

    def _check(self, path: str, data: bytes) -> None:
        if self.checks_itself:
            return
        if path not in self.digests:
            raise DamagedStoreError(
                f"{path}: its codecs have no checksum, and it is not among the files committed"
            )
        if hashlib.sha256(data).hexdigest() != self.digests[path]:
            raise DamagedStoreError(f"{path}: SHA-256 is not the one committed")

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Any
    ) -> list[Buffer | None]:
        """Return parts of files."""
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def exists(self, key: str) -> bool:
        """Say that every file is there; reading one that is not is the error."""
        return True

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse: what is committed is never written again."""
        raise PermissionError(f"{self._folder}/{key}: a committed array is read-only")

    async def delete(self, key: str) -> None:
        """Refuse, as ``set``."""
        raise PermissionError(f"{self._folder}/{key}: a committed array is read-only")

    async def list(self) -> AsyncIterator[str]:
        """List nothing."""
        keys: tuple[str, ...] = ()
        for key in keys:
            yield key

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """List nothing."""
        return self.list()

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """List nothing."""
        return self.list()


def _bounds(part: ByteRequest, size: int) -> tuple[int, int]:
    if isinstance(part, RangeByteRequest):
        return part.start, part.end
    if isinstance(part, OffsetByteRequest):
        return part.offset, size
    return max(size - part.suffix, 0), size
