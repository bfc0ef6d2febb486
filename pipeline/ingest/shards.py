"""The tars of one split at a URL: which are finished, and how one is published whole.

Beside ``train-00000.tar`` stands ``train-00000_stats.json``, written after it: a tar without it is
not finished and is made anew. ``train_ingest.json``, written before the first tar, holds the
arguments that the tars depend on. On a file system a file gets its name when it is whole; on an
object storage a PUT is whole.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.base.remote_copy import as_oserror, open_filesystem, retry
from pipeline.base.secrets import find_url_fault
from pipeline.base.whole_file import open_whole
from pipeline.store.read_many import read_many

_AT_ONCE = 1024
_COPY_BYTES = 1024 * 1024
_OBJECTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"}
"""Protocols whose uploads are seen whole or not at all, and where a rename is a copy."""


@dataclass(slots=True)
class ShardStats:
    """What a tar holds, as in its ``_stats.json``.

    ``recipes``: images tried, which are ``images`` written and those rejected; ``first_key`` and
    ``last_key`` are theirs, ``keys_sha256`` is over all. ``without_phrase``: of the images, those
    with neither phrase nor negative. ``rejects``: by reason, of images and of phrases;
    ``examples``: the first of each.
    """

    arguments: str = ""
    num_bytes: int = 0
    first_key: str = ""
    last_key: str = ""
    keys_sha256: str = ""
    recipes: int = 0
    images: int = 0
    pairs: int = 0
    negatives: int = 0
    without_phrase: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, other: "ShardStats") -> None:
        """Add another's counts, and its bytes."""
        for name in ("num_bytes", "recipes", "images", "pairs", "negatives", "without_phrase"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, number in other.rejects.items():
            self.rejects[reason] = self.rejects.get(reason, 0) + number
        self.examples = {**other.examples, **self.examples}


@dataclass(slots=True)
class RunTotals(ShardStats):
    """What the tars of a run hold together; ``num_kept`` of them were finished before it."""

    num_kept: int = field(default=0, compare=False)


class SplitFolder:
    """The folder at ``--out`` as one split sees it."""

    def __init__(self, url: str, split: str) -> None:
        """Asks no server.

        Raises:
            ValueError: a URL with a secret or of a scheme that is not known, or no name of a split.
        """
        if fault := find_url_fault(url):
            raise ValueError(f"--out: {fault}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", split):
            raise ValueError(f"split: expected letters, digits, - and _, got {split!r}")
        self.url, self._split, self._marker = url.rstrip("/"), split, f"{split}_ingest.json"
        self._filesystem, self._path = open_filesystem(self.url)
        self._is_local = "file" in self._filesystem.protocol

    def name(self, number: int | str, end: str = ".tar") -> str:
        """Return the name of a tar, or of a file beside it; with ``*`` of all."""
        return f"{self._split}-{number:0>5}{end}" if number != "*" else f"{self._split}-*{end}"

    def list_finished(self) -> dict[int, ShardStats]:
        """List the tars that are whole, by number."""
        names = self._list_names()
        pattern = re.compile(rf"{re.escape(self._split)}-(\d{{5,}})_stats\.json")
        found = [int(match[1]) for match in map(pattern.fullmatch, names) if match]
        numbers = sorted(number for number in found if self.name(number) in names)
        parts = read_many(self._read_stats, numbers, at_once=_AT_ONCE)
        stats = dict(zip(numbers, [one for part in parts for one in part], strict=True))
        return {n: one for n, one in stats.items() if one.num_bytes == names[self.name(n)]}

    def holds(self, name: str) -> bool:
        """Return whether a file is there, by one request."""

        def ask(path: str) -> bool:
            self._filesystem.invalidate_cache()
            return bool(self._filesystem.exists(path))

        return bool(self._request(name, ask))

    def check_tars(self) -> None:
        """Refuse to write among another program's tars of the split's name.

        Raises:
            ValueError: there is one.
        """
        names = self._list_names()
        own = re.compile(rf"{re.escape(self._split)}-\d{{5,}}\.tar")
        foreign = next(filter(own.fullmatch, sorted(names)), None)
        if foreign and self._marker not in names:
            raise ValueError(
                f"--out: {self.url}/{foreign} is there, and ingest did not write it (there is no "
                f"{self._marker}); give another --out"
            )

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Refuse to mix tars of other arguments with these.

        Raises:
            ValueError: the split's tars are of other arguments.
        """
        if not self.holds(self._marker):
            return
        try:
            there = dict(json.loads(self._read(self._marker)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"--out: {self.url}/{self._marker}: expected the arguments of the tars there, "
                f"got {error!r}; remove the split's files, or give another --out"
            ) from error
        if differ := [k for k in {**there, **arguments} if there.get(k) != arguments.get(k)]:
            was = ", ".join(f"{key} {there.get(key)!r}" for key in differ)
            now = ", ".join(f"{key} {arguments.get(key)!r}" for key in differ)
            raise ValueError(
                f"--out: the tars {self.url}/{self.name('*')} were made with {was}; expected "
                f"the same, got {now}; give another --out"
            )

    def publish_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Write the arguments down: before the first tar, and not where there is none to be."""
        self._publish_json(self._marker, dict(arguments))

    def _publish_json(self, name: str, data: object) -> None:
        """Publish a small file."""
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        if self._is_local:
            with open_whole(Path(self._path) / name) as file:
                file.write(text.encode())
            return
        self._request(name, lambda path: self._filesystem.pipe_file(path, text.encode()))

    def publish_stats(self, number: int, stats: ShardStats) -> None:
        """Publish what says that a tar is finished."""
        self._publish_json(self.name(number, "_stats.json"), asdict(stats))

    def publish(self, name: str, file: BinaryIO) -> None:
        """Publish an open local file, from its start, under a name, which it gets when whole."""
        file.flush()
        file.seek(0)
        if self._is_local:
            with open_whole(Path(self._path) / name) as target:
                while piece := file.read(_COPY_BYTES):
                    target.write(piece)
            return
        source = f"/dev/fd/{file.fileno()}"  # it has no name
        if _OBJECTS & set(_list_protocols(self._filesystem)):
            self._request(name, lambda path: self._filesystem.put_file(source, path))
            return
        self._request(f".{name}-part", lambda path: self._filesystem.put_file(source, path))
        part = f"{self._path}/.{name}-part"
        self._request(name, lambda path: self._filesystem.mv(part, path))

    def _request(self, name: str, ask: Any) -> Any:
        url = f"{self.url}/{name}"

        def try_once() -> Any:
            with as_oserror(url):
                return ask(f"{self._path}/{name}")

        return retry(try_once, what=url)

    def _read(self, name: str) -> bytes:
        return bytes(self._request(name, self._filesystem.cat_file))

    def _read_stats(self, number: int) -> ShardStats:
        try:
            return ShardStats(**json.loads(self._read(self.name(number, "_stats.json"))))
        except (ValueError, TypeError):
            return ShardStats(num_bytes=-1)  # of no tar: it is made anew

    def _list_names(self) -> dict[str, int]:
        """List the files of the folder with their sizes; none where there is no folder."""

        def ask(path: str) -> list[dict[str, Any]]:
            self._filesystem.invalidate_cache()
            try:
                return list(self._filesystem.ls(path.removesuffix("/"), detail=True))
            except FileNotFoundError:
                return []

        found = self._request("", ask)
        return {os.path.basename(one["name"]): one["size"] for one in found}


def _list_protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
