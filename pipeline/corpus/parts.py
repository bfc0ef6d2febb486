"""Splits a long tar into parts, and makes sure that all parts are of one version of the tar.

``select_part`` is a pure function of the tar's listing, so every writer of a part, on any machine
and after any crash, takes the same samples: a contiguous range, balanced by bytes. Two versions of
a tar would be cut in different places. So the first part to be fetched pins the tar's SHA-256,
create-only, in ``<latents layer>/sources/<tar's id>.json``, and the others are compared with it.
"""

from collections.abc import Iterator, Sequence

from pydantic import Field, ValidationError

from pipeline.base.yaml import FrozenModel
from pipeline.corpus.members import Reject, SampleMembers
from pipeline.corpus.source import SourceChangedError
from pipeline.corpus.tar import BLOCK_BYTES
from pipeline.corpus.tasks import Task
from pipeline.storage.interface import Storage
from pipeline.store.commit import Commit, DamagedStoreError, RecordName, read_commit, record_path
from pipeline.store.task_ids import list_part_ids


class PinnedSource(FrozenModel, strict=True):
    """The version of a tar that all its parts must be made from."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    num_bytes: int = Field(ge=0)


def select_part(
    groups: Sequence[SampleMembers], rejects: Sequence[Reject], *, part: int, num_parts: int
) -> tuple[list[SampleMembers], list[Reject]]:
    """Return the samples and rejects of one part of a tar, of all that ``group_members`` found.

    The bytes of all samples, in order, are cut into ``num_parts`` of equal length, and a sample
    belongs to the part (from 0) of its middle byte. So a part's bytes differ from the mean by less
    than the largest sample's, and a part may be empty. All rejects belong to the first part, so
    that the parts together account for the whole tar.

    Raises:
        ValueError: there is no such part.
    """
    if not 0 <= part < num_parts:
        raise ValueError(f"part: expected 0 to {num_parts - 1}, got {part}")
    sizes = [_count_bytes(members) for members in groups]
    whole = sum(sizes)
    selected: list[SampleMembers] = []
    start = 0
    for members, size in zip(groups, sizes, strict=True):
        # In whole numbers, for floats would round otherwise at 2**53 bytes x parts.
        if (2 * start + size) * num_parts // (2 * whole) == part:
            selected.append(members)
        start += size
    return selected, list(rejects) if part == 0 else []


def _count_bytes(members: SampleMembers) -> int:
    """Return the bytes of a sample's members and their headers; above 0."""
    return sum(member.size + BLOCK_BYTES for member in members.members)


def pin_path(layer_folder: str, tar_id: str) -> str:
    """Return the path in the store of a tar's pin."""
    return f"{layer_folder}/sources/{tar_id}.json"


def read_pin(storage: Storage, layer_folder: str, tar_id: str) -> PinnedSource | None:
    """Return the version that a tar's parts are held to, None before the first part is fetched.

    Raises:
        DamagedStoreError: the pin cannot be read.
        OSError: the storage fails or denies access.
    """
    path = pin_path(layer_folder, tar_id)
    try:
        return PinnedSource.model_validate_json(storage.read(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DamagedStoreError(
            f"{path}: expected the SHA-256 and size of the tar of {tar_id}, got what is none "
            f"({error.error_count()} faults, {error.errors()[0]['msg']}); remove that file and run "
            "encode again: it is made anew from a committed part, or else from the tar"
        ) from error


def pin_source(storage: Storage, layer_folder: str, task: Task, sha256: str) -> None:
    """Check that a part is made from the pinned version of its tar; the first part pins it.

    ``layer_folder`` is the latents layer's; ``sha256`` (hex) is of the whole tar as it was fetched.
    If the pin is missing although parts are committed, it is made from a part's record.

    Raises:
        SourceChangedError: the tar is of another version than the pin.
        DamagedStoreError: the pin cannot be read, or was removed at this moment.
        OSError: the storage fails or denies access.
    """
    assert task.num_parts > 1, f"{task.id} is a whole tar"
    pinned = read_pin(storage, layer_folder, task.tar_id)
    path = pin_path(layer_folder, task.tar_id)
    if pinned is None:
        sources = (commit.source for commit in _read_parts(storage, layer_folder, task))
        first = next((source.sha256 for source in sources if source is not None), sha256)
        pin = PinnedSource(sha256=first, num_bytes=task.num_bytes)
        storage.create(path, pin.model_dump_json(indent=1).encode())
        pinned = read_pin(storage, layer_folder, task.tar_id)  # another process's, if it was first
        if pinned is None:
            raise DamagedStoreError(f"{path}: was removed while {task.id} was fetched; run again")
    if (pinned.sha256, pinned.num_bytes) != (sha256, task.num_bytes):
        raise SourceChangedError(
            f"{task.url}: expected the version of which the other parts of {task.tar_id} are, "
            f"SHA-256 {pinned.sha256} of {pinned.num_bytes} bytes by {path}, got SHA-256 {sha256} "
            f"of {task.num_bytes} bytes; {_advise(storage, layer_folder, task, path)}"
        )


def _advise(storage: Storage, layer_folder: str, task: Task, path: str) -> str:
    committed = next(_list_parts(storage, layer_folder, task), None)
    if committed is not None:
        return f"{committed.task} is committed: bring that tar back, or encode into another store"
    return (
        f"no part is committed yet: bring that tar back, or, if it was rewritten on purpose, end "
        f"every run on this store, remove {path} from the store and run encode again"
    )


def _list_parts(storage: Storage, layer_folder: str, task: Task) -> Iterator[RecordName]:
    """Yield the first record of each committed part of a task's tar; no repair removes it."""
    for part_id in list_part_ids(task.tar_id, task.num_parts):
        if storage.exists(record_path(layer_folder, part_id, 0)):
            yield RecordName(part_id, 0)


def _read_parts(storage: Storage, layer_folder: str, task: Task) -> Iterator[Commit]:
    """Yield the records of ``_list_parts`` that can be read; ``verify`` reports the others."""
    for record in _list_parts(storage, layer_folder, task):
        try:
            yield read_commit(storage, layer_folder, record)
        except DamagedStoreError:
            continue
