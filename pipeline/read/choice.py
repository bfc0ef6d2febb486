"""Which pairs of a task are read: filters on the index, and splits by a hash of the key."""

import hashlib
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.base.yaml import FrozenModel
from pipeline.store.layout import INDEX_SCHEMA

Comparison = Literal["==", "!=", "<", "<=", ">", ">="]
_FUNCTIONS: dict[Comparison, str] = {
    "==": "equal",
    "!=": "not_equal",
    "<": "less",
    "<=": "less_equal",
    ">": "greater",
    ">=": "greater_equal",
}
_HASH_BITS = 53  # of the digest, so that a share is exact in float64


class PairChoice(FrozenModel):
    """The pairs that meet every condition given; all where none is."""

    min_area: float = Field(default=0.0, ge=0, le=1)  # mask's share of the view, inclusive
    max_area: float = Field(default=1.0, ge=0, le=1)
    phrase: str | None = None  # regular expression (RE2) found anywhere in the phrase
    without_phrase: str | None = None  # and one that is found nowhere in it
    keys_from: float = Field(default=0.0, ge=0, le=1)  # keys whose hash lies in [from, to)
    keys_to: float = Field(default=1.0, ge=0, le=1)
    keys_seed: int = 0  # of the hash: another seed is another split
    # On columns of index.parquet, as (scale, <=, 4). What is null there differs from any value
    # (!=), and meets nothing else.
    where: tuple[tuple[str, Comparison, bool | int | float | str], ...] = ()

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.min_area > self.max_area:
            raise ValueError(
                f"min_area must be at most max_area, got {self.min_area} and {self.max_area}"
            )
        if self.keys_from >= self.keys_to:
            raise ValueError(
                f"keys_from must be below keys_to, got {self.keys_from} and {self.keys_to}"
            )
        for name in ("phrase", "without_phrase"):
            pattern = getattr(self, name)
            if pattern is not None:
                try:
                    pc.match_substring_regex(pa.array([""]), pattern)
                except pa.ArrowInvalid as error:
                    raise ValueError(f"{name}: not a regular expression of RE2: {error}") from error
        for condition in self.where:
            try:
                _compare(INDEX_SCHEMA.empty_table(), *condition)
            except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise ValueError(
                    f"where: expected a column of index.parquet and a value of its type, got "
                    f"{list(condition)}; the columns are {', '.join(INDEX_SCHEMA.names)}"
                ) from error
        return self

    @property
    def takes_all(self) -> bool:
        """Whether no condition is given, so that no index need be read to count pairs."""
        return self == PairChoice(keys_seed=self.keys_seed)

    def select(self, index: pa.Table) -> np.ndarray:
        """Return the rows of a task's index that are read, ascending, int32."""
        area = index["mask_area"].to_numpy()
        # Through float32, as areas are stored: max_area 0.1 takes an area of 0.1.
        chosen = (area >= np.float32(self.min_area)) & (area <= np.float32(self.max_area))
        for pattern, wanted in ((self.phrase, True), (self.without_phrase, False)):
            if pattern is not None:
                found = pc.match_substring_regex(index["phrase"], pattern)
                chosen &= found.to_numpy(zero_copy_only=False) == wanted
        if (self.keys_from, self.keys_to) != (0.0, 1.0):
            keys = index["key"].combine_chunks().dictionary_encode()
            hashes = np.array(
                [hash_key(key, self.keys_seed) for key in keys.dictionary.to_pylist()]
            )
            places = hashes[keys.indices.to_numpy()]
            chosen &= (places >= self.keys_from) & (places < self.keys_to)
        for condition in self.where:
            chosen &= _compare(index, *condition)
        return np.flatnonzero(chosen).astype(np.int32)


def _compare(
    index: pa.Table, column: str, comparison: Comparison, value: bool | int | float | str
) -> np.ndarray:
    compare = getattr(pc, _FUNCTIONS[comparison])
    # In the column's own type, so that a float32 0.1 equals 0.1.
    found = compare(index[column], pa.scalar(value, index[column].type))
    filled = pc.fill_null(found, comparison == "!=")
    return np.asarray(filled.to_numpy(zero_copy_only=False), bool)


def hash_key(key: str, seed: int) -> float:
    """Return a key's place in [0, 1), uniform and the same in every task and store.

    SHA-256, so that all pairs and views of an image fall on one side of a split, whatever tar they
    are in.
    """
    digest = hashlib.sha256(f"ldznet\0split\0{seed}\0{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> (64 - _HASH_BITS)) / 2**_HASH_BITS
