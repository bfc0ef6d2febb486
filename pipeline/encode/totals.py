"""Adds up the outcomes of an encode run: for its progress, and for the summary at its end.

A task's outcome comes at its end and holds all that the task took. So rates and shares are of a
window of the last minutes that is long enough for several tasks of every actor: then what a task
did before the window began and what tasks in flight have done since about cancel out.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.base.progress_text import (
    NUM_NAMED,
    Figure,
    WorkStatus,
    count_noun,
    format_scaled,
    join_largest,
)
from pipeline.corpus.notes import describe_notes
from pipeline.encode.empty_tars import EmptyTars
from pipeline.encode.failures import describe_failures
from pipeline.encode.prepare import EncodeRun
from pipeline.encode.task_queue import name_node
from pipeline.stage.lanes import NUM_COMMITTERS
from pipeline.stage.work import TaskOutcome

WINDOW_S = 300.0
TASKS_A_WINDOW = 8  # of each actor, at least: twice what it has in flight
_MARKS = 60  # moments kept of a window
BUSY_ENOUGH = 0.5  # below it nothing is the bottleneck: start-up, a short queue, the last tasks
# What works at the same time in one actor, and the stages that need it. The device runs one pass
# after another, whichever model's.
RESOURCES: dict[str, tuple[str, ...]] = {
    "fetch": ("fetch",),
    "decode": ("decode",),
    "device": ("vae", "text", "unet"),
    "read": ("read",),
    "write": ("write",),
    "commit": ("commit",),
}
# Threads of a resource in an actor; 1 where not named. Latents and features have writers of their
# own, but a layer that is slow to write has one.
RESOURCE_THREADS = {"commit": NUM_COMMITTERS}
LINE_CHARACTERS = 114  # with the counts before it no line passes 160
_BYTES = (" B", " kB", " MB", " GB", " TB", " PB")
_COUNTS = ("", "k", "M", "G")
_RATES = ("pairs", "bytes", "tar_bytes")


class _Mark(NamedTuple):
    """The sums at one moment."""

    at_s: float
    counts: Counter[str]
    busy_s: Counter[str]
    actors_s: float  # time that actors were alive, of all of them


@dataclass
class EncodeTotals:
    """The sums of a run's outcomes. ``add`` and ``report`` may be called from different threads.

    ``tar_bytes`` are those of the run's tasks, by id: the largest are done first, so that the time
    left is estimated by bytes. ``num_actors`` is how many work at most; ``count_alive``, which is
    asked often, says at once how many do now (None: all). What other runs committed is counted
    apart: the counts of two runs on one store add up to what it holds.
    """

    num_done_before: int = 0
    tar_bytes: Mapping[str, int] = field(default_factory=dict)
    urls: Mapping[str, str] = field(default_factory=dict)  # of the run's tars, by task
    num_actors: int = 1
    count_alive: Callable[[], int] | None = None
    clock: Callable[[], float] = time.monotonic
    tasks: Counter[str] = field(default_factory=Counter)  # by status
    rejects: Counter[str] = field(default_factory=Counter)  # by reason
    notes: Counter[str] = field(default_factory=Counter)  # by name
    busy_s: Counter[str] = field(default_factory=Counter)  # by stage
    # tasks, pairs, samples, bytes, tar_bytes, and members that were set_aside
    counts: Counter[str] = field(default_factory=Counter)
    num_lost_pairs: int = 0  # of tasks that another run committed first
    failures: dict[str, str] = field(default_factory=dict)  # task -> reason
    empty_tars: EmptyTars = field(default_factory=EmptyTars)
    failed_list: str | None = None  # the file that lists them all
    again: dict[str, str] = field(default_factory=dict)  # task to be tried again -> reason
    failed_nodes: Counter[str] = field(default_factory=Counter)  # failures that a node caused
    num_changed: int = 0  # failures of tars that changed
    stopped: str = ""  # why the run ended before all was tried

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._tar_bytes = sum(self.tar_bytes.values())
        self.start_clock()

    def start_clock(self) -> None:
        """Take rates from now on; called once the actors are there, before any outcome."""
        self._marks = deque([_Mark(self.clock(), Counter(), Counter(), 0.0)])
        self._num_alive, self._seen_s, self._actors_s = self._count_alive(), self.clock(), 0.0

    def _count_alive(self) -> int:
        return self.num_actors if self.count_alive is None else self.count_alive()

    def _look(self) -> None:
        """Add the time that actors were alive since the last look.

        One counts as alive where none is: what works then has ended before it was counted. After
        the last task the count stays as it was: the actors end one by one.
        """
        now_s = self.clock()
        self._actors_s += max(1, self._num_alive) * (now_s - self._seen_s)
        self._seen_s = now_s
        if self.counts["tasks"] < len(self.tar_bytes):
            self._num_alive = self._count_alive()

    @classmethod
    def of_run(cls, run: EncodeRun) -> "EncodeTotals":
        """Return the totals of a run about to start."""
        tasks = [item.task for item in run.items]
        sizes = {task.id: task.num_bytes // task.num_parts for task in tasks}
        tasks += [task for task, _ in run.failed]
        return cls(run.num_done, tar_bytes=sizes, urls={task.id: task.url for task in tasks})

    @property
    def num_rejects(self) -> int:
        """Rejected samples, members and pairs."""
        return self.rejects.total()

    def add(self, outcome: TaskOutcome) -> None:
        """Add one more outcome."""
        with self._lock:
            self._look()
            self._num_alive = max(1, self._num_alive)  # one was, perhaps since the last count
            self.busy_s.update(outcome.busy_s)
            if outcome.status == "again":
                self.again[outcome.task] = outcome.error
                return
            self.again.pop(outcome.task, None)
            self.tasks[outcome.status] += 1
            tar_bytes = self.tar_bytes.get(outcome.task, 0)
            self.counts.update(tasks=1, bytes=outcome.num_bytes, tar_bytes=tar_bytes)
            if outcome.status == "lost":  # its rejects and notes are in the other's count, too
                self.num_lost_pairs += outcome.num_pairs
            else:
                self.rejects.update(outcome.rejects)
                self.notes.update(outcome.notes)
                self.counts["set_aside"] += outcome.num_set_aside
            if outcome.status == "failed":
                self.failures[outcome.task] = outcome.error
                self.failed_nodes.update([name_node(outcome)] if outcome.cause == "node" else [])
                self.num_changed += outcome.cause == "changed"
            elif outcome.status == "committed":
                self.counts.update(pairs=outcome.num_pairs, samples=outcome.num_samples)
                self.empty_tars.add(outcome)
            self._keep_mark(
                _Mark(self._seen_s, self.counts.copy(), self.busy_s.copy(), self._actors_s)
            )

    def _keep_mark(self, mark: _Mark) -> None:
        """Keep a mark if the last is old enough, and drop those that the window does not need."""
        if mark.at_s - self._marks[-1].at_s < WINDOW_S / _MARKS:
            return
        self._marks.append(mark)
        num_tasks = TASKS_A_WINDOW * max(1, self._num_alive)
        while (
            len(self._marks) > 1
            and mark.at_s - self._marks[1].at_s >= WINDOW_S
            and mark.counts["tasks"] - self._marks[1].counts["tasks"] >= num_tasks
        ):
            self._marks.popleft()

    def report(self) -> WorkStatus:
        """Return what progress shows now."""
        with self._lock:
            self._look()
            start, counts = self._marks[0], self.counts
            seconds = max(self._seen_s - start.at_s, 1e-9)
            rates = {name: (counts[name] - start.counts[name]) / seconds for name in _RATES}
            busy = self._share_busy(start)
            bottleneck, share = max(busy.items(), key=lambda item: item[1])
            bottleneck = bottleneck if share >= BUSY_ENOUGH else "waiting"
            again = f"{len(self.again)} to be tried again" if self.again else ""
            parts = ["no task has ended yet", self._format_alive(), again]
            text = ", ".join(part for part in parts if part)
            details: tuple[str, ...] = (text,)
            if counts["tasks"]:
                text, details = self._format(rates, busy, bottleneck)
            figures: dict[str, Figure] = {
                "pairs": counts["pairs"],
                "samples": counts["samples"],
                "bytes_written": counts["bytes"],
                "lost_pairs": self.num_lost_pairs,
                "actors_alive": self._num_alive,
                "actors_max": self.num_actors,
                "tasks": dict(self.tasks),
                "again": len(self.again),
                "rejects": dict(self.rejects),
                "set_aside": counts["set_aside"],
                "notes": dict(self.notes),
                "busy_s": {stage: round(spent_s, 3) for stage, spent_s in self.busy_s.items()},
                "window_s": round(seconds, 3),
                "window_pairs_per_s": rates["pairs"],
                "window_bytes_per_s": rates["bytes"],
                "window_busy": {name: round(share, 4) for name, share in busy.items()},
                "bottleneck": bottleneck,
            }
            done = self.num_done_before + counts["tasks"] - self.tasks["failed"]
            left_s = self._estimate_left_s(rates["tar_bytes"])
            return WorkStatus(done, text, details, figures, left_s)

    def _share_busy(self, start: _Mark) -> dict[str, float]:
        """Return each resource's share of the time that actors were alive since a mark."""
        actors_s = max(self._actors_s - start.actors_s, 1e-9)
        return {
            name: sum(self.busy_s[stage] - start.busy_s[stage] for stage in stages)
            / (actors_s * RESOURCE_THREADS.get(name, 1))
            for name, stages in RESOURCES.items()
        }

    def _estimate_left_s(self, tar_bytes_per_s: float) -> float | None:
        left = self._tar_bytes - self.counts["tar_bytes"]
        if self._tar_bytes and left <= 0:
            return 0.0
        return left / tar_bytes_per_s if tar_bytes_per_s > 0 and left > 0 else None

    def _format(
        self, rates: Mapping[str, float], busy: Mapping[str, float], bottleneck: str
    ) -> tuple[str, tuple[str, ...]]:
        """Return a line of at most ``LINE_CHARACTERS``, and the rows below a bar."""
        pairs_per_s = f"{format_scaled(rates['pairs'], _COUNTS)} pairs/s"
        speed = f"{pairs_per_s}, {format_scaled(rates['bytes'], _BYTES)}/s"
        written = format_scaled(self.counts["bytes"], _BYTES)
        sums = f"{format_scaled(self.counts['pairs'], _COUNTS)} pairs, {written}"
        ranked = sorted(busy.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {share:.0%}" for name, share in ranked if share >= 0.005)
        first = f"{ranked[0][0]} {ranked[0][1]:.0%}"
        if bottleneck == "waiting":
            first, shares = f"waiting ({first})", f"waiting: {shares}"
        else:
            first, shares = f"bottleneck {first}", f"bottleneck {shares}"
        if alive := self._format_alive():
            first, shares = f"{first}, {alive}", f"{alive}; {shares}"
        losses = [self._format_losses(num) for num in range(NUM_NAMED, -1, -1)]
        lines = [f"{speed}, {first}, {lost}" for lost in losses]
        line = next((x for x in lines if len(x) <= LINE_CHARACTERS), lines[-1])
        return line, (f"{speed}; {sums}", shares, losses[0])

    def _format_alive(self) -> str:
        """Return ``2 of 16 actors alive``, or "" where all are."""
        if self._num_alive >= self.num_actors:
            return ""
        return f"{self._num_alive} of {self.num_actors} actors alive"

    def _format_losses(self, num_named: int) -> str:
        named = self.rejects and num_named
        rejects = f" ({join_largest(self.rejects, num=num_named)})" if named else ""
        again = f", {len(self.again)} to be tried again" if self.again else ""
        aside = ""
        if num_named and self.counts["set_aside"]:
            aside = f", {format_scaled(self.counts['set_aside'], _COUNTS)} set aside"
        return f"{len(self.failures)} failed{again}, {self.num_rejects} rejects{rejects}{aside}"

    def describe(self, *, command: str | None = None) -> str:
        """Return the summary: what was stored, what was rejected and why, which tasks failed.

        ``command`` is the one that was given, which tries the failed tasks again.
        """
        written = format_scaled(self.counts["bytes"], _BYTES)
        lines = [
            f"stored {self.counts['samples']} samples, {self.counts['pairs']} pairs, "
            f"{written} in {count_noun(self.tasks['committed'], 'task')}"
        ]
        if self.tasks["lost"]:
            tasks = f"{count_noun(self.tasks['lost'], 'task')}, {self.num_lost_pairs} pairs"
            lines.append(f"{tasks}: another run committed first")
        for reason, count in self.rejects.most_common():
            lines.append(f"rejected {count}: {reason}")
        if num_aside := self.counts["set_aside"]:
            lines.append(f"set aside {num_aside:,} member{'s' * (num_aside > 1)}: sidecars")
        lines += self.empty_tars.describe(self.urls)
        lines += [f"note: {line}" for line in describe_notes(self.notes)]
        lines += describe_failures(self.failures, urls=self.urls)
        for node, count in self.failed_nodes.most_common():
            tasks = count_noun(count, "failed task")
            lines.append(f"{tasks}: because of node {node}, which says nothing of their tars")
        if self.again:
            lines.append(f"{count_noun(len(self.again), 'task')} would have been tried again")
        if self.stopped:
            lines.append(f"stopped: {self.stopped}")
        if self.num_changed:
            lines.append(
                f"tasks failed because their tars changed: {self.num_changed}; the same command "
                "with --changed renew, or keep, does them"
            )
        if num_others := len(self.failures) - self.num_changed:
            lines.append(f"tasks failed: {num_others}; the same command tries them again")
            lines += [f"  {command}"] if command else []
        if self.failures:
            lines += [f"all of them: {self.failed_list}"] if self.failed_list else []
        return "\n".join(lines)
