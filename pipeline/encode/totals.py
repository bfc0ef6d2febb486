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

from pipeline.base.progress_text import (
    NUM_NAMED,
    Figure,
    WorkStatus,
    count_noun,
    format_scaled,
    join_largest,
)
from pipeline.encode.failures import describe_failures
from pipeline.encode.prepare import EncodeRun
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


@dataclass(frozen=True)
class _Mark:
    """Sums since the start, at one moment; ``busy_s`` by resource."""

    at_s: float
    num_tasks: int = 0
    num_pairs: int = 0
    num_bytes: int = 0
    tar_bytes: int = 0
    busy_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Window:
    """Rates between two marks; ``busy`` is each resource's share of the time."""

    seconds: float
    pairs_per_s: float
    bytes_per_s: float
    tar_bytes_per_s: float
    busy: Mapping[str, float]

    @classmethod
    def between(cls, start: _Mark, end: _Mark, *, num_actors: int) -> "_Window":
        """Return the rates of a run of ``num_actors`` between two marks."""
        seconds = max(end.at_s - start.at_s, 1e-9)
        actors_s = seconds * max(1, num_actors)
        return cls(
            seconds=seconds,
            pairs_per_s=(end.num_pairs - start.num_pairs) / seconds,
            bytes_per_s=(end.num_bytes - start.num_bytes) / seconds,
            tar_bytes_per_s=(end.tar_bytes - start.tar_bytes) / seconds,
            busy={
                name: (end.busy_s.get(name, 0.0) - start.busy_s.get(name, 0.0))
                / (actors_s * RESOURCE_THREADS.get(name, 1))
                for name in RESOURCES
            },
        )

    @property
    def bottleneck(self) -> str:
        """The resource that is busy most of the time, or ``waiting`` where none is."""
        name = max(self.busy, key=lambda name: self.busy[name])
        return name if self.busy[name] >= BUSY_ENOUGH else "waiting"

    def format_bottleneck(self) -> str:
        """``bottleneck device 94%``, or ``waiting (fetch 30%)``."""
        name, share = max(self.busy.items(), key=lambda item: item[1])
        if self.bottleneck == name:
            return f"bottleneck {name} {share:.0%}"
        return f"waiting ({name} {share:.0%})"

    def format_busy(self) -> str:
        """``bottleneck device 94%, decode 41%``: the busiest first, without those that idle."""
        ranked = sorted(self.busy.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {share:.0%}" for name, share in ranked if share >= 0.005)
        return ("waiting: " if self.bottleneck == "waiting" else "bottleneck ") + shares


@dataclass
class EncodeTotals:
    """The sums of a run's outcomes. ``add`` and ``report`` may be called from different threads.

    ``tar_bytes`` are those of the run's tasks, by id: the largest are done first, so that the time
    left is estimated by bytes. ``num_actors`` is how many work.
    """

    num_done_before: int = 0
    tar_bytes: Mapping[str, int] = field(default_factory=dict)
    urls: Mapping[str, str] = field(default_factory=dict)  # of the run's tars, by task
    num_actors: int = 1
    clock: Callable[[], float] = time.monotonic
    tasks: Counter[str] = field(default_factory=Counter)  # by status
    rejects: Counter[str] = field(default_factory=Counter)  # by reason
    busy_s: Counter[str] = field(default_factory=Counter)  # by stage
    num_pairs: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # task -> reason
    failed_list: str | None = None  # the file that lists them all
    stopped: bool = False  # before its end, for too many failed

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._tar_bytes_done = 0
        self._tar_bytes_total = sum(self.tar_bytes.values())
        self.start_clock()

    def start_clock(self) -> None:
        """Take rates from now on; called once the actors are there, before any outcome."""
        self._marks = deque([_Mark(self.clock())])

    @classmethod
    def of_run(cls, run: EncodeRun) -> "EncodeTotals":
        """Return the totals of a run about to start."""
        tasks = [item.task for item in run.items]
        sizes = {task.id: task.num_bytes // task.num_parts for task in tasks}
        return cls(run.num_done, tar_bytes=sizes, urls={task.id: task.url for task in tasks})

    def add(self, outcome: TaskOutcome) -> None:
        """Add one more outcome."""
        with self._lock:
            self.tasks[outcome.status] += 1
            self.rejects.update(outcome.rejects)
            self.busy_s.update(outcome.busy_s)
            self.num_bytes += outcome.num_bytes
            self._tar_bytes_done += self.tar_bytes.get(outcome.task, 0)
            if outcome.status == "failed":
                self.failures[outcome.task] = outcome.error
            else:
                self.num_pairs += outcome.num_pairs
                self.num_samples += outcome.num_samples
            self._keep_mark(self._mark())

    def _mark(self) -> _Mark:
        return _Mark(
            at_s=self.clock(),
            num_tasks=self.tasks.total(),
            num_pairs=self.num_pairs,
            num_bytes=self.num_bytes,
            tar_bytes=self._tar_bytes_done,
            busy_s={
                name: sum(self.busy_s[s] for s in stages) for name, stages in RESOURCES.items()
            },
        )

    def _keep_mark(self, mark: _Mark) -> None:
        """Keep a mark if the last is old enough, and drop those that the window does not need."""
        if mark.at_s - self._marks[-1].at_s < WINDOW_S / _MARKS:
            return
        self._marks.append(mark)
        num_tasks = TASKS_A_WINDOW * max(1, self.num_actors)
        while (
            len(self._marks) > 1
            and mark.at_s - self._marks[1].at_s >= WINDOW_S
            and mark.num_tasks - self._marks[1].num_tasks >= num_tasks
        ):
            self._marks.popleft()

    @property
    def num_rejects(self) -> int:
        """Rejected samples, members and pairs."""
        return self.rejects.total()

    def report(self) -> WorkStatus:
        """Return what progress shows now."""
        with self._lock:
            now = self._mark()
            window = _Window.between(self._marks[0], now, num_actors=self.num_actors)
            details: tuple[str, ...] = ("no task has ended yet",)
            text = details[0]
            if now.num_tasks:
                pairs = f"{format_scaled(window.pairs_per_s, _COUNTS)} pairs/s"
                rates = f"{pairs}, {format_scaled(window.bytes_per_s, _BYTES)}/s"
                sums = f"{format_scaled(self.num_pairs, _COUNTS)} pairs, {self._format_bytes()}"
                details = f"{rates}; {sums}", window.format_busy(), self._format_losses(NUM_NAMED)
                start = f"{rates}, {window.format_bottleneck()}, "
                lines = [start + self._format_losses(num) for num in range(NUM_NAMED, -1, -1)]
                text = next((x for x in lines if len(x) <= LINE_CHARACTERS), lines[-1])
            done = self.num_done_before + now.num_tasks - self.tasks["failed"]
            figures: dict[str, Figure] = {
                "pairs": self.num_pairs,
                "samples": self.num_samples,
                "bytes_written": self.num_bytes,
                "tasks": dict(self.tasks),
                "rejects": dict(self.rejects),
                "busy_s": {stage: round(seconds, 3) for stage, seconds in self.busy_s.items()},
                "window_s": round(window.seconds, 3),
                "window_pairs_per_s": window.pairs_per_s,
                "window_bytes_per_s": window.bytes_per_s,
                "window_busy": {name: round(share, 4) for name, share in window.busy.items()},
                "bottleneck": window.bottleneck,
            }
            return WorkStatus(done, text, details, figures, self._estimate_left_s(window))

    def _estimate_left_s(self, window: _Window) -> float | None:
        left = self._tar_bytes_total - self._tar_bytes_done
        if self._tar_bytes_total and left <= 0:
            return 0.0
        return left / window.tar_bytes_per_s if window.tar_bytes_per_s > 0 and left > 0 else None

    def _format_bytes(self) -> str:
        return format_scaled(self.num_bytes, _BYTES)

    def _format_losses(self, num_named: int) -> str:
        named = self.rejects and num_named
        rejects = f" ({join_largest(self.rejects, num=num_named)})" if named else ""
        return f"{len(self.failures)} failed, {self.num_rejects} rejects{rejects}"

    def describe(self, *, command: str | None = None) -> str:
        """Return the summary: what was stored, what was rejected and why, which tasks failed.

        ``command`` is the one that was given, which tries the failed tasks again.
        """
        lines = [
            f"stored {self.num_samples} samples, {self.num_pairs} pairs, {self._format_bytes()} "
            f"in {count_noun(self.tasks['committed'], 'task')}"
        ]
        if self.tasks["lost"]:
            lines.append(f"{count_noun(self.tasks['lost'], 'task')}: another run committed first")
        for reason, count in self.rejects.most_common():
            lines.append(f"rejected {count}: {reason}")
        lines += describe_failures(self.failures, urls=self.urls)
        if self.stopped:
            lines.append("stopped: too many tasks failed (--max-failures); mend their cause first")
        if self.failures:
            lines.append(f"tasks failed: {len(self.failures)}; the same command tries them again")
            lines += [f"  {command}"] if command else []
            lines += [f"all of them: {self.failed_list}"] if self.failed_list else []
        return "\n".join(lines)
