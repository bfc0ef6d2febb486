"""Checks a store: every file's bytes, every shard's index, every record's accounting.

Data flow: layers -> the newest record of each task -> its files read whole and hashed -> arrays,
index and rejects compared with the spec, the record and each other. Damage is collected, not
raised, so that one report names it all; ``ldznet encode --repair`` reads that report.
"""

import errno
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.progress_text import count_noun
from pipeline.base.yaml import SpecError
from pipeline.corpus.parts import pin_path, read_pin
from pipeline.spec.layer import LayerSpec
from pipeline.store.commit import (
    Commit,
    DamagedStoreError,
    RecordName,
    list_records,
    read_commit,
    record_path,
)
from pipeline.store.layout import (
    GROUP,
    INDEX,
    REJECTS,
    digest_pairs,
    index_schema,
    list_arrays,
)
from pipeline.store.records import RecordTable, describe_commit, inventory_folder, read_rows
from pipeline.store.store import Store
from pipeline.store.task_ids import list_part_ids, parse_part_id

REPORT_VERSION = 1
# What a file system says of a file that it holds and cannot give. Anything else (denied, a server
# that does not answer, too many open files) tells nothing of the file and ends the verification.
_DAMAGE_ERRNOS = {
    *(errno.EIO, errno.EBADMSG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    *({errno.EUCLEAN} if hasattr(errno, "EUCLEAN") else ()),  # of Linux' ext4 and xfs alone
}
_ROWS = {"latent_row": "views", "text_row": "prompts", "mask_row": "masks", "ignore_row": "ignores"}


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing wrong: in which task's commit, at which path of the store, and what."""

    layer: str
    task: str
    generation: int
    path: str
    what: str


@dataclass(slots=True)
class VerifyTotals:
    """What checking one commit, or several added up, came to."""

    num_commits: int = 0
    num_files: int = 0  # that were read
    num_bytes: int = 0  # of these
    damage: list[Damage] = field(default_factory=list)

    def add(self, other: Self) -> None:
        """Add what checking other commits came to."""
        self.num_commits += other.num_commits
        self.num_files += other.num_files
        self.num_bytes += other.num_bytes
        self.damage += other.damage

    def write(self, path: Path) -> None:
        """Write the damage as the JSON that ``ldznet encode --repair`` reads."""
        plain = {"schema_version": REPORT_VERSION, "damage": [asdict(d) for d in self.damage]}
        path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def read_damage(path: Path) -> list[Damage]:
    """Read the damage back from a report that ``VerifyTotals.write`` wrote.

    Raises:
        SpecError: no such file, or not such a report.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain["schema_version"] != REPORT_VERSION:
            raise SpecError(f"{path}: expected a report of version {REPORT_VERSION}")
        return [Damage(**entry) for entry in plain["damage"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(
            f"{path}: expected the report of `ldznet verify STORE --report FILE`, got "
            f"{type(error).__name__}: {error!s:.200}"
        ) from error


def count_commits(store: Store) -> int:
    """Return how many commits ``verify_store`` will check, from listings; raises as it does."""
    layers = store.list_layers(required=True)
    return sum(len(list_records(store.storage, layer.folder)) for layer in layers)


def verify_store(store: Store, *, num_threads: int = 8) -> Iterator[VerifyTotals]:
    """Check the newest commit of every task of every layer, several at once, in no order.

    Raises:
        SpecError: there is no store, or a layer of a later version.
        DamagedStoreError: a layer's spec cannot be read; nothing of the layer can be checked.
        MissingStoreError: the store went away meanwhile.
        OSError: the storage fails or denies access, which tells nothing of what it holds.
    """
    layers = {layer.folder: layer for layer in store.list_layers(required=True)}
    # Features first: a task commits them last, so that the listing of the latents, taken after,
    # holds those of every features commit, also where an encode run is at work.
    records = {folder: list_records(store.storage, folder) for folder in reversed(layers)}
    with ThreadPoolExecutor(num_threads) as pool:
        for folder in layers:
            names = list(records[folder].values())
            table = RecordTable(store, folder)
            # In slices: a store has more tasks than futures should wait in memory.
            for start in range(0, len(names), 64 * num_threads):
                part = names[start : start + 64 * num_threads]
                verify = partial(verify_task, store, layers, records, layers[folder])
                yield from pool.map(verify, part, table.select(part).to_pylist())
            store.check_there(folder)  # or all that was found tells of a store that went away


def verify_task(
    store: Store,
    layers: dict[str, LayerSpec],
    records: dict[str, dict[str, RecordName]],
    layer: LayerSpec,
    record: RecordName,
    row: dict[str, Any],
) -> VerifyTotals:
    """Check one commit.

    Args:
        records: the newest of each layer, by task.
        row: what the table of records says of this one; values are None where it says nothing.
    """
    check = _CommitCheck(store, layer, record)
    commit = check.read_record()
    if commit is not None:
        check.check_row(commit, row)
        if commit.status != "stored":
            return check.found  # retired: nobody reads its files, and gc may have removed them
        check.check_files(commit)
        check.check_arrays(commit)
        if layer.kind == "latents":
            check.check_index(commit)
            check.check_source(commit, records[layer.folder])
        else:
            check.check_latents(commit, records.get(layer.latents_folder, {}), layers)
    return check.found


class _CommitCheck:
    """What is found of one commit; a file that is damaged is not looked into any further."""

    def __init__(self, store: Store, layer: LayerSpec, record: RecordName) -> None:
        self._store, self._layer, self._record = store, layer, record
        self._sound: set[str] = set()  # paths below the attempt whose bytes are as committed
        self.found = VerifyTotals(num_commits=1)

    def _add(self, path: str, what: str) -> None:
        layer, record = self._layer.folder, self._record
        self.found.damage.append(Damage(layer, record.task, record.generation, path, what))

    def read_record(self) -> Commit | None:
        """Return the commit; None where its record is damaged."""
        layer, record = self._layer.folder, self._record
        try:
            return read_commit(self._store.storage, layer, record)
        except (DamagedStoreError, OSError) as error:
            path = record_path(layer, record.task, record.generation)
            self._add(path, _describe_error(error))
            return None

    def check_row(self, commit: Commit, row: dict[str, Any]) -> None:
        """Compare the table of records, by which readers count pairs, with the record."""
        if row["record"] is None:
            return
        found = describe_commit(commit)
        wrong = [key for key, value in found.items() if row[key] != value]
        if wrong:
            said = ", ".join(f"{key} {row[key]!r} instead of {found[key]!r}" for key in wrong)
            self._add(
                inventory_folder(self._layer.folder),
                f"the table of records says {said} of {self._record.task}; it is a cache: remove "
                "the folder, and it is made anew",
            )

    def check_files(self, commit: Commit) -> None:
        """Read every file whole and compare size and SHA-256."""
        for file in commit.files:
            path = f"{commit.layer}/{file.path}"
            try:
                num_bytes, sha256 = self._store.storage.digest(path)
            except OSError as error:
                self._add(path, _describe_error(error))
                continue
            self.found.num_files += 1
            self.found.num_bytes += num_bytes
            if num_bytes != file.num_bytes:
                self._add(path, f"expected {file.num_bytes} bytes, got {num_bytes}")
            elif sha256 != file.sha256:
                self._add(path, f"expected SHA-256 {file.sha256[:12]}…, got {sha256[:12]}…")
            else:
                self._sound.add(path.removeprefix(f"{commit.data_folder}/"))

    def check_arrays(self, commit: Commit) -> None:
        """Check arrays against the spec, and shards' indexes against the rows they must have."""
        listed = {
            f"{commit.layer}/{f.path}".removeprefix(f"{commit.data_folder}/") for f in commit.files
        }
        wanted = {f"{GROUP}/zarr.json"}
        for name in list_arrays(self._layer, commit.rows):
            metadata = f"{GROUP}/{name}/zarr.json"
            wanted.add(metadata)
            if metadata not in self._sound:
                continue
            try:
                array = self._store.open_array(self._layer, commit, name)
            except DamagedStoreError as error:
                self._add(f"{commit.data_folder}/{metadata}", str(error))
                continue
            # One more than are listed is enough to find one that is not; they may be without end.
            for number in range(min(array.num_shards, len(listed) + 1)):
                path = f"{GROUP}/{name}/{array.schema.shard_key(number)}"
                wanted.add(path)
                if path in self._sound and (what := array.find_index_fault(number)):
                    self._add(f"{commit.data_folder}/{path}", what)
        if self._layer.kind == "latents":
            wanted |= {INDEX, REJECTS}
        for path in sorted(wanted - listed):
            self._add(f"{commit.data_folder}/{path}", "the commit record does not list it")

    def check_index(self, commit: Commit) -> None:
        """Check index and rejects against the record's rows, digest and accounting."""
        if not {INDEX, REJECTS} <= self._sound:
            return
        try:
            index = self._store.read_index(commit)
            rejects = self._store.read_rejects(commit)
            faults = list(_find_index_faults(self._layer, commit, index, rejects))
        except (DamagedStoreError, pa.ArrowException) as error:
            faults = [str(error)]
        for what in faults:
            self._add(f"{commit.data_folder}/{INDEX}", what)

    def check_source(self, commit: Commit, records: dict[str, RecordName]) -> None:
        """Check that a part of a long tar was read from the same version of it as the others.

        The pin says which. A damaged pin is reported once, with the first part that is there, and
        the other parts are then compared with that one. Of a tar that was renewed readers choose
        the parts of one version themselves.
        """
        found = parse_part_id(commit.task)
        if found is None or commit.source is None:  # without a source: reported by check_index
            return
        tar_id, _, num_parts = found
        parts = [part for part in list_part_ids(tar_id, num_parts) if part in records]
        if self._is_renewed(commit.layer, [records[part] for part in parts]):
            return
        path = pin_path(commit.layer, tar_id)
        try:
            pin = read_pin(self._store.storage, commit.layer, tar_id)
            fault = "" if pin else "missing; repairing this task makes it from a committed part"
        except (DamagedStoreError, OSError) as error:
            pin, fault = None, _describe_error(error)
        if pin is not None:
            self._compare_source(commit, (pin.sha256, pin.num_bytes), by=path)
            return
        if commit.task == parts[0]:
            self._add(path, fault)
            return
        record = records[parts[0]]
        try:
            source = read_commit(self._store.storage, commit.layer, record).source
        except (DamagedStoreError, OSError) as error:
            _describe_error(error)  # reported where that commit is checked
            return
        if source is not None:
            path = record_path(commit.layer, record.task, record.generation)
            self._compare_source(commit, (source.sha256, source.num_bytes), by=path)

    def _is_renewed(self, layer: str, parts: Sequence[RecordName]) -> bool:
        """Return whether any part's newest record is of a later content than its first."""
        later = [record for record in parts if record.generation > 0]
        if not later:
            return False
        rows = read_rows(self._store, layer, later, ("content_since",))
        return bool(pc.any(pc.greater(rows["content_since"], 0)).as_py())

    def _compare_source(self, commit: Commit, expected: tuple[str, int], *, by: str) -> None:
        assert commit.source is not None, "it was looked at before"
        got = (commit.source.sha256, commit.source.num_bytes)
        if got != expected:
            self._add(
                commit.name,
                f"its tar had SHA-256 {got[0][:12]}… and {got[1]} bytes, but {by} says "
                f"{expected[0][:12]}… and {expected[1]}: parts of two versions of a tar lose "
                "samples or hold them twice; encode one version into another store, or, where a "
                "pin differs from all parts alike, remove it: it is made from them anew",
            )

    def check_latents(
        self, commit: Commit, latents: dict[str, RecordName], layers: dict[str, LayerSpec]
    ) -> None:
        """Check that a features commit has the rows of its latents."""
        record = latents.get(commit.task)
        folder = self._layer.latents_folder
        if folder not in layers or record is None:
            self._add(commit.name, f"its latents, task {commit.task} of {folder}, are not there")
            return
        there = self._read_latents(folder, commit, record)
        if there is not None and there.pairs_sha256 != commit.pairs_sha256:
            self._add(commit.name, f"its rows are not those of {there.name}")

    def _read_latents(self, folder: str, commit: Commit, newest: RecordName) -> Commit | None:
        """Return the latents that features were made from, or what took their place by a repair.

        Features of a tar that was renewed are older than its newest latents, which is no damage.
        """
        made_from = RecordName(commit.task, commit.latents_generation or 0)
        for record in dict.fromkeys((made_from, newest)):
            try:
                return read_commit(self._store.storage, folder, record)
            except DamagedStoreError:
                continue  # the newest one's is reported where the latents layer is checked
        return None


def _describe_error(error: DamagedStoreError | OSError) -> str:
    """Return what a file's error tells of the file; raise it again where that is nothing."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, OSError) and error.errno not in _DAMAGE_ERRNOS:
        raise error
    return str(error)


def _find_index_faults(
    layer: LayerSpec, commit: Commit, index: pa.Table, rejects: pa.Table
) -> Iterator[str]:
    if not index.schema.equals(index_schema(layer)):
        yield "the columns of the index are not those of this schema version"
        return
    if digest_pairs(index) != commit.pairs_sha256:
        yield "the pairs are not those of the commit record"
    for column, rows in _ROWS.items():
        bounds: dict[str, Any] = pc.min_max(index[column]).as_py()
        if index[column].null_count < index.num_rows and not (
            0 <= bounds["min"] <= bounds["max"] < commit.rows[rows]
        ):
            yield f"{column} must be in 0..{commit.rows[rows] - 1}, got {bounds}"
    account = commit.accounting
    if account is None or commit.source is None:
        yield "the commit record has no accounting or no source"
        return
    levels = Counter(rejects["level"].to_pylist())
    found = {
        "stored_samples": len(set(index["key"].to_pylist())),
        **{f"rejected_{level}s": levels[level] for level in ("sample", "member", "pair")},
        "rejects": dict(Counter(rejects["reason"].to_pylist())),
    }
    recorded = {name: getattr(account, name) for name in found}
    wrong = {name for name in found if recorded[name] not in (None, found[name])}
    if not account.balanced or wrong:
        yield (
            f"accounting: of {account.samples} samples the record counts {recorded}, the tables "
            f"hold {found}"
        )


def describe_damage(
    damage: Sequence[Damage], *, verify: str, report: str | None = None, most: int = 20
) -> list[str]:
    """Return a line a damage, the first ``most``, and what to do; ``verify`` is this command."""
    lines = [f"damaged {d.path}: {d.what}" for d in damage[:most]]
    if (more := len(damage) - most) > 0:
        lines.append(f"… and {more} more; {report or '--report FILE'} lists them all")
    tasks = {(d.layer, d.task) for d in damage if d.path != inventory_folder(d.layer)}
    if tasks:
        first = "" if report else f"{verify} --report damage.json, then "
        lines.append(
            f"{count_noun(len(tasks), 'task')} damaged. Nothing was changed. To encode them anew: "
            f"{first}the command that encoded them with --repair {report or 'damage.json'}"
        )
    return lines
