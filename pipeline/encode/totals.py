"""An encode run's outcomes added up: what its progress shows and what is said at its end.

An outcome comes at the end of its task, with all that the task took. Rates and shares are given
twice: since the start, and over a window of the last minutes, which is long enough to hold several
tasks of every actor, so that what a task did before the window began and what those in flight have
done since about cancel out.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.base.progress_text import (
    NUM_NAMED,
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
BUSY_ENOUGH = 0.5  # below it no lane holds the others up: start-up, a short queue, the last tasks
# What works at the same time in one actor. The device takes one pass after another, whatever it is.
LANES: dict[str, tuple[str, ...]] = {
    "fetch": ("fetch",),
    "decode": ("decode",),
    "device": ("vae", "text", "unet"),
    "read": ("read",),
    "write": ("write",),
    "commit": ("commit",),
}
# Threads of a lane in an actor; 1 where not named. Latents and features have writers of their own,
# but a layer that is slow to write has one.
LANE_THREADS = {"commit": NUM_COMMITTERS}
LINE_CHARACTERS = 114  # with the counts before it no line passes 160
_BYTES = (" B", " kB", " MB", " GB", " TB", " PB")
_COUNTS = ("", "k", "M", "G")


@dataclass(frozen=True)
class _Mark:
    """Sums since the start, at one moment."""

    at_s: float
    num_tasks: int = 0
    num_pairs: int = 0
    num_bytes: int = 0
    tar_bytes: int = 0
    busy_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Span:
    """What was done between two marks. ``busy`` is the share of the time a lane worked."""

    seconds: float
    pairs_per_s: float
    bytes_per_s: float
    tar_bytes_per_s: float
    busy: Mapping[str, float]

    @property
    def bottleneck(self) -> str:
        """The lane nearest to working all the time, or ``waiting`` where none is near it."""
        lane = max(self.busy, key=lambda name: self.busy[name])
        return lane if self.busy[lane] >= BUSY_ENOUGH else "waiting"


@dataclass
class EncodeTotals:
    """A run's outcomes added up. ``add`` and ``report`` may be called from different threads.

    ``tar_bytes`` are those of the run's tasks, by id: the largest are done first, so that what is
    left is told by bytes. ``num_actors`` is how many work, and may be set again when that changes.
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
    failed_list: str | None = None  # where all of them are, for whoever reads the summary
    stopped: bool = False  # before its end, for too many failed

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._tar_bytes_done = 0
        self._tar_bytes_total = sum(self.tar_bytes.values())
        self.start_clock()

    def start_clock(self) -> None:
        """Take rates from now on: nothing has been added, and the work begins."""
        self._start = _Mark(self.clock())
        self._marks = deque([self._start])

    @classmethod
    def of_run(cls, run: EncodeRun, *, num_actors: int = 1) -> "EncodeTotals":
        """Return the totals of a run about to start."""
        tasks = [item.task for item in run.items]
        sizes = {task.id: task.num_bytes // task.num_parts for task in tasks}
        urls = {task.id: task.url for task in tasks}
        return cls(run.num_done, tar_bytes=sizes, urls=urls, num_actors=num_actors)

    def add(self, outcome: TaskOutcome) -> None:
        """Count one more outcome."""
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
            self._remember(self._mark())

    def _mark(self) -> _Mark:
        return _Mark(
            at_s=self.clock(),
            num_tasks=self.tasks.total(),
            num_pairs=self.num_pairs,
            num_bytes=self.num_bytes,
            tar_bytes=self._tar_bytes_done,
            busy_s={lane: sum(self.busy_s[s] for s in stages) for lane, stages in LANES.items()},
        )

    def _remember(self, mark: _Mark) -> None:
        """Keep a mark where the last is old enough, and none that the window does not need."""
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

    def _span(self, start: _Mark, end: _Mark) -> _Span:
        seconds = max(end.at_s - start.at_s, 1e-9)
        workers_s = seconds * max(1, self.num_actors)
        return _Span(
            seconds=seconds,
            pairs_per_s=(end.num_pairs - start.num_pairs) / seconds,
            bytes_per_s=(end.num_bytes - start.num_bytes) / seconds,
            tar_bytes_per_s=(end.tar_bytes - start.tar_bytes) / seconds,
            busy={
                lane: (end.busy_s.get(lane, 0.0) - start.busy_s.get(lane, 0.0))
                / (workers_s * LANE_THREADS.get(lane, 1))
                for lane in LANES
            },
        )

    @property
    def num_rejects(self) -> int:
        """Rejected samples, members and pairs."""
        return sum(self.rejects.values())

    @property
    def num_done(self) -> int:
        """Tasks of the corpus that are committed, by this run or before."""
        return self.num_done_before + self.tasks.total() - self.tasks["failed"]

    def report(self) -> WorkStatus:
        """Return what progress shows now."""
        with self._lock:
            now = self._mark()
            whole, window = self._span(self._start, now), self._span(self._marks[0], now)
            text = self._say_line(window) if now.num_tasks else "no task has ended yet"
            rows = self._say_rows(whole, window) if now.num_tasks else (text,)
            return WorkStatus(
                self.num_done, text, rows, self._figures(whole, window), self._eta(window)
            )

    def _eta(self, window: _Span) -> float | None:
        left = self._tar_bytes_total - self._tar_bytes_done
        if self._tar_bytes_total and left <= 0:
            return 0.0
        return left / window.tar_bytes_per_s if window.tar_bytes_per_s > 0 and left > 0 else None

    def _say_line(self, window: _Span) -> str:
        start = [
            f"{format_scaled(window.pairs_per_s, _COUNTS)} pairs/s",
            f"{format_scaled(window.bytes_per_s, _BYTES)}/s",
            _say_bottleneck(window),
        ]
        lines = [", ".join([*start, self._say_losses(num)]) for num in range(NUM_NAMED, -1, -1)]
        return next((line for line in lines if len(line) <= LINE_CHARACTERS), lines[-1])

    def _say_rows(self, whole: _Span, window: _Span) -> tuple[str, ...]:
        lately = format_scaled(window.pairs_per_s, _COUNTS)
        always = format_scaled(whole.pairs_per_s, _COUNTS)
        since = f" ({always} since the start)" if always != lately else ""
        return (
            f"{lately} pairs/s{since}, "
            f"{format_scaled(window.bytes_per_s, _BYTES)}/s; "
            f"{format_scaled(self.num_pairs, _COUNTS)} pairs, "
            f"{format_scaled(self.num_bytes, _BYTES)}",
            _say_lanes(window),
            self._say_losses(NUM_NAMED),
        )

    def _say_losses(self, num_named: int) -> str:
        named = self.rejects and num_named
        rejects = f" ({join_largest(self.rejects, num=num_named)})" if named else ""
        return f"{len(self.failures)} failed, {self.num_rejects} rejects{rejects}"

    def figures(self) -> dict[str, Any]:
        """Return what ``metrics.jsonl`` gets: numbers, strings and mappings of numbers."""
        return dict(self.report().figures)

    def _figures(self, whole: _Span, window: _Span) -> dict[str, Any]:
        return {
            "pairs": self.num_pairs,
            "samples": self.num_samples,
            "bytes_written": self.num_bytes,
            "tar_bytes_done": self._tar_bytes_done,
            "tar_bytes_total": self._tar_bytes_total,
            "actors": self.num_actors,
            "tasks": dict(self.tasks),
            "failed": len(self.failures),
            "rejects": dict(self.rejects),
            "busy_s": {stage: round(seconds, 3) for stage, seconds in self.busy_s.items()},
            "pairs_per_s": whole.pairs_per_s,
            "bytes_per_s": whole.bytes_per_s,
            "busy": {lane: round(share, 4) for lane, share in whole.busy.items()},
            "window_s": round(window.seconds, 3),
            "window_pairs_per_s": window.pairs_per_s,
            "window_bytes_per_s": window.bytes_per_s,
            "window_busy": {lane: round(share, 4) for lane, share in window.busy.items()},
            "bottleneck": window.bottleneck,
        }

    def describe(self, *, command: str | None = None) -> str:
        """Say what was stored, what was rejected and why, and which tasks failed.

        ``command`` is the one that tries them again: the one that was given.
        """
        num_tasks = self.tasks["committed"]
        lines = [
            f"stored {self.num_samples} samples, {self.num_pairs} pairs, "
            f"{format_scaled(self.num_bytes, _BYTES)} in {count_noun(num_tasks, 'task')}"
        ]
        if self.tasks["lost"]:
            lost = count_noun(self.tasks["lost"], "task")
            lines.append(f"{lost}: another run committed first")
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


def _say_bottleneck(span: _Span) -> str:
    lane, share = max(span.busy.items(), key=lambda item: item[1])
    if span.bottleneck == lane:
        return f"bottleneck {lane} {share:.0%}"
    return f"waiting ({lane} {share:.0%})"


def _say_lanes(span: _Span) -> str:
    """``bottleneck device 94%, decode 41%``: the busiest first, none of those that do nothing."""
    ranked = sorted(span.busy.items(), key=lambda item: -item[1])
    parts = [f"{lane} {share:.0%}" for lane, share in ranked if share >= 0.005]
    head = "waiting: " if span.bottleneck == "waiting" else "bottleneck "
    return head + ", ".join(parts)
