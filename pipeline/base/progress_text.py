"""The state of long work at one moment, formatted as a log line, rows of a bar or a JSON record."""

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

RECORD_FIELDS = frozenset(
    [
        *("time", "verb", "status", "done", "total", "unit", "start", "elapsed_s", "rate_per_s"),
        *("eta_s", "outage"),
    ]
)
NUM_NAMED = 3  # of a mapping's values, the largest; the record holds all

Number = float | int | None  # None is a number that was not finite
Figure = Number | str | Mapping[str, Number]


@dataclass(frozen=True)
class WorkStatus:
    """What work that keeps its own totals says of itself when ``Progress`` asks.

    ``done`` is as in ``ProgressState``. ``text`` ends the log line, ``details`` are rows below the
    bar, of at most 80 columns; ``figures`` go to the record alone. ``eta_s``: None while unknown.
    """

    done: int
    text: str
    details: tuple[str, ...]
    figures: Mapping[str, Figure]
    eta_s: float | None


@dataclass(frozen=True)
class ProgressState:
    """What is known of the work at one moment.

    ``done``, ``start`` and ``total`` count units; ``done`` includes the ``start`` units that
    earlier runs committed, the rate does not. ``work`` is what the work says of itself, if it does.
    """

    verb: str
    status: str
    done: int
    total: int
    unit: str
    start: int
    elapsed_s: float
    figures: Mapping[str, Figure] = field(default_factory=dict)
    work: WorkStatus | None = None
    outage: str = ""  # which servers are waited for, and since when

    @property
    def rate_per_s(self) -> float:
        """Units that this run committed per second; 0 before the first."""
        return max(0, self.done - self.start) / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds left, by the work's own estimate or the rate so far; None while unknown."""
        if self.done >= self.total:
            return 0.0
        if self.work is not None:
            return self.work.eta_s
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
            **({"outage": self.outage} if self.outage else {}),
        }
        return json.dumps(record, allow_nan=False)

    def format_text(self) -> str:
        """``12/468 tasks 2.6% 3.1 tasks/s eta 2m10s stored 340 pairs, rejected 2``."""
        if self.work is not None:
            text = f"{self.format_counts()}, {make_printable(self.work.text)}"
        else:
            text = f"{self.format_counts()} {self._join_figures()}".rstrip()
        return f"{text}; {self.outage}" if self.outage else text

    def format_counts(self) -> str:
        """``12/468 tasks 2.6% 3.1 tasks/s eta 2m10s``; no rate where ``work`` has its own."""
        parts = [f"{self.done}/{self.total} {self.unit}"]
        if self.total > 0:
            # 100.0% is said only when nothing is left.
            limit = 100.0 if self.done >= self.total else 99.9
            parts.append(f"{min(limit, 100 * self.done / self.total):.1f}%")
        if self.rate_per_s > 0 and self.work is None:
            parts.append(f"{format_rate(self.rate_per_s)} {self.unit}/s")
        if self.status != "running":
            parts.append(f"in {format_duration(self.elapsed_s)}")
        elif self.eta_s is not None:
            parts.append(f"eta {format_duration(self.eta_s)}")
        return " ".join(parts)

    def format_rows(self) -> tuple[str, ...]:
        """Return the rows below the bar."""
        rows = [self._join_figures()] if self.work is None else self.work.details
        return tuple(make_printable(row) for row in (*rows, self.outage) if row)

    def _join_figures(self) -> str:
        return make_printable(", ".join(f"{k} {format_figure(v)}" for k, v in self.figures.items()))

    def format_heading(self) -> str:
        """Return the verb, and once the work has ended its status; ``done`` only if all is."""
        if self.status == "running":
            return self.verb
        ended = self.status == "done" and self.done < self.total  # some of it failed
        return f"{self.verb} {'ended' if ended else self.status}"


def plain_figure(name: str, value: object) -> Figure:
    """Return a figure as JSON takes it: plain numbers for NumPy's, None for one not finite."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain_number(f"{name}[{key!r}]", item) for key, item in value.items()}
    return _plain_number(name, value)


def _plain_number(name: str, value: object) -> Number:
    if value is None:
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    assert isinstance(value, numbers.Real), (
        f"figure {name} must be a number, a string or a mapping of numbers, but got {value!r}"
    )
    return float(value) if math.isfinite(value) else None


def format_figure(value: Figure) -> str:
    """A figure in a few characters: ``0.1234``, ``-`` for none, ``(a 2, b 1)`` for a mapping."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return f"({join_largest(value)})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def join_largest(values: Mapping[str, Number], *, num: int = NUM_NAMED) -> str:
    """``no_mask 7, bad_image 3, no_text 2, 4 more``: the largest, and what the rest add up to."""
    there = [(name, value) for name, value in values.items() if value != 0]
    ranked = sorted(there, key=lambda item: -(item[1] or 0))
    parts = [f"{name} {format_figure(value)}" for name, value in ranked[:num]]
    rest = [value or 0 for _, value in ranked[num:]]
    return ", ".join([*parts, f"{format_figure(sum(rest))} more"] if rest else parts)


def make_printable(text: str) -> str:
    """Replace what is not printable by ``?``: no name in a corpus moves the cursor."""
    return "".join(char if char.isprintable() else "?" for char in text)


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


def format_rate(rate: float) -> str:
    """A rate in three characters or so: ``812``, ``3.1``, ``0.02``."""
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"


def format_scaled(value: float, units: Sequence[str], *, step: float = 1000.0) -> str:
    """A large number with the unit it is short in: ``1.42 GB``, ``10.2M``, ``812``.

    ``units`` are of the number, of ``step`` times it, and so on.
    """
    number = 0
    while number + 1 < len(units) and abs(value) >= step:
        value, number = value / step, number + 1
    digits = f"{value:.0f}" if number == 0 or abs(value) >= 100 else f"{value:.3g}"
    return f"{digits}{units[number]}"


def count_noun(number: int, noun: str) -> str:
    """``1 task``, ``2 tasks``: a count with its noun, whose plural takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
