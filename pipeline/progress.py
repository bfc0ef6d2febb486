"""Progress of long work: a bar on a terminal, a line every 30 s elsewhere, records for machines.

``update`` only stores what was committed so far. One daemon thread says it: it redraws the bar or
writes the line, and appends the same as a JSON object to ``metrics.jsonl``. It speaks at every
interval whether or not an update came, so a silent log means a dead process, not a slow one.
"""

import contextlib
import json
import logging
import math
import numbers
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TextIO

import rich.console
import rich.progress

logger = logging.getLogger(__name__)

RECORD_FIELDS = frozenset(
    ["time", "verb", "status", "done", "total", "unit", "start", "elapsed_s", "rate_per_s", "eta_s"]
)
REDRAW_S = 0.2  # five frames a second reads as live and costs under 1 % of a core


@dataclass(frozen=True)
class Snapshot:
    """What is known of the work at one moment.

    ``done``, ``start`` and ``total`` count units; ``done`` holds the ``start`` units that earlier
    runs committed, the rate does not. ``figures`` are finite numbers, strings, or None for a
    number that was not finite.
    """

    verb: str
    status: str
    done: int
    total: int
    unit: str
    start: int
    elapsed_s: float
    figures: Mapping[str, float | int | str | None] = field(default_factory=dict)

    @property
    def rate_per_s(self) -> float:
        """Units this run committed, a second of its own time; 0 before the first."""
        return max(0, self.done - self.start) / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the rate so far: 0 when nothing is left, None while it is unknown."""
        if self.done >= self.total:
            return 0.0
        return (self.total - self.done) / self.rate_per_s if self.rate_per_s > 0 else None

    def format_record(self) -> str:
        """One line of ``metrics.jsonl``: strict JSON in ASCII, without the newline."""
        record = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "verb": self.verb,
            "status": self.status,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "start": self.start,
            "elapsed_s": round(self.elapsed_s, 3),
            "rate_per_s": self.rate_per_s,
            "eta_s": self.eta_s,
            **self.figures,
        }
        return json.dumps(record, allow_nan=False)

    def format_text(self) -> str:
        """``12/468 tasks 2.6% 3.1 tasks/s eta 2m10s stored 340 pairs, rejected 2``."""
        parts = [f"{self.done}/{self.total} {self.unit}"]
        if self.total > 0:
            # 100.0% is said only when nothing is left.
            limit = 100.0 if self.done >= self.total else 99.9
            parts.append(f"{min(limit, 100 * self.done / self.total):.1f}%")
        if self.rate_per_s > 0:
            parts.append(f"{_format_rate(self.rate_per_s)} {self.unit}/s")
        if self.status != "running":
            parts.append(f"in {format_duration(self.elapsed_s)}")
        elif self.eta_s is not None:
            parts.append(f"eta {format_duration(self.eta_s)}")
        if self.figures:
            parts.append(", ".join(f"{k} {_format_figure(v)}" for k, v in self.figures.items()))
        return " ".join(parts)

    def format_heading(self) -> str:
        """The verb, and the status once the work has ended."""
        return self.verb if self.status == "running" else f"{self.verb} {self.status}"


class Progress:
    """Shows how far one piece of work has come, from entering the ``with`` block to leaving it.

    The last line and record always come, with status ``done``, ``interrupted`` (Ctrl-C) or
    ``failed`` (any other exception, which goes on its way). Output that cannot be written (a full
    disk, a closed terminal) is given up with one logged warning: it never stops the work.
    """

    def __init__(
        self,
        verb: str,
        *,
        total: int,
        unit: str,
        metrics_path: Path | None,
        interval_s: float = 30.0,
        stream: TextIO | None = None,
        start: int = 0,
        terminal: bool | None = None,
    ) -> None:
        """Prepares it; nothing is written before the ``with`` block is entered.

        Args:
            verb: the command, the first word of each line.
            total: units in all, 0 allowed.
            unit: the plural noun of what is counted.
            metrics_path: the JSON lines file to append to (its folder is made), or None.
            interval_s: seconds between lines and between records, above 0.
            stream: where lines or the bar go; standard error if None.
            start: units committed before this run; ``done`` starts there, the rate leaves them out.
            terminal: True for the bar, False for lines, None to ask the stream.

        Raises:
            ValueError: a count below 0 or an interval not above 0.
        """
        if total < 0 or start < 0:
            raise ValueError(f"total and start must be 0 or more, but got {total} and {start}")
        if not interval_s > 0:
            raise ValueError(f"interval_s must be above 0 seconds, but got {interval_s}")
        self._verb, self._unit, self._total, self._start = verb, unit, total, start
        self._interval_s, self._metrics_path = interval_s, metrics_path
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._terminal = _is_terminal(self._stream) if terminal is None else terminal
        self._lock = threading.Lock()  # guards _done and _figures, which update() writes
        self._done = start
        self._figures: dict[str, float | int | str | None] = {}
        self._started_s: float | None = None
        self._metrics: BinaryIO | None = None
        self._bar: rich.progress.Progress | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._report, name=f"progress-{verb}", daemon=True)

    def update(self, done: int, **figures: float | int | str) -> None:
        """Notes what has been committed so far. Thread-safe; takes microseconds.

        Args:
            done: units committed in all, those before this run included; not an increment.
            figures: more values to show, each replacing its former value; the others stay.
                A number that is not finite is shown as ``-`` and written as null.

        Raises:
            ValueError: a figure named like a field of the record.
            TypeError: a figure that is neither a number nor a string.
        """
        taken = RECORD_FIELDS & figures.keys()
        if taken:
            raise ValueError(
                f"{self._verb}: figure names must differ from the record's own fields, "
                f"but got {sorted(taken)}; rename them"
            )
        plain = {name: _plain_figure(name, value) for name, value in figures.items()}
        with self._lock:
            self._done = int(done)
            self._figures.update(plain)

    def __enter__(self) -> Self:
        """Writes the first line and record and starts the reporting thread.

        Raises:
            OSError: the metrics file cannot be opened.
        """
        assert self._started_s is None, "a Progress serves one with block"
        self._started_s = time.monotonic()
        if self._metrics_path is not None:
            self._metrics = _open_lines(self._metrics_path)
        if self._terminal:
            self._bar = _build_bar(self._stream)
            self._bar.add_task(self._verb, total=self._total, completed=self._done, text="")
        snapshot = self._snapshot("running")
        self._show(snapshot)
        self._record(snapshot)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the thread and writes the last line and record."""
        self._stop.set()
        self._thread.join()
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        snapshot = self._snapshot(
            "done" if kind is None else "interrupted" if interrupted else "failed"
        )
        self._show(snapshot)
        self._record(snapshot)
        if self._metrics is not None:
            self._metrics.close()
        if self._bar is not None and self._stream is not None:
            with contextlib.suppress(OSError):  # the terminal is gone: no bar left to end
                self._bar.stop()

    def _report(self) -> None:
        """The thread: redraws the bar often, writes lines and records once an interval."""
        wait_s = min(REDRAW_S, self._interval_s) if self._terminal else self._interval_s
        next_record_s = time.monotonic() + self._interval_s
        while not self._stop.wait(wait_s):
            snapshot = self._snapshot("running")
            self._show(snapshot)
            if not self._terminal or time.monotonic() >= next_record_s:
                next_record_s += self._interval_s
                self._record(snapshot)

    def _snapshot(self, status: str) -> Snapshot:
        assert self._started_s is not None
        elapsed_s = time.monotonic() - self._started_s
        with self._lock:
            done, figures = self._done, dict(self._figures)
        return Snapshot(
            self._verb, status, done, self._total, self._unit, self._start, elapsed_s, figures
        )

    def _show(self, snapshot: Snapshot) -> None:
        if self._stream is None:
            return
        try:
            if self._bar is None:
                self._stream.write(f"{snapshot.format_heading()} {snapshot.format_text()}\n")
                self._stream.flush()
            else:
                _draw_bar(self._bar, snapshot)
        except OSError as error:
            self._stream = None
            logger.warning("%s: progress cannot be shown any more: %s", self._verb, error)

    def _record(self, snapshot: Snapshot) -> None:
        if self._metrics is None:
            return
        try:
            self._metrics.write(snapshot.format_record().encode() + b"\n")
        except OSError as error:
            self._metrics = None
            logger.warning(
                "%s: %s cannot be written any more: %s; the work goes on without it",
                self._verb,
                self._metrics_path,
                error,
            )


def format_duration(duration_s: float) -> str:
    """Seconds as ``45s``, ``2m10s``, ``3h05m`` or ``2d04h``."""
    seconds = round(duration_s)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def _open_lines(path: Path) -> BinaryIO:
    """Opens a file of lines to append to, unbuffered: each write is one whole line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b", buffering=0)
    # A run killed in mid-write leaves half a line; it must not swallow our first record.
    if file.seek(0, os.SEEK_END) > 0:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def _build_bar(stream: TextIO | None) -> rich.progress.Progress:
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(bar_width=20),
        rich.progress.TextColumn("{task.fields[text]}", markup=False),
        console=rich.console.Console(file=stream, force_terminal=True),
        auto_refresh=False,  # our thread redraws: rich would start a second one
    )
    bar.start()
    return bar


def _draw_bar(bar: rich.progress.Progress, snapshot: Snapshot) -> None:
    text = snapshot.format_text()
    if snapshot.status == "running":
        text = f"{format_duration(snapshot.elapsed_s)} {text}"
    bar.update(
        bar.task_ids[0], description=snapshot.format_heading(), completed=snapshot.done, text=text
    )
    bar.refresh()


def _plain_figure(name: str, value: object) -> float | int | str | None:
    """A figure as JSON has it: NumPy scalars made plain, None for what is not finite."""
    if isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"figure {name} must be a number or a string, but got {type(value).__name__}")


def _format_figure(value: float | int | str | None) -> str:
    if isinstance(value, str):
        # One line, no terminal codes, whatever a name in a corpus holds.
        return "".join(char if char.isprintable() else "?" for char in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _format_rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
