"""Writing checkpoints beside the training: copied to host memory at once, to disk by a thread.

Data flow: weights and optimizer state -> host buffers, the same ones each time -> a folder beside
its place, every file flushed, the record last -> one rename -> ``OUT/best`` moves -> old ones go.
Whenever the process dies, ``OUT/checkpoints`` holds whole checkpoints under their names, and what
is not whole under names that nobody reads (``step_folders``).
"""

import copy
import errno
import logging
import secrets
import shutil
import threading
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from models.heads.head import Head
from pipeline.base.failpoints import pass_step
from pipeline.base.whole_file import sync_path
from pipeline.runs.checkpoint import (
    BEST,
    CHECKPOINTS,
    RECORD,
    TRAINING,
    CheckpointRecord,
    DamagedCheckpointError,
    check_files,
    list_checkpoints,
    read_record,
    sum_file,
    write_record,
)
from pipeline.runs.state import TrainingState
from pipeline.runs.step_folders import (
    find_step,
    name_step,
    publish_folder,
    remove_folder,
    restore_replaced,
)

logger = logging.getLogger(__name__)

_CLAIM = ".writer"  # names the writer that came last
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class TakenOverError(RuntimeError):
    """Another run writes to the same ``--out`` since."""


class CheckpointWriter:
    """Writes the checkpoints of a run under ``out``, one at a time.

    The writer made last is the one that may: an earlier one, such as that of a worker that hung and
    was replaced, fails at its next checkpoint. So what an earlier one left half written can go.
    """

    def __init__(self, out: Path, *, num_kept: int, first_step: int) -> None:
        """Open the checkpoints of a run whose next step is the one after ``first_step``.

        Any past it are damaged, or resuming would have found them: they are set aside, as
        ``.damaged-step-N`` until the next writer, so that none is taken for the run's newest.
        """
        if num_kept < 1:
            raise ValueError(f"num_kept: expected at least 1 checkpoint, got {num_kept}")
        self._out, self._num_kept = out, num_kept
        self._folder = out / CHECKPOINTS
        self._folder.mkdir(parents=True, exist_ok=True)
        self._token = secrets.token_hex(8)
        claim = self._folder / f"{_CLAIM}-{self._token}"
        claim.write_text(self._token, encoding="utf-8")
        claim.replace(self._folder / _CLAIM)
        for restored in restore_replaced(self._folder):
            logger.info("%s: has its name again; its successor was not written", restored)
        self._remove_leftovers()
        self._set_aside(first_step)
        self._mend_best()
        self._host = _HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, average: Head, record: CheckpointRecord, training: TrainingState, *, best: bool
    ) -> None:
        """Copy a checkpoint to host memory and have a thread write it.

        Waits for the checkpoint before it to be written. What is passed may change as soon as this
        returns. ``best`` says that it is the best so far: ``OUT/best`` will link to it, and it
        stays until there is a better one.

        Raises:
            OSError: the checkpoint before it could not be written, as the disk is full or the
                like; what was there stays.
            TakenOverError: another writer has come.
        """
        self.wait()
        head, flat = self._host.take(average, training)
        record = record.model_copy(update={"best": best})
        self._thread = threading.Thread(
            target=self._write_or_keep_error,
            args=(head, record, flat),
            name=f"checkpoint-{record.step}",
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was saved is on disk.

        Raises:
            OSError, TakenOverError: as ``save``, of the last checkpoint.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def check(self) -> None:
        """Raise what the last write ended with, if it did; costs nothing, so call it often.

        Raises:
            OSError, TakenOverError: as ``save``, of the last checkpoint.
        """
        if self._error is not None:
            self.wait()

    def close(self) -> None:
        """Wait for the last checkpoint; raises as ``wait``. May be called again."""
        self.wait()

    def _write_or_keep_error(
        self, head: Head, record: CheckpointRecord, flat: Mapping[str, Tensor]
    ) -> None:
        try:
            self._write(head, record, flat)
        except BaseException as error:  # noqa: BLE001  raised where the run waits
            self._error = error

    def _write(self, head: Head, record: CheckpointRecord, flat: Mapping[str, Tensor]) -> None:
        folder = self._folder / name_step(record.step)
        temporary = self._folder / f".{folder.name}-{self._token}"
        try:
            temporary.mkdir()
            pass_step("checkpoint.opened")
            _write_files(temporary, head, record, flat)
            pass_step("checkpoint.written")
            self._check_claim()
            publish_folder(temporary, folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            self._check_claim()
            raise _explain(error, folder) from error
        pass_step("checkpoint.renamed")
        if record.best:
            self._link_best(folder)
            pass_step("checkpoint.linked")
        self._prune()
        pass_step("checkpoint.pruned")

    def _check_claim(self) -> None:
        found = (self._folder / _CLAIM).read_text(encoding="utf-8")
        if found != self._token:
            raise TakenOverError(
                f"{self._folder}: another run writes its checkpoints here since; this one ends. "
                "Give each run an --out of its own"
            )

    def _link_best(self, folder: Path) -> None:
        place = self._out / BEST
        if place.is_dir() and not place.is_symlink():  # copied by what follows links
            aside = next(p for n in count(1) if not (p := self._out / f"{BEST}.old-{n}").exists())
            logger.warning("%s: expected a link, got a folder; it is %s now", place, aside.name)
            place.rename(aside)
        temporary = self._out / f".{BEST}-{self._token}"
        temporary.symlink_to(folder.relative_to(self._out))
        temporary.replace(place)
        sync_path(self._out)

    def _mend_best(self) -> None:
        """Link the newest checkpoint that was best: a kill may have come before its link."""
        place = self._out / BEST
        for folder in reversed(list_checkpoints(self._out)):
            try:
                record = read_record(folder)
                if not record.best:
                    continue
                if place.is_symlink() and place.resolve() == folder.resolve():
                    return
                check_files(folder, record)
            except DamagedCheckpointError as error:
                logger.warning("%s; it is not linked as the best", error)
                continue
            self._link_best(folder)
            return
        if place.is_symlink() and not place.exists():  # it was set aside
            place.unlink()

    def _prune(self) -> None:
        best = (self._out / BEST).resolve()
        for old in list_checkpoints(self._out)[: -self._num_kept]:
            if old.resolve() != best:
                remove_folder(old)

    def _set_aside(self, first_step: int) -> None:
        for folder in list_checkpoints(self._out):
            if find_step(folder) > first_step:
                aside = folder.with_name(f".damaged-{folder.name}")
                logger.warning(
                    "%s: the run goes on from step %d; it is %s until the next start",
                    folder,
                    first_step,
                    aside.name,
                )
                folder.rename(aside)

    def _remove_leftovers(self) -> None:
        """Remove what writers before this one left unnamed; they will not give it a name now."""
        for left in self._folder.glob(".*step-*"):
            logger.info("%s: left by an earlier run; removed", left)
            shutil.rmtree(left, ignore_errors=True)
        for left in [*self._folder.glob(f"{_CLAIM}-*"), *self._out.glob(f".{BEST}-*")]:
            left.unlink(missing_ok=True)


class _HostCopy:
    """A checkpoint's tensors in host memory that is used again for the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._head: Head | None = None

    def take(self, average: Head, training: TrainingState) -> tuple[Head, dict[str, Tensor]]:
        """Return a copy of the head, on the CPU, and the training state's tensors by file name."""
        flat = training.flatten()
        ours = {f"average/{name}": value for name, value in average.state_dict().items()}
        copied = {name: self._copy(name, value) for name, value in {**flat, **ours}.items()}
        if any(value.is_cuda for value in (*flat.values(), *ours.values())):
            torch.cuda.synchronize()
        if self._head is None:
            self._head = _copy_around(average, copied)
        return self._head, {name: copied[name] for name in flat}

    def _copy(self, name: str, value: Tensor) -> Tensor:
        value = value.detach()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(value, non_blocking=value.is_cuda)


def _copy_around(head: Head, copied: Mapping[str, Tensor]) -> Head:
    """Return a copy of a head whose weights are the tensors given, which stay the caller's."""
    memo: dict[int, object] = {}
    for name, value in head.named_parameters():
        memo[id(value)] = nn.Parameter(copied[f"average/{name}"], requires_grad=False)
    for name, buffer in head.named_buffers():
        memo[id(buffer)] = copied.get(f"average/{name}", buffer.detach().cpu())
    return copy.deepcopy(head, memo)


def _write_files(
    folder: Path, head: Head, record: CheckpointRecord, flat: Mapping[str, Tensor]
) -> None:
    """Write and flush a checkpoint's files into an empty folder, the record after the others."""
    head.save_pretrained(folder)
    training = folder / TRAINING
    save_file(dict(flat), training)
    training.chmod(folder.stat().st_mode & 0o666)  # safetensors gives it to its owner alone
    files = {}
    for path in sorted(folder.iterdir()):
        sync_path(path)
        files[path.name] = sum_file(path)
    write_record(folder, record.model_copy(update={"files": files}))
    sync_path(folder / RECORD)
    sync_path(folder)


def _explain(error: OSError | SafetensorError, folder: Path) -> OSError:
    """Return the error with what to do about it."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None:  # safetensors says it in words: "… (os error 28)"
        number = next((n for n in _NO_SPACE if f"os error {n})" in str(error)), errno.EIO)
    if number in _NO_SPACE:
        free = shutil.disk_usage(folder.parent).free
        return OSError(
            number,
            f"{folder}: no space for the checkpoint, {free / 1e6:.0f} MB are free; the "
            "checkpoints before it stay. Free some space and go on with --resume",
        )
    return OSError(
        number,
        f"{folder}: the checkpoint could not be written: {error}; the checkpoints before it stay",
    )
