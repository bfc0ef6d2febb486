"""Keeps work from a machine that is at fault, until a test finds it sound.

Ray gives the next task to whichever worker is free. A worker that fails each task at once, for want
of room in TMPDIR, would be given them all. So whoever meets a fault of the machine answers after a
pause that grows, and the machine is tested before it is given more.
"""

import logging
import re
import threading
import time
from collections.abc import Callable

import torch

from pipeline.base.node_fault import NodeError
from pipeline.stage.device import Device, is_device_fault
from pipeline.stage.lanes import StageClosedError
from pipeline.stage.work import EncodeConfig
from pipeline.store.store import Store

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, MAX_PAUSE_S = 5.0, 120.0
# Errors of botocore, of ours and of other clouds' libraries, by their names: none was found here.
_NO_CREDENTIALS = re.compile(r"Credential|SSOToken|TokenRetrieval|RefreshError")


class NodeGuard:
    """What one process knows of its machine; any thread may call any method.

    ``wait`` waits for so many seconds, or until the stage is closed, which it then tells.
    """

    def __init__(
        self, wait: Callable[[float], bool], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._wait, self._clock = wait, clock
        self._lock = threading.Lock()
        self._fault: NodeError | None = None
        self._num_faults = 0  # since work succeeded
        self._until_s = 0.0  # when the machine is tested

    def admit(self) -> NodeError | None:
        """Return None once work may begin, or, after the pause, the fault that is still there."""
        if self._fault is None:
            return None
        self._pause(self._until_s)
        with self._lock:  # one tests; who comes later is told what it found
            fault = self._fault
            if fault is None or self._clock() < self._until_s:
                return fault
            try:
                fault.check()
            except Exception as error:  # noqa: BLE001  # of any kind: it is not sound
                text = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                fault = NodeError(fault.errno, text, check=fault.check)
                self._begin(fault)
                return fault
            self._fault = None
            return None

    def report(self, fault: NodeError) -> None:
        """Take note of a fault that work met, and return after the pause."""
        with self._lock:
            if self._clock() >= self._until_s:  # else of work that began before
                self._begin(fault)
            until_s = self._until_s
        self._pause(until_s)

    def note_success(self) -> None:
        """Take note of work that succeeded: the next pause is a short one."""
        self._num_faults = 0

    def _begin(self, fault: NodeError) -> None:
        pause_s = min(FIRST_PAUSE_S * 2**self._num_faults, MAX_PAUSE_S)
        self._fault, self._until_s = fault, self._clock() + pause_s
        self._num_faults += 1
        logger.info("this machine is at fault, tested in %.0f s: %s", pause_s, fault)

    def _pause(self, until_s: float) -> None:
        while (left_s := until_s - self._clock()) > 0:
            if self._wait(left_s):
                raise StageClosedError("the encode stage was closed")


def open_machine(config: EncodeConfig) -> tuple[Store, Device]:
    """Open the store and the device of this machine.

    Raises:
        NodeError: it has no GPU, or no such store, where one is needed.
    """
    try:
        if config.needs_gpu and not torch.cuda.is_available():
            raise NodeError(None, "expected a GPU, torch sees none on this machine")
        device = Device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        device.check()
    except RuntimeError as error:
        raise NodeError(None, f"the GPU cannot be used: {error}") from error
    store = Store.open(config.store_url)
    spec = f"{config.latents.folder}/spec.json"
    if not store.storage.exists(spec):
        raise NodeError(None, f"{config.store_url}: no {spec} on this machine; is it mounted here?")
    return store, device


def find_fault(error: Exception, *, check_device: Callable[[], None]) -> NodeError | None:
    """Return what an error says of this machine, None where it says nothing of it."""
    if isinstance(error, NodeError):
        return error
    if is_device_fault(error):
        return NodeError(None, str(error), check=check_device)
    causes = (error, error.__cause__)
    if any(_NO_CREDENTIALS.search(type(cause).__name__) for cause in causes):
        return NodeError(None, str(error))
    return None
