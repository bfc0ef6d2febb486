"""The device that models run on, used so that it does not wait for its inputs or its results.

On CUDA a batch's inputs go up from pinned memory on one side stream, its results come down to
pinned memory on another, and the thread that starts the work runs at most ``RUN_AHEAD`` batches
ahead of the device. On a CPU all of it is done on the spot.
"""

import logging
import math
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
"""Batches started and not done: one at work and one behind it; each holds its results' memory."""
# What else than torch.OutOfMemoryError says that the device's memory is short.
_MEMORY_ERRORS = (
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
)


@dataclass(slots=True)
class Clock:
    """When a device worked, in seconds of ``time.perf_counter``, and how long in all."""

    first_s: float = math.inf
    last_s: float = -math.inf
    busy_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, duration_s: float, *, end_s: float) -> None:
        """Add work that ended at ``end_s``; on CUDA that is when its results were there."""
        with self._lock:
            self.first_s = min(self.first_s, end_s - duration_s)
            self.last_s = max(self.last_s, end_s)
            self.busy_s += duration_s


class Pending:
    """A batch's results on their way to this process's memory."""

    def __init__(self, host: Stored, *, busy_s: float) -> None:
        self._host = host
        self._busy_s = busy_s

    @property
    def num_bytes(self) -> int:
        """Bytes of all values."""
        return sum(values.nbytes for values in self._host.values.values())

    def wait(self) -> dict[str, np.ndarray]:
        """Return array name → values, once they are here.

        Raises:
            FloatingPointError: a value is NaN, infinite or beyond float16's 65,504; says how many.
        """
        return self._host.to_arrays()

    @property
    def busy_s(self) -> float:
        """Seconds that the device worked at it; known once ``wait`` is over."""
        return self._busy_s


class _PendingCuda(Pending):
    def __init__(
        self, host: Stored, *, start: torch.cuda.Event, end: torch.cuda.Event, clock: Clock
    ) -> None:
        super().__init__(host, busy_s=0.0)
        self._start, self._end, self._clock = start, end, clock
        self._here = torch.cuda.Event(blocking=True)  # waits without a core
        self._here.record()  # on the stream that is current: that of the copies

    def wait(self) -> dict[str, np.ndarray]:
        self._here.synchronize()
        self._clock.add(self.busy_s, end_s=time.perf_counter())
        return super().wait()

    @property
    def busy_s(self) -> float:
        return self._start.elapsed_time(self._end) / 1000


class Device:
    """One CPU or GPU. ``upload`` and ``run`` are for one thread, ``pin`` for any."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self.clock = Clock()
        self._is_cuda = device.type == "cuda"
        self._ahead: deque[torch.cuda.Event] = deque()
        if self._is_cuda:
            self._up = torch.cuda.Stream(device)
            self._down = torch.cuda.Stream(device)

    def pin(self, values: np.ndarray) -> Tensor:
        """Return values as a tensor that can be uploaded while the device works."""
        tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
        return tensor.pin_memory() if self._is_cuda else tensor

    def upload(self, tensor: Tensor) -> Tensor:
        """Return a pinned tensor's copy on the device, which whatever runs next waits for."""
        if not self._is_cuda:
            return tensor
        with torch.cuda.stream(self._up):
            there = tensor.to(self.torch_device, non_blocking=True)
        current = torch.cuda.current_stream(self.torch_device)
        current.wait_stream(self._up)
        there.record_stream(current)
        return there

    def run(self, compute: Callable[[], Stored]) -> Pending:
        """Start ``compute`` and the way back of what it returns.

        Raises:
            torch.OutOfMemoryError: the device's memory is short.
        """
        if not self._is_cuda:
            started_s = time.perf_counter()
            stored = compute()
            busy_s = time.perf_counter() - started_s
            self.clock.add(busy_s, end_s=started_s + busy_s)
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
            return _PendingCuda(self._download(stored), start=start, end=end, clock=self.clock)

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

    def free_memory(self) -> None:
        """Wait for what was started, and give the memory that torch keeps back to the device."""
        while self._ahead:
            self._ahead.popleft().synchronize()
        if self._is_cuda:
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Pass:
    """What a batch computes on the device: ``compute`` of rows 0 to ``num_rows``."""

    limit: "BatchLimit"
    num_rows: int
    compute: Callable[[slice], Stored]

    def run(self, device: Device) -> Iterator[Pending]:
        """Run it all, at most the limit's rows at a time; raises as ``BatchLimit.run``."""
        return self.limit.run(device, self.num_rows, self.compute)


class BatchLimit:
    """How many rows a pass may have: halved for good when the device's memory is short.

    A pass that finds it short is tried once more after all that was started is done and freed: the
    shortage may have been another's.
    """

    def __init__(self, num_rows: int, *, what: str) -> None:
        self.num_rows = num_rows
        self._what = what
        self._said = ""

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
            if pending is None:  # out here, where no traceback holds what was allocated
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
            if not _is_out_of_memory(error):
                raise
            self._said = str(error).splitlines()[0]
            return None

    def _halve(self, size: int, device: Device) -> None:
        if size == 1:
            raise MemoryError(
                f"{self._what}: one row does not fit into the memory of {device.torch_device}: "
                f"{self._said}; use a larger device, compute: bfloat16 or float16, or a smaller "
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


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in _MEMORY_ERRORS
    )
