"""Asynchronous writer of checkpoints: copies tensors to host memory, then a thread writes files.

Data flow: weights and optimizer state -> host buffers that are reused -> files in a temporary
folder, each flushed, the record last -> one rename -> ``OUT/best`` links to it if it is the best ->
old checkpoints are removed. Whenever the process dies, every folder under a checkpoint's name is
whole; an unfinished one has a temporary name that no reader looks for (``step_folders``).
"""

import copy
import errno
import logging
import secrets
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from models.heads.head import Head
from pipeline.base.failpoints import pass_step
from pipeline.base.whole_file import sync_path, write_new_folder, write_whole
from pipeline.runs.checkpoint import (
    BEST,
    CHECKPOINTS,
    TRAINING,
    CheckpointRecord,
    DamagedCheckpointError,
    find_best,
    list_checkpoints,
    read_record,
    sum_file,
    verify_files,
    write_record,
)
from pipeline.runs.config import TrainConfig
from pipeline.runs.step_folders import (
    name_step,
    parse_step,
    publish_folder,
    remove_folder,
    restore_replaced,
)

logger = logging.getLogger(__name__)

_CLAIM = ".writer"  # names the writer that came last
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class TakenOverError(RuntimeError):
    """Another run has begun to write to the same ``--out``."""


class CheckpointWriter:
    """Writes the checkpoints of a run under ``out``, one at a time.

    Only the writer made last may write. An earlier one, as of a worker that hung and was replaced,
    fails at its next checkpoint; its unfinished folders are removed.
    """

    def __init__(self, out: Path, *, num_kept: int, first_step: int) -> None:
        """Open the checkpoints of a run that has made ``first_step`` steps.

        Checkpoints of later steps are damaged, or the run would have been resumed from them. They
        are renamed to ``.damaged-step-N``, so that none is taken for the newest, and the next
        writer removes them.
        """
        self._out, self._num_kept = out, num_kept
        self._folder = out / CHECKPOINTS
        self._folder.mkdir(parents=True, exist_ok=True)
        self._token = secrets.token_hex(8)
        write_whole(self._folder / _CLAIM, self._token)
        restore_replaced(self._folder)
        self._clear(first_step)
        self._mend_best()
        self._host = _HostCopy()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self, average: Head, record: CheckpointRecord, training: Mapping[str, Tensor], *, best: bool
    ) -> None:
        """Copy a checkpoint to host memory and have a thread write it.

        First waits until the checkpoint before it is written. The tensors may change as soon as
        this returns. With ``best``, ``OUT/best`` links to it, and it is kept until there is a
        better one.

        Raises:
            OSError: the checkpoint before it could not be written, for example because the disk is
                full; those on disk stay.
            TakenOverError: another writer was opened since.
        """
        self.wait()
        head, copied = self._host.copy(average, training)
        record = record.model_copy(update={"best": best})
        self._pending = self._pool.submit(self._write, head, record, copied)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; raises its error, once, as ``save`` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise the error of the last write if that has ended; cheap, so call it at every step."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Wait for the last checkpoint and raise its error; may be called again."""
        with self._pool:
            self.wait()

    def _write(self, head: Head, record: CheckpointRecord, training: Mapping[str, Tensor]) -> None:
        folder = self._folder / name_step(record.step)
        temporary = self._folder / f".{folder.name}-{self._token}"
        try:
            with write_new_folder(temporary) as new:
                pass_step("checkpoint.opened")
                head.save_pretrained(new)
                save_file(dict(training), new / TRAINING)
                files = {path.name: sum_file(path) for path in sorted(new.iterdir())}
                write_record(new, record.model_copy(update={"files": files}))
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
        try:
            temporary.symlink_to(folder.relative_to(self._out))
        except OSError as error:
            if place.is_symlink() or error.errno in _NO_SPACE:
                raise
            logger.warning(
                "%s: its file system makes no symbolic links (%s); the best checkpoint so far is "
                "%s, which --checkpoint finds by the name %s all the same",
                *(self._out, error.strerror, folder, place),
            )
            return
        temporary.replace(place)
        sync_path(self._out)

    def _mend_best(self) -> None:
        """Link the newest undamaged checkpoint marked as best, if a killed run did not."""
        place = self._out / BEST
        for folder in reversed(list_checkpoints(self._out)):
            try:
                record = read_record(folder)
                if not record.best:
                    continue
                if place.is_symlink() and place.resolve() == folder.resolve():
                    return
                verify_files(folder, record)
            except DamagedCheckpointError as error:
                logger.warning("%s; it is not linked as the best", error)
                continue
            self._link_best(folder)
            return
        if place.is_symlink() and not place.exists():  # its checkpoint was set aside
            place.unlink()

    def _prune(self) -> None:
        best = find_best(self._out)
        for old in list_checkpoints(self._out)[: -self._num_kept]:
            if best is None or old.resolve() != best.resolve():
                remove_folder(old)

    def _clear(self, first_step: int) -> None:
        """Remove what earlier writers left unfinished, and set later checkpoints aside."""
        for left in self._folder.glob(".*step-*"):
            shutil.rmtree(left, ignore_errors=True)
        for left in [*self._folder.glob(f".{_CLAIM}-*"), *self._out.glob(f".{BEST}-*")]:
            left.unlink(missing_ok=True)
        for folder in list_checkpoints(self._out):
            if parse_step(folder) > first_step:
                aside = folder.with_name(f".damaged-{folder.name}")
                logger.warning(
                    "%s: the run goes on from step %d; it is %s until the next start",
                    *(folder, first_step, aside.name),
                )
                folder.rename(aside)


def check_room(out: Path, config: TrainConfig, *, num_bytes: int, first_step: int) -> None:
    """Check that the checkpoints that a run will write, of ``num_bytes`` each, fit into ``out``.

    At once there are the newest ``keep_checkpoints``, the one being written and, where it is not
    among them, the best, without which a lack of room is a warning. A quota is not seen.

    Raises:
        OSError: they do not fit.
    """
    usage = shutil.disk_usage(out)
    every, room = config.checkpoint_every, config.keep_checkpoints + 1 - len(list_checkpoints(out))
    num = max(1, min(room, -(-config.num_steps // every) - first_step // every))
    if not usage.total or usage.free >= (num + 1) * num_bytes:  # 0: the file system does not tell
        return
    what = (
        f"{out}: the {num} checkpoints to come take {num_bytes / 1e6:.1f} MB each, and the best "
        f"may be one more, but {usage.free / 1e6:.1f} MB are free. Free some space, lower "
        "keep_checkpoints, or give another --out"
    )
    if usage.free < num * num_bytes:
        raise OSError(errno.ENOSPC, what)
    logger.warning("%s", what)


class _HostCopy:
    """Buffers in host memory for a checkpoint's tensors, reused for each checkpoint."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._head: Head | None = None

    def copy(self, average: Head, training: Mapping[str, Tensor]) -> tuple[Head, dict[str, Tensor]]:
        """Return copies of the head and of the training state, on the CPU."""
        ours = {f"average/{name}": value for name, value in average.state_dict().items()}
        values = {**training, **ours}
        copied = {name: self._copy_tensor(name, value) for name, value in values.items()}
        if any(value.is_cuda for value in values.values()):
            torch.cuda.synchronize()
        if self._head is None:
            self._head = _copy_around(average, copied)
        return self._head, {name: copied[name] for name in training}

    def _copy_tensor(self, name: str, value: Tensor) -> Tensor:
        value = value.detach()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(value, non_blocking=value.is_cuda)


def _copy_around(head: Head, copied: Mapping[str, Tensor]) -> Head:
    """Return a copy of a head that shares its weights' memory with the tensors given."""
    memo: dict[int, object] = {}
    for name, value in head.named_parameters():
        memo[id(value)] = nn.Parameter(copied[f"average/{name}"], requires_grad=False)
    for name, buffer in head.named_buffers():
        memo[id(buffer)] = copied.get(f"average/{name}", buffer.detach().cpu())
    return copy.deepcopy(head, memo)


def _explain(error: OSError | SafetensorError, folder: Path) -> OSError:
    """Return an error that also says what to do."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None:  # safetensors says it in words: "… (os error 28)"
        number = next((n for n in _NO_SPACE if f"os error {n})" in str(error)), errno.EIO)
    what, advice = f"the checkpoint could not be written: {error}", ""
    if number in _NO_SPACE:
        free = shutil.disk_usage(folder.parent).free
        what = f"no space for the checkpoint, {free / 1e6:.0f} MB are free"
        advice = ". Free some space and go on with --resume"
    return OSError(number, f"{folder}: {what}; the checkpoints before it stay{advice}")
