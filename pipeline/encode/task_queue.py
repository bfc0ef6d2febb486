"""What an encode run tries again, and when it ends before all is tried.

A task that failed because of the storage or of its node goes to the end of the queue, a bounded
number of times: it is in the next pass over what is left, which starts no worker on a node that is
at fault. A pass ends early where all of its workers are on such nodes. If there is no other node,
the run ends.
"""

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Protocol

from pipeline.stage.work import TaskOutcome, WorkItem

logger = logging.getLogger(__name__)

MAX_TRIES = {"storage": 2, "node": 4}  # of a task, by the cause that it failed for
MOVE_S = 60.0  # all workers on nodes at fault for so long are moved, where there are others
GIVE_UP_S = 120.0  # and where there are none, the run ends; a node was tested four times and more


class Nodes(Protocol):
    """The nodes of a run, by the names that ``TaskOutcome`` gives them."""

    def list_at_work(self) -> Collection[str]:
        """Return those on which a worker is alive."""

    def has_others(self, names: Collection[str]) -> bool:
        """Return whether a worker finds room on a node that is not among these."""


class ThisMachine:
    """The one node of a run without Ray."""

    def list_at_work(self) -> Collection[str]:
        """Return this host, by the name that the encode stage gives it."""
        return (socket.gethostname(),)

    def has_others(self, names: Collection[str]) -> bool:
        """Return False."""
        return False


Encode = Callable[[Sequence[WorkItem], Collection[str]], Generator[TaskOutcome, None, None]]
"""Encodes items and yields their outcomes, with no worker on the nodes named if possible."""


@dataclass(frozen=True, slots=True)
class _Fault:
    since_s: float
    reason: str


@dataclass
class TaskQueue:
    """The items of a run and what became of them; ``stopped`` says why it ended early, or "".

    More than ``max_failures`` failed tasks end the run. Changed tars do not count. Those that the
    storage failed do before they are tried again, or a store that is gone would fail them all.
    """

    items: Sequence[WorkItem]
    encode: Encode
    nodes: Nodes
    max_failures: int
    clock: Callable[[], float] = time.monotonic
    stopped: str = ""
    _tries: Counter[tuple[str, str]] = field(default_factory=Counter)  # (task, cause)
    _again: dict[str, tuple[WorkItem, TaskOutcome]] = field(default_factory=dict)
    _faults: dict[str, _Fault] = field(default_factory=dict)  # by node
    _num_failed: int = 0
    _num_unstored: int = 0  # to be tried again because of the storage

    def run(self) -> Generator[TaskOutcome, None, None]:
        """Yield each task's outcome; that of one to be tried again has the status "again"."""
        left = {item.task.id: item for item in self.items}
        while left and not self.stopped:
            avoided = tuple(self._faults) if self.nodes.has_others(self._faults) else ()
            with closing(self.encode(tuple(left.values()), avoided)) as outcomes:
                for outcome in outcomes:
                    judged = self._judge(left.pop(outcome.task), outcome)
                    yield judged
                    if self._must_end(judged):
                        break
            if not self.stopped:
                left.update((task, item) for task, (item, _) in self._again.items())
                self._again.clear()
                self._num_unstored = 0
        for _, outcome in self._again.values():
            yield replace(outcome, status="failed")

    def _judge(self, item: WorkItem, outcome: TaskOutcome) -> TaskOutcome:
        node = outcome.ray_node or outcome.node
        if outcome.status == "failed" and outcome.cause == "node":
            if node not in self._faults:
                logger.warning("node %s is at fault: %s", name_node(outcome), outcome.error)
            self._faults.setdefault(node, _Fault(self.clock(), outcome.error))
        elif outcome.status != "failed" and node in self._faults:
            del self._faults[node]
            logger.warning("node %s works again", name_node(outcome))
        if outcome.status != "failed":
            return outcome
        self._tries[outcome.task, outcome.cause] += 1
        if self._tries[outcome.task, outcome.cause] < MAX_TRIES.get(outcome.cause, 0):
            self._again[outcome.task] = item, outcome
            self._num_unstored += outcome.cause == "storage"
            return replace(outcome, status="again")
        self._num_failed += outcome.cause != "changed"
        return outcome

    def _must_end(self, outcome: TaskOutcome) -> bool:
        """Return whether the pass ends after an outcome; set ``stopped`` if the run does."""
        if self._num_failed + self._num_unstored > self.max_failures:
            self.stopped = "too many tasks failed (--max-failures); mend their cause first"
            return True
        at_work = self.nodes.list_at_work() if outcome.cause == "node" else ()
        if not at_work or not all(node in self._faults for node in at_work):
            return False
        fault = max((self._faults[node] for node in at_work), key=lambda fault: fault.since_s)
        since_s = self.clock() - fault.since_s
        if self.nodes.has_others(self._faults):
            if since_s > MOVE_S:
                logger.warning("all workers are on nodes at fault: they start anew on others")
            return since_s > MOVE_S
        if since_s > GIVE_UP_S:
            self.stopped = f"every node with a worker is at fault, as by {fault.reason}"
        return bool(self.stopped)


def name_node(outcome: TaskOutcome) -> str:
    """Return the name that people know an outcome's node by: its host, and its id in Ray."""
    return f"{outcome.node} ({outcome.ray_node[:8]})" if outcome.ray_node else outcome.node
