"""Commit records: the only thing that makes a task's files part of a store.

A task's files are written under an attempt of their own; the record that lists them is created
under ``commits/<task>.<generation>.json`` if and only if none is there. Whoever reads a store
starts from the records and never sees anything else.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, field_validator

from pipeline.base.failpoints import pass_step
from pipeline.base.outages import OutageError
from pipeline.base.yaml import FrozenModel, SpecError
from pipeline.storage.interface import Storage, StorageError, check_path
from pipeline.store.array_writer import WrittenFile

_RECORD_NAME = re.compile(r"(?P<task>[A-Za-z0-9_-][A-Za-z0-9._-]*)\.(?P<generation>[0-9]{4})\.json")
_ATTEMPT_NAME = re.compile(r"(?P<generation>[0-9]{4})-[0-9a-f]{16}")
_NUM_READERS = 4  # files read back at once: hashing one costs a core
_SEAL = b',\n "record_sha256": "'
_END = b"\n}"
RECORD_VERSION = 2
_FIRST_ROWS = {"pairs", "views", "prompts"}  # what records of version 1 count
_ROWS = _FIRST_ROWS | {"masks", "ignores"}
_VERSION = re.compile(rb'\{\s*"schema_version":\s*([0-9]{1,9}),')  # the first field of every record

InnerPath = Annotated[str, AfterValidator(check_path)]
Status = Literal["stored", "retired", "removed", "vacant"]
"""What a task's newest record says of it: its files are read; it is retired and its files are kept;
it is retired and ``gc`` has removed them; that was taken back, and it is to be encoded again."""
GONE = ("removed", "vacant")  # no file of these records, nor of those before them, need be there


class DamagedStoreError(RuntimeError):
    """Something committed is missing, altered or not what its record says."""


class NewerRecordError(SpecError):
    """A commit record that a later version of ldznet has written, which is no damage."""


class CommittedFile(FrozenModel):
    """One file of an attempt; ``path`` is relative to the layer's folder."""

    path: InnerPath
    num_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Marks(FrozenModel):
    """What a listing tells of a tar beside its size: two tars with equal marks are taken for one.

    Each is None where the listing does not tell it: ``mtime`` is the time of the last change as
    the storage spells it (nanoseconds on a file system), ``etag`` without quotes.
    """

    mtime: str | None = None
    etag: str | None = None
    version: str | None = None


class SourceTar(FrozenModel):
    """The tar that a task was read from. ``head_sha256`` is over its first 64 KiB.

    ``marks`` are those of the listing by which the tar was found; records of version 1 have none.
    """

    url: str
    num_bytes: int
    sha256: str
    head_sha256: str
    marks: Marks = Marks()


class Accounting(FrozenModel):
    """What became of everything the tar held: samples = stored + rejected.

    ``rejects`` has the number of rejects by reason, and ``notes`` that of peculiarities that were
    kept or converted by a rule, by name. Records of version 1 have neither, nor ``rejected_pairs``.
    """

    samples: int = Field(ge=0)
    stored_samples: int = Field(ge=0)
    rejected_samples: int = Field(ge=0)
    rejected_members: int = Field(ge=0)  # members of no sample
    rejected_pairs: int | None = Field(default=None, ge=0)  # of samples that are stored
    set_aside_members: int = Field(default=0, ge=0)  # sidecars, by a rule
    rejects: dict[str, int] | None = None
    notes: dict[str, int] | None = None

    @property
    def balanced(self) -> bool:
        """Whether stored and rejected samples add up to what the tar held."""
        return self.samples == self.stored_samples + self.rejected_samples


class Commit(FrozenModel):
    """A task's record in one layer.

    A task's content is the tar that its latents were made from. A repair writes a generation of the
    same content, a renewal one of another: ``content_since`` is the first generation of this one.
    """

    schema_version: Literal[1, 2] = 2
    layer: str
    task: str
    generation: int = Field(ge=0, le=9999)
    status: Status = "stored"
    attempt: InnerPath
    rows: dict[str, int]  # pairs, views, prompts, masks, ignores
    pairs_sha256: str  # over (key, view, flipped, phrase, prompt) of every pair in order
    latents_generation: int | None = None  # the latents commit that a features commit reads
    source_sha256: str | None = None  # a features commit's: of the tar that its latents are from
    content_since: int = Field(default=0, ge=0)  # a latents commit's
    source: SourceTar | None = None  # a latents commit's
    accounting: Accounting | None = None  # a latents commit's
    files: tuple[CommittedFile, ...]
    files_version: Literal[1, 2] = 2  # of the record with which they were written, if that is older
    provenance: dict[str, Any] = Field(default_factory=dict)

    @field_validator("rows")
    @classmethod
    def _rows(cls, rows: dict[str, int]) -> dict[str, int]:
        if set(rows) == _FIRST_ROWS:  # of version 1: each pair has a mask
            rows = {**rows, "masks": rows["pairs"], "ignores": 0}
        if set(rows) != _ROWS or min(rows.values()) < 0:
            raise ValueError(f"rows must count {', '.join(sorted(_ROWS))}, got {rows}")
        return rows

    @property
    def name(self) -> str:
        """The record's path in the store."""
        return record_path(self.layer, self.task, self.generation)

    @property
    def data_folder(self) -> str:
        """The attempt's folder in the store."""
        return f"{self.layer}/data/{self.task}/{self.attempt}"

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)

    @property
    def has_first_files(self) -> bool:
        """Whether its files are such as records of version 1 list."""
        return min(self.schema_version, self.files_version) == 1

    def restate(self, status: Status, *, generation: int) -> "Commit":
        """Return a later record of the task that says another status of the same content.

        It lists the same files; where they are gone or go with it, none.
        """
        changes: dict[str, Any] = {"schema_version": RECORD_VERSION, "status": status}
        changes |= {"generation": generation, "files_version": 1 if self.has_first_files else 2}
        if status in GONE:
            changes |= {"files": (), "rows": dict.fromkeys(self.rows, 0)}
        return self.model_copy(update=changes)


def record_path(layer: str, task: str, generation: int) -> str:
    """Return the path of a commit record in the store."""
    return f"{layer}/commits/{task}.{generation:04d}.json"


def new_attempt(generation: int) -> str:
    """Return a fresh attempt's name: the generation that it would commit, and one of 2**64."""
    return f"{generation:04d}-{secrets.token_hex(8)}"


def attempt_generation(attempt: str) -> int | None:
    """Return the generation that an attempt's name says, None where it says none.

    Attempts of the first version did not; nothing can be told of those without a record.
    """
    match = _ATTEMPT_NAME.fullmatch(attempt)
    return int(match["generation"]) if match else None


class RecordName(NamedTuple):
    """A commit record as a listing of ``commits/`` shows it."""

    task: str
    generation: int


def list_generations(storage: Storage, layer: str) -> dict[str, list[int]]:
    """Return task → the generations of its commit records, ascending, from one listing."""
    found: dict[str, list[int]] = {}
    for name in storage.list_names(f"{layer}/commits"):
        match = _RECORD_NAME.fullmatch(name)
        if match is not None:  # else a temporary file of a writer at work
            found.setdefault(match["task"], []).append(int(match["generation"]))
    for generations in found.values():
        generations.sort()
    return found


def list_records(storage: Storage, layer: str) -> dict[str, RecordName]:
    """Return task → its newest commit record, from one listing, without reading the records.

    Which records are read, ``current.list_current`` tells.
    """
    found = list_generations(storage, layer)
    return {task: RecordName(task, generations[-1]) for task, generations in found.items()}


def seal_record(text: bytes) -> bytes:
    """Return a record's JSON (indented by 1) with the SHA-256 over all of it as the last field."""
    body = text.removesuffix(_END)
    return body + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"' + _END


def unseal_record(data: bytes) -> bytes:
    """Check a record's seal and return its JSON without it; the first version has no seals."""
    body, seal, digest = data.rpartition(_SEAL)
    if not seal:
        return data
    if digest != hashlib.sha256(body).hexdigest().encode() + b'"' + _END:
        raise ValueError("its SHA-256 is not the one that was written")
    return body + _END


def read_commit(storage: Storage, layer: str, record: RecordName) -> Commit:
    """Read one commit record.

    Raises:
        NewerRecordError: a later version of ldznet has written it.
        DamagedStoreError: unreadable, or not the record of this layer, task and generation.
    """
    path = record_path(layer, record.task, record.generation)
    try:
        data = unseal_record(storage.read(path))
        match = _VERSION.match(data)
        if match and int(match[1]) > RECORD_VERSION:
            raise NewerRecordError(
                f"{storage.url}/{path}: was written by a newer ldznet (a record of version "
                f"{int(match[1])}, and this one reads up to {RECORD_VERSION}); install that "
                "version. Nothing was changed"
            )
        commit = Commit.model_validate_json(data)
    except NewerRecordError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise DamagedStoreError(
            f"{path}: the commit record cannot be read ({error}); the task's data is kept. "
            "Restore the record from a backup, or encode the task anew: ldznet verify STORE "
            "--report FILE, then the command that encoded it with --repair FILE"
        ) from error
    if (commit.layer, commit.task, commit.generation) != (layer, record.task, record.generation):
        raise DamagedStoreError(f"{path}: the record is that of {commit.name}")
    inside = commit.data_folder.removeprefix(f"{layer}/") + "/"
    if any(not file.path.startswith(inside) for file in commit.files):
        raise DamagedStoreError(f"{path}: lists a file outside {commit.data_folder}")
    return commit


def verify_written(storage: Storage, files: Iterable[WrittenFile]) -> None:
    """Read every file back; DamagedStoreError where size or SHA-256 is not what was written."""
    written = list(files)
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        digests = list(pool.map(lambda file: storage.digest(file.path), written))
    for file, (num_bytes, sha256) in zip(written, digests, strict=True):
        if (num_bytes, sha256) != (file.num_bytes, file.sha256):
            raise DamagedStoreError(
                f"{file.path}: read back {num_bytes} bytes, SHA-256 {sha256[:12]}…, but wrote "
                f"{file.num_bytes} bytes, {file.sha256[:12]}…; nothing was committed"
            )


def write_commit(storage: Storage, commit: Commit) -> Literal["won", "lost"]:
    """Create the commit record, the one step that publishes a task.

    After an error, and where a record is there already, that is read: one of our attempt and status
    is success (the answer to a first try was lost), another's a lost race. No record is raised for
    the caller to try again; the PUT may still be on its way, so the attempt's files stay.

    Raises:
        DamagedStoreError: there is a record that cannot be read.
        PermissionError: denied, and no record is there.
        OSError: the storage failed and no record is there, or that cannot be told.
    """
    data = seal_record(commit.model_dump_json(indent=1).encode())
    try:
        won = storage.create(commit.name, data)
    except OSError as error:
        if not storage.exists(commit.name):
            if isinstance(error, PermissionError):
                raise
            what = f"{commit.name}: could not be committed: {error}"
            if isinstance(error, OutageError):
                raise OutageError.because(error.reason, what) from error
            raise StorageError(what) from error
        won = False
    pass_step("commit.acknowledged")
    if won:
        return "won"
    record = RecordName(commit.task, commit.generation)
    there = read_commit(storage, commit.layer, record)
    is_ours = (there.attempt, there.status) == (commit.attempt, commit.status)
    return "won" if is_ours else "lost"


def to_committed(layer: str, files: Iterable[WrittenFile]) -> tuple[CommittedFile, ...]:
    """Return files as a record lists them, relative to the layer's folder and sorted."""
    return tuple(
        CommittedFile(
            path=file.path.removeprefix(f"{layer}/"), num_bytes=file.num_bytes, sha256=file.sha256
        )
        for file in sorted(files, key=lambda file: file.path)
    )
