"""Progress of long work: a bar on a terminal, log lines elsewhere, and JSON records in a file.

``update`` only stores how much is committed. A daemon thread redraws the bar or writes a line, and
appends the same as a JSON object to ``metrics.jsonl``, at every interval whether or not an update
came: a silent log means a dead process, not a slow one.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Self, TextIO

import rich.console
import rich.progress
import rich.text

from pipeline.base.outages import PATIENCE
from pipeline.base.progress_text import (
    RECORD_FIELDS,
    Figure,
    ProgressState,
    WorkStatus,
    format_duration,
    plain_figure,
)

logger = logging.getLogger(__name__)

REDRAW_S = 0.2  # five frames a second reads as live and costs under 1 % of a core
BAR_WIDTH = 12  # leaves 80 columns room for the counts of a million tasks


class Progress:
    """Shows the progress of the work in a ``with`` block.

    The last line and record are always written, with status ``done``, ``stopped`` (the work called
    ``stop``), ``interrupted`` (Ctrl-C) or ``failed`` (any other exception). If the output cannot be
    written (a full disk, a closed terminal), a warning is logged once and the work goes on without.
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
        source: Callable[[], WorkStatus] | None = None,
    ) -> None:
        """Nothing is written before the ``with`` block is entered.

        Args:
            verb: the command, the first word of each line.
            total: units in all; 0 is allowed.
            unit: plural noun of what is counted.
            metrics_path: JSON lines file to append to (its folder is made), or None.
            interval_s: seconds between lines and between records, above 0.
            stream: where lines or the bar go; None is standard error.
            start: units committed by earlier runs: ``done`` starts there, the rate leaves them out.
            terminal: True for the bar, False for lines, None to ask the stream.
            source: called by the reporting thread each time; its answer overrides ``update``.
        """
        assert total >= 0, f"total must be 0 or more, but got {total}"
        assert start >= 0, f"start must be 0 or more, but got {start}"
        assert interval_s > 0, f"interval_s must be above 0 seconds, but got {interval_s}"
        self._verb, self._unit, self._total, self._start = verb, unit, total, start
        self._interval_s, self._metrics_path = interval_s, metrics_path
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._terminal = _is_terminal(self._stream) if terminal is None else terminal
        self._lock = threading.Lock()  # guards _done and _figures, which update() writes
        self._done = start
        self._figures: dict[str, Figure] = {}
        self._source = source
        self._started_s: float | None = None
        self._metrics: BinaryIO | None = None
        self._bar: _Bar | None = None
        self._stop = threading.Event()
        self._ended = "done"
        self._thread = threading.Thread(target=self._run, name=f"progress-{verb}", daemon=True)

    def update(self, done: int, **figures: float | str | Mapping[str, float]) -> None:
        """Store how much is committed so far. Thread-safe; takes microseconds.

        Args:
            done: units committed in all, earlier runs' included; not an increment.
            figures: more values to show; those of earlier calls stay until replaced. A number
                that is not finite is shown as ``-`` and written as null; of a mapping the largest
                values are shown and all are written.
        """
        plain = self._plain(figures)
        with self._lock:
            self._done = int(done)
            self._figures.update(plain)

    def stop(self) -> None:
        """Have the last line and record say ``stopped``: the work ends before all was tried."""
        self._ended = "stopped"

    def _plain(self, figures: Mapping[str, object]) -> dict[str, Figure]:
        taken = RECORD_FIELDS & figures.keys()
        assert not taken, f"figures must not be named like the record's fields {sorted(taken)}"
        return {name: plain_figure(name, value) for name, value in figures.items()}

    def __enter__(self) -> Self:
        """Write the first line and record, and start the reporting thread.

        Raises:
            OSError: the metrics file cannot be opened.
        """
        assert self._started_s is None, "a Progress serves one with block"
        self._started_s = time.monotonic()
        if self._metrics_path is not None:
            self._metrics = open_lines(self._metrics_path)
        if self._terminal:
            self._bar = _build_bar(self._stream)
            self._bar.add_task(self._verb, total=self._total, completed=self._done, text="")
        self._show_and_record("running")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """End the thread, and write the last line and record."""
        self._stop.set()
        self._thread.join()
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._show_and_record(
            self._ended if kind is None else "interrupted" if interrupted else "failed"
        )
        if self._metrics is not None:
            self._metrics.close()
        if self._bar is not None and self._stream is not None:
            with contextlib.suppress(OSError):  # the terminal is gone: no bar left to end
                self._bar.stop()

    def _run(self) -> None:
        """The thread: redraws the bar often, writes lines and records once an interval."""
        wait_s = min(REDRAW_S, self._interval_s) if self._terminal else self._interval_s
        next_record_s = time.monotonic() + self._interval_s
        while not self._stop.wait(wait_s):
            due = not self._terminal or time.monotonic() >= next_record_s
            self._show_and_record("running", record=due)
            next_record_s += self._interval_s if due else 0.0

    def _show_and_record(self, status: str, *, record: bool = True) -> None:
        state = self._build_state(status)
        self._show(state)
        if record:
            self._record(state)

    def _build_state(self, status: str) -> ProgressState:
        assert self._started_s is not None
        elapsed_s = time.monotonic() - self._started_s
        work = self._source() if self._source is not None else None
        with self._lock:
            done, figures = self._done, dict(self._figures)
        if work is not None:
            done, figures = work.done, figures | self._plain(work.figures)
        return ProgressState(
            *(self._verb, status, done, self._total, self._unit, self._start),
            elapsed_s=elapsed_s,
            figures=figures,
            work=work,
            outage=PATIENCE.describe(),
        )

    def _show(self, state: ProgressState) -> None:
        if self._stream is None:
            return
        try:
            if self._bar is None:
                self._stream.write(f"{state.format_heading()} {state.format_text()}\n")
                self._stream.flush()
            else:
                self._bar.draw(state)
        except OSError as error:
            self._stream = None
            logger.warning("%s: progress cannot be shown any more: %s", self._verb, error)

    def _record(self, state: ProgressState) -> None:
        if self._metrics is None:
            return
        try:
            self._metrics.write(state.format_record().encode() + b"\n")
        except OSError as error:
            self._metrics = None
            logger.warning(
                "%s: %s cannot be written any more: %s; the work goes on without it",
                *(self._verb, self._metrics_path, error),
            )


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def open_lines(path: Path) -> BinaryIO:
    """Open a file of lines to append to, unbuffered: each write is one whole line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b", buffering=0)
    # A run killed in mid-write leaves half a line; it must not swallow our first record.
    if file.seek(0, os.SEEK_END) > 0:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


class _Bar(rich.progress.Progress):
    """A bar with its counts, and rows of text below it that are cut at the terminal's width."""

    details: tuple[str, ...] = ()

    def get_renderables(self) -> Iterable[rich.console.RenderableType]:
        yield from super().get_renderables()
        for row in self.details:
            yield rich.text.Text(f"  {row}", no_wrap=True, overflow="ellipsis")

    def draw(self, state: ProgressState) -> None:
        """Redraw the bar at once."""
        text = state.format_counts()
        if state.status == "running":
            text = f"{format_duration(state.elapsed_s)} {text}"
        self.details = state.format_rows()
        heading, done = state.format_heading(), state.done
        self.update(self.task_ids[0], description=heading, completed=done, text=text)
        self.refresh()


def _build_bar(stream: TextIO | None) -> _Bar:
    bar = _Bar(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(bar_width=BAR_WIDTH),
        rich.progress.TextColumn("{task.fields[text]}", markup=False),
        console=rich.console.Console(file=stream, force_terminal=True),
        auto_refresh=False,  # our thread redraws: rich would start a second one
    )
    bar.start()
    return bar
