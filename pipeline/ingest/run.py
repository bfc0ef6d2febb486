"""Writes a listing's images into tars, of which finished ones are kept.

A tar ends when the next image finds it full: so what was rejected is told beside the tar in whose
turn it came, and the same recipes give the same tars at every run.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

from webdataset import TarWriter

from pipeline.base.progress import Progress
from pipeline.base.remote_copy import check_room
from pipeline.ingest.sample import IngestError, Listing, Recipe
from pipeline.ingest.shards import RunTotals, ShardStats, SplitFolder
from pipeline.ingest.writer import MISSING, Members, Rejected, encode_members

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_MAX_SHOWN = 200  # characters of a reject that is told as an example
_BLOCK_BYTES = 512  # of a tar: a header takes one, and a member's bytes fill up their last


def run_ingest(
    listing: Listing,
    out: str,
    *,
    arguments: Mapping[str, Any],
    shard_bytes: int,
    limit: int | None = None,
) -> RunTotals:
    """Write a listing's tars to a folder or URL, but those finished there; return what all hold.

    ``arguments``: what the tars depend on, as JSON has it. ``shard_bytes``: a tar that is as long
    takes no more images. ``limit``: only so many images are tried.

    Raises:
        ValueError: the folder holds other tars, or the finished ones do not fit the listing.
        OSError: a file cannot be read or written.
    """
    arguments = {**arguments, "shard_bytes": shard_bytes, "limit": limit}
    folder = SplitFolder(out, listing.split)
    folder.check_tars()
    folder.check_arguments(arguments)
    finished = folder.list_finished()
    recipes = _Recipes(islice(listing.recipes, limit))
    listed = listing.listed.get("images", 0)
    totals = RunTotals(arguments=_digest(arguments))
    with Progress(
        "ingest", total=min(listed, limit or listed), unit="images", metrics_path=None
    ) as progress:

        def tell(shard: ShardStats) -> None:
            progress.update(totals.recipes + shard.recipes, images=totals.images + shard.images)

        for number in count():
            if recipes.next is None:
                break
            if (shard := finished.pop(number, None)) is not None:
                _skip(recipes, shard, where=f"{folder.url}/{folder.name(number)}")
                totals.num_kept += 1
            else:
                shard = _write_shard(recipes, folder, number, arguments, tell)
            totals.add(shard)
            tell(ShardStats())
    if finished:
        name = folder.name(min(finished))
        raise _explain_change(f"{folder.url}/{name}", "for it", "none")
    return totals


def _write_shard(
    recipes: "_Recipes",
    folder: SplitFolder,
    number: int,
    arguments: Mapping[str, Any],
    tell: Callable[[ShardStats], None],
) -> ShardStats:
    """Write one tar and publish it, then what says that it is finished."""
    here = Path(tempfile.gettempdir())
    check_room(here, arguments["shard_bytes"], what=folder.name(number))
    with tempfile.TemporaryFile(dir=here) as tar, tempfile.TemporaryFile(dir=here) as rejects:
        with closing(_ShardWriter(tar, rejects, _digest(arguments))) as writer:
            while (recipe := recipes.next) is not None:
                members = writer.build(recipe)
                if members.files and writer.num_bytes >= arguments["shard_bytes"]:
                    break  # built again for the next tar
                recipes.take()
                writer.add(recipe.key, members)
                tell(writer.stats)
            stats = writer.close()
        if stats.images == 0:
            return stats
        folder.check_arguments(arguments)  # another run may have begun beside this one
        if number == 0:
            folder.publish_arguments(arguments)
        name = folder.name(number, "_rejects.jsonl")
        if stats.rejects or folder.holds(name):  # that of a run before
            folder.publish(name, rejects)
        stats.num_bytes = tar.tell()
        folder.publish(folder.name(number), tar)
        folder.publish_stats(number, stats)
    return stats


def _digest(arguments: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()


class _Recipes:
    """Recipes, of which the next can be looked at before it is taken."""

    def __init__(self, recipes: Iterator[Recipe]) -> None:
        self._recipes = recipes
        self.next = next(recipes, None)

    def take(self) -> Recipe | None:
        """Return the next, None at the end."""
        taken, self.next = self.next, next(self._recipes, None)
        return taken


def _skip(recipes: _Recipes, shard: ShardStats, *, where: str) -> None:
    """Pass the recipes of a finished tar, which are the same ones by their keys."""
    digest, keys = hashlib.sha256(), list[str]()
    for _ in range(shard.recipes):
        taken = recipes.take()
        keys = [*keys[:1], taken.key if taken else ""]
        digest.update(f"{keys[-1]}\n".encode())
    if digest.hexdigest() != shard.keys_sha256:
        raise _explain_change(where, f"'{shard.first_key}' to '{shard.last_key}'", f"{keys}")


def _explain_change(where: str, expected: str, got: str) -> ValueError:
    return ValueError(
        f"{where}: expected images {expected}, got {got}: what is read has changed, or an earlier "
        "tar was made anew; remove this tar and those after it, or give another --out"
    )


class _ShardWriter:
    """Writes one tar, with its rejects, into local files without names, and counts."""

    def __init__(self, tar: BinaryIO, rejects: BinaryIO, digest: str) -> None:
        self._tar = TarWriter(tar, encoder=False, mtime=0, user="", group="", mode=0o644)
        self._rejects = rejects
        self._is_closed = False
        self._keys: set[str] = set()
        self._digest = hashlib.sha256()  # over the keys of all images tried
        self.num_bytes = 0
        self.stats = ShardStats(arguments=digest)

    def add(self, key: str, members: Members) -> None:
        """Write an image, if it has members, and its rejects."""
        stats = self.stats
        stats.first_key, stats.last_key = stats.first_key or key, key
        self._keys.add(key)
        self._digest.update(f"{key}\n".encode())
        stats.recipes += 1
        for reject in members.rejects:
            self._tell(key, reject)
        if not members.files:
            return
        self._tar.write({"__key__": key, **members.files})
        blocks = sum(1 + -(-len(data) // _BLOCK_BYTES) for data in members.files.values())
        self.num_bytes += blocks * _BLOCK_BYTES
        stats.images += 1
        stats.pairs += members.num_phrases
        stats.negatives += members.num_negatives
        stats.without_phrase += members.num_phrases + members.num_negatives == 0

    def build(self, recipe: Recipe) -> Members:
        """Build an image's members; what is left out for a reason has none."""
        try:
            if not _KEY.fullmatch(recipe.key):
                raise IngestError("bad_key", "expected at most 80 letters, digits, - and _")
            if recipe.key in self._keys:
                raise IngestError("bad_key", "an image before has the same")
            return encode_members(recipe.build())
        except IngestError as error:
            return Members(rejects=[Rejected(None, error.reason, error.detail)])
        except MISSING as error:
            detail = f"{error.filename}: expected a file: {error.strerror}"
            return Members(rejects=[Rejected(None, "missing_file", detail)])

    def close(self) -> ShardStats:
        """Write the tar's end, once."""
        if not self._is_closed:
            self._is_closed = True
            self._tar.close()
        self.stats.keys_sha256 = self._digest.hexdigest()
        return self.stats

    def _tell(self, key: str, reject: Rejected) -> None:
        line = {"key": key, **reject._asdict()}
        self._rejects.write(json.dumps(line).encode() + b"\n")
        rejects, examples = self.stats.rejects, self.stats.examples
        rejects[reject.reason] = rejects.get(reject.reason, 0) + 1
        of = "" if reject.phrase is None else f" {reject.phrase!r}"
        examples.setdefault(reject.reason, f"{key}{of}: {reject.detail}"[:_MAX_SHOWN])
