"""Finds a model's files on this machine: a folder as it is, a hub id's snapshot, a URL's copy.

A URL is copied once a node, by the first of its actors, while the others wait, to
``<cache>/models/<digest>/``; the digest is over the URL and its listing (names, sizes, ETags or
times), so that a model written anew is copied anew. The cache is LDZNET_CACHE or
``~/.cache/ldznet``; it may be removed whenever no run uses it. ``open_model`` verifies the files by
their SHA-256. For a hub id huggingface_hub does the same, with a lock a file.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from fsspec import AbstractFileSystem

from models.ldm.files import ModelFilesError, resolve_model
from pipeline.base.node_fault import blaming_node
from pipeline.base.remote_copy import as_oserror, check_room, copy_file, open_filesystem, retry
from pipeline.base.secrets import find_url_fault

logger = logging.getLogger(__name__)

_INDEX = "model_index.json"
# What loading and digests read. Published folders also hold pickles, a safety checker and whole
# checkpoints.
_PARTS = frozenset(
    ("vae", "unet", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
)
_SUFFIXES = (".json", ".txt", ".model", ".safetensors")
# Names that fsspec's file systems give to what changes when a file is written anew.
_STAMPS = (
    *("ETag", "etag", "md5Hash", "generation"),
    *("mtime", "LastModified", "last_modified", "modified", "updated", "created"),
)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # two numbers on macOS


@dataclass(frozen=True, slots=True)
class _File:
    name: str  # below the model's folder, POSIX
    path: str  # in the file system
    num_bytes: int
    stamps: tuple[str, ...]


def fetch_model(name: str, *, revision: str | None = None) -> Path:
    """Return the local folder of a diffusers model given as a folder, a hub id or an fsspec URL.

    ``revision`` is of a hub id.

    Raises:
        ModelFilesError: there is no such model, the URL is refused, or it changed meanwhile.
        OSError: the URL cannot be read, or the cache has no room.
    """
    if "://" not in name:
        return resolve_model(name, revision=revision)
    if fault := find_url_fault(name):
        raise ModelFilesError(f"model: {fault}")
    try:
        filesystem, root = open_filesystem(name)
    except (ImportError, ValueError) as error:  # a scheme's package is missing; no such scheme
        raise ModelFilesError(f"model: {name} cannot be opened: {error}") from error
    files = _list_files(filesystem, root, name)
    listing = [(file.name, file.num_bytes, file.stamps) for file in files]
    digest = hashlib.sha256(json.dumps([name, listing]).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("LDZNET_CACHE") or "~/.cache/ldznet").expanduser()
    folder = cache / "models" / digest
    if _is_whole(folder, files):
        return folder
    with blaming_node(cache):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with blaming_node(cache), _locked(folder.with_suffix(".lock")) as locked:
        if not _is_whole(folder, files):  # or else another actor has copied it meanwhile
            if locked:  # so no copier is alive: what is there was left by killed ones
                for half in folder.parent.glob(f"{digest}.*.part"):
                    shutil.rmtree(half)
            _copy(filesystem, root, files, folder, url=name)
    return folder


def _list_files(filesystem: AbstractFileSystem, root: str, url: str) -> list[_File]:
    """List the model's files by name; works without folders, which object stores lack."""

    def find() -> dict[str, dict[str, Any]]:
        filesystem.invalidate_cache()
        with as_oserror(url):
            return dict(filesystem.find(root, detail=True))

    files = []
    below = root.rstrip("/") + "/"
    for path, info in sorted(retry(find, what=url).items()):
        name = PurePosixPath(path.removeprefix(below))
        in_part = len(name.parts) == 2 and name.parts[0] in _PARTS and name.suffix in _SUFFIXES
        if not (in_part or str(name) == _INDEX):
            continue
        if info.get("size") is None:
            raise ModelFilesError(f"model: {path}: expected a size in bytes, the server tells none")
        stamps = tuple(f"{key}={info[key]}" for key in _STAMPS if info.get(key) is not None)
        files.append(_File(str(name), path, int(info["size"]), stamps))
    if not files:
        raise ModelFilesError(
            f"model: expected a folder in diffusers' layout (vae/, unet/, …) at {url}, found none"
        )
    return files


def _is_whole(folder: Path, files: list[_File]) -> bool:
    """Tell whether a copy has every file at its length."""
    try:
        return all((folder / file.name).stat().st_size == file.num_bytes for file in files)
    except FileNotFoundError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a node's lock on a copy until the block or the process ends; yield whether it is held.

    A cache on a network file system may have no locks: then several processes may copy at once, and
    one copy stays.
    """
    try:
        lock = FileLock(path).acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s: the file system has no locks; set LDZNET_CACHE to a local one", path)
        yield False
        return
    with lock:
        yield True


def _copy(
    filesystem: AbstractFileSystem, root: str, files: list[_File], folder: Path, *, url: str
) -> None:
    num_bytes = sum(file.num_bytes for file in files)
    check_room(folder.parent, num_bytes, what=url)
    logger.info("%s: copying %d files, %d bytes, to %s", url, len(files), num_bytes, folder)
    with tempfile.TemporaryDirectory(
        prefix=f"{folder.name}.", suffix=".part", dir=folder.parent, ignore_cleanup_errors=True
    ) as half:
        whole = Path(half) / "model"
        for file in files:
            target = whole / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            source = f"{url.rstrip('/')}/{file.name}"
            with target.open("xb") as copy:
                copy_file(
                    *(filesystem, file.path, copy),
                    folder=target.parent,
                    url=source,
                    num_bytes=file.num_bytes,
                )
        if not _is_whole(whole, files) or _list_files(filesystem, root, url) != files:
            raise ModelFilesError(f"model: {url} was written to while it was copied; run again")
        if folder.exists() and not _is_whole(folder, files):
            shutil.rmtree(folder)  # cut short by a crash of the machine, or by hand
        try:
            whole.rename(folder)
        except OSError:
            if not _is_whole(folder, files):  # or else another process' copy came first
                raise
