"""Which pairs of a task are read: filters on the index, and splits by a hash of the key."""

import hashlib
import json
import operator
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipeline.base.yaml import FrozenModel, SpecError
from pipeline.store.layout import INDEX_SCHEMA

Comparison = Literal["==", "!=", "<", "<=", ">", ">="]
_COMPARE: dict[Comparison, tuple[Callable[..., Any], Callable[[Any, Any], bool]]] = {
    "==": (pc.equal, operator.eq),
    "!=": (pc.not_equal, operator.ne),
    "<": (pc.less, operator.lt),
    "<=": (pc.less_equal, operator.le),
    ">": (pc.greater, operator.gt),
    ">=": (pc.greater_equal, operator.ge),
}
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,9})?\s*", re.ASCII)
_HASH_BITS = 53  # of the digest, so that a share is exact in float64


class PairChoice(FrozenModel):
    """The pairs that meet every condition given; all where none is."""

    # Mask's share of the view, inclusive. A pair without a mask has none, and meets both.
    min_area: float = Field(default=0.0, ge=0, le=1)
    max_area: float = Field(default=1.0, ge=0, le=1)
    # Regular expression (RE2) found anywhere in the phrase, which is "" for an image without any.
    phrase: str | None = None
    without_phrase: str | None = None  # and one that is found nowhere in it
    keys_from: float = Field(default=0.0, ge=0, le=1)  # keys whose hash lies in [from, to)
    keys_to: float = Field(default=1.0, ge=0, le=1)
    keys_seed: int = 0  # of the hash: another seed is another split
    # On columns of index.parquet, those of keep_json included, as (scale, <=, 4). A number is
    # compared with text as a number where the text is one. What is null, or is none, differs from
    # any value (!=), and meets nothing else.
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
        # Other columns are a layer's own: only its reader knows them.
        known = [condition for condition in self.where if condition[0] in INDEX_SCHEMA.names]
        _check_conditions(known, INDEX_SCHEMA)
        return self

    def check_columns(self, schema: pa.Schema, *, where: str) -> None:
        """Raise SpecError for a condition on a column that the index of a layer lacks."""
        try:
            _check_conditions(self.where, schema)
        except ValueError as error:
            raise SpecError(f"{where}: {error}") from error

    @property
    def takes_all(self) -> bool:
        """Whether no condition is given, so that no index need be read to count pairs."""
        return self == PairChoice(keys_seed=self.keys_seed)

    def describe(self) -> str:
        """Return the conditions that are given, as a config has them."""
        given = self.model_dump(mode="json", exclude_defaults=True)
        return ", ".join(f"{name}: {value}" for name, value in given.items())

    def narrow_to_negatives(self) -> "PairChoice":
        """Return the choice of those of its pairs that are negative."""
        return self.model_copy(update={"where": (*self.where, ("negative", "==", True))})

    def select(self, index: pa.Table) -> np.ndarray:
        """Return the rows of a task's index that are read, ascending, int32."""
        area = pc.fill_null(index["mask_area"], np.nan).to_numpy()  # NaN is on neither side
        # Through float32, as areas are stored: max_area 0.1 takes an area of 0.1.
        chosen = ~((area < np.float32(self.min_area)) | (area > np.float32(self.max_area)))
        for pattern, wanted in ((self.phrase, True), (self.without_phrase, False)):
            if pattern is not None:
                found = pc.match_substring_regex(pc.fill_null(index["phrase"], ""), pattern)
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


def _check_conditions(
    conditions: Iterable[tuple[str, Comparison, bool | int | float | str]], schema: pa.Schema
) -> None:
    for condition in conditions:
        try:
            _compare(schema.empty_table(), *condition)
        except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"where: expected a column of index.parquet and a value of its type, got "
                f"{list(condition)}; the columns are {', '.join(schema.names)}"
            ) from error


def _compare(
    index: pa.Table, column: str, comparison: Comparison, value: bool | int | float | str
) -> np.ndarray:
    values = index[column]
    if pa.types.is_string(values.type) and not isinstance(value, str):
        if not isinstance(value, bool):
            return _compare_numbers(values, comparison, value)
        value = json.dumps(value)  # as keep_json writes it
    compare, _ = _COMPARE[comparison]
    # In the column's own type, so that a float32 0.1 equals 0.1.
    found = pc.fill_null(compare(values, pa.scalar(value, values.type)), comparison == "!=")
    return np.asarray(found.to_numpy(zero_copy_only=False), bool)


def _compare_numbers(
    texts: pa.ChunkedArray, comparison: Comparison, value: int | float
) -> np.ndarray:
    _, compare = _COMPARE[comparison]
    # An int exactly, since ids have more digits than a float; 0.1 as the float that it is.
    parse = float if isinstance(value, float) else Decimal
    encoded = texts.combine_chunks().dictionary_encode()
    met = [
        compare(parse(text), value) if _NUMBER.fullmatch(text) else comparison == "!="
        for text in encoded.dictionary.to_pylist()
    ]
    codes = pc.fill_null(encoded.indices, len(met)).to_numpy()
    return np.array([*met, comparison == "!="])[codes]


def hash_key(key: str, seed: int) -> float:
    """Return a key's place in [0, 1), uniform and the same in every task and store.

    SHA-256, so that all pairs and views of an image fall on one side of a split, whatever tar they
    are in.
    """
    digest = hashlib.sha256(f"ldznet\0split\0{seed}\0{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> (64 - _HASH_BITS)) / 2**_HASH_BITS
