"""Overlaps upload, compute and download on one device.

On CUDA one side stream uploads a batch's inputs from pinned memory and another downloads its
results to pinned memory, while the thread that starts the work runs at most ``RUN_AHEAD`` batches
ahead of the device. On a CPU everything is done at once, in the calling thread.
"""

import logging
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.stage.stored_form import Stored

logger = logging.getLogger(__name__)

RUN_AHEAD = 2
"""Batches started and not done: one computed, one waiting; each holds its results' memory."""
# RuntimeErrors that mean the same as torch.OutOfMemoryError.
_MEMORY_ERRORS = ("CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
_DEVICE_ERRORS = re.compile(
    r"(CUDA|HIP) error(?!: out of memory)|CUDA driver|CUDA unknown|[Nn]o CUDA|CUDA-capable"
    r"|CU(DNN|BLAS)_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR|EXECUTION_FAILED|MAPPING_ERROR)"
)


def is_device_fault(error: Exception) -> bool:
    """Return whether an error says that the GPU, or this process' use of it, is broken.

    Short memory is none: it may be the batch's fault.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    return bool(_DEVICE_ERRORS.search(str(error)))


@dataclass(slots=True)
class BusyTime:
    """How long a device computed, from when to when, in seconds of ``time.perf_counter``."""

    first_s: float = math.inf
    last_s: float = -math.inf
    busy_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, duration_s: float, *, end_s: float) -> None:
        """Add a batch that ended at ``end_s``; on CUDA that is when its results were downloaded."""
        with self._lock:
            self.first_s = min(self.first_s, end_s - duration_s)
            self.last_s = max(self.last_s, end_s)
            self.busy_s += duration_s


class Pending:
    """Results of a batch that are being downloaded to host memory.

    ``busy_s`` is how long the device computed them, known once ``wait`` has returned.
    """

    def __init__(self, host: Stored, *, busy_s: float = 0.0) -> None:
        self._host = host
        self.busy_s = busy_s

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        return sum(values.nbytes for values in self._host.values.values())

    def wait(self) -> dict[str, np.ndarray]:
        """Wait for the download, and return array name → values.

        Raises:
            FloatingPointError: a value is NaN, infinite or beyond float16's 65,504; says how many.
        """
        return self._host.to_arrays()


class _PendingCuda(Pending):
    def __init__(
        self, host: Stored, *, start: torch.cuda.Event, end: torch.cuda.Event, busy: BusyTime
    ) -> None:
        super().__init__(host)
        self._start, self._end, self._busy = start, end, busy
        self._downloaded = torch.cuda.Event(blocking=True)  # waits without using a core
        self._downloaded.record()  # on the current stream, that of the downloads

    def wait(self) -> dict[str, np.ndarray]:
        self._downloaded.synchronize()
        self.busy_s = self._start.elapsed_time(self._end) / 1000
        self._busy.add(self.busy_s, end_s=time.perf_counter())
        return super().wait()


class Device:
    """One CPU or GPU. One thread may call ``upload`` and ``run``, any thread ``pin``."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self.busy = BusyTime()
        self._is_cuda = device.type == "cuda"
        self._ahead: deque[torch.cuda.Event] = deque()
        if self._is_cuda:
            self._up = torch.cuda.Stream(device)
            self._down = torch.cuda.Stream(device)

    def pin(self, values: np.ndarray) -> Tensor:
        """Return values as a tensor in pinned memory, for an upload while the device computes."""
        tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
        return tensor.pin_memory() if self._is_cuda else tensor

    def upload(self, tensor: Tensor) -> Tensor:
        """Return a pinned tensor's copy on the device; work that is started next waits for it."""
        if not self._is_cuda:
            return tensor
        with torch.cuda.stream(self._up):
            there = tensor.to(self.torch_device, non_blocking=True)
        current = torch.cuda.current_stream(self.torch_device)
        current.wait_stream(self._up)
        there.record_stream(current)
        return there

    def run(self, compute: Callable[[], Stored]) -> Pending:
        """Start ``compute`` and the download of what it returns.

        Raises:
            torch.OutOfMemoryError: the device's memory is short.
        """
        if not self._is_cuda:
            started_s = time.perf_counter()
            stored = compute()
            busy_s = time.perf_counter() - started_s
            self.busy.add(busy_s, end_s=started_s + busy_s)
            return Pending(stored, busy_s=busy_s)
        if len(self._ahead) >= RUN_AHEAD:
            self._ahead.popleft().synchronize()
        start, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        start.record()
        stored = compute()
        end.record()
        self._ahead.append(end)
        self._down.wait_event(end)
        with torch.cuda.stream(self._down):
            return _PendingCuda(self._download(stored), start=start, end=end, busy=self.busy)

    def _download(self, stored: Stored) -> Stored:
        def copy(there: Tensor) -> Tensor:
            here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
            here.copy_(there, non_blocking=True)
            there.record_stream(self._down)
            return here

        return Stored(
            {name: copy(values) for name, values in stored.values.items()},
            {name: copy(count) for name, count in stored.num_bad.items()},
        )

    def check(self) -> None:
        """Compute a little; raises RuntimeError where the device does not."""
        torch.ones(1, device=self.torch_device).add(1).item()

    def free_memory(self) -> None:
        """Wait for what was started, and return torch's cached memory to the device."""
        while self._ahead:
            self._ahead.popleft().synchronize()
        if self._is_cuda:
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Pass:
    """A batch's work on the device: ``compute`` of rows 0 to ``num_rows``, in some passes."""

    limit: "BatchLimit"
    num_rows: int
    compute: Callable[[slice], Stored]

    def run(self, device: Device) -> Iterator[Pending]:
        """Run all rows, at most the limit's at a time; errors as ``BatchLimit.run``."""
        return self.limit.run(device, self.num_rows, self.compute)


class BatchLimit:
    """Largest number of rows of a pass, halved for good when the device runs out of memory.

    A pass that runs out of memory is first tried once more after everything that was started has
    ended and is freed: another's work may have taken the memory.
    """

    def __init__(self, num_rows: int, *, what: str) -> None:
        self.num_rows = num_rows
        self._what = what
        self._reason = ""

    def run(
        self, device: Device, num_rows: int, compute: Callable[[slice], Stored]
    ) -> Iterator[Pending]:
        """Run ``compute`` over rows 0 to ``num_rows``, at most the limit at a time.

        Raises:
            MemoryError: one row alone does not fit.
        """
        start = 0
        while start < num_rows:
            rows = slice(start, min(start + self.num_rows, num_rows))
            pending = self._try(device, rows, compute)
            if pending is None:  # outside the handler, whose traceback would hold the memory
                device.free_memory()
                pending = self._try(device, rows, compute)
            if pending is None:
                self._halve(rows.stop - rows.start, device)
                continue
            yield pending
            start = rows.stop

    def _try(
        self, device: Device, rows: slice, compute: Callable[[slice], Stored]
    ) -> Pending | None:
        try:
            return device.run(lambda: compute(rows))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            text = str(error)
            is_memory = isinstance(error, torch.OutOfMemoryError)
            if not is_memory and not any(words in text for words in _MEMORY_ERRORS):
                raise
            self._reason = text.splitlines()[0]
            return None

    def _halve(self, size: int, device: Device) -> None:
        if size == 1:
            raise MemoryError(
                f"{self._what}: one row does not fit into the memory of {device.torch_device}: "
                f"{self._reason}; use a larger device, compute: bfloat16 or float16, or a smaller "
                "size"
            )
        self.num_rows = size // 2
        device.free_memory()
        logger.warning(
            "%s: out of memory with %d rows a pass; %d from here on",
            self._what,
            size,
            self.num_rows,
        )
