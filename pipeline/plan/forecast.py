"""The figures of a plan with their ranges, kept as JSON to compare them with a run later."""

import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline.base.yaml import SpecError
from pipeline.plan.estimate import NOTHING, Estimate


@dataclass(frozen=True, slots=True)
class FileForecast:
    """Bytes of one array, or of another file, of a layer."""

    layer: str
    name: str
    num_bytes: Estimate


@dataclass(frozen=True)
class HeadForecast:
    """An epoch of a head from the cache, and one that computes the head's inputs anew."""

    head: str
    batch: int
    pairs: Estimate  # of an epoch
    planned_epochs: float
    cache_epoch_s: Estimate
    recompute_epoch_s: Estimate
    encode_s: Estimate  # once, of the layers that the head reads
    cache_bytes: Estimate  # of those layers

    @property
    def break_even(self) -> float:
        """Epochs after which the cache has cost less, at least 1; infinite if it never does."""
        saved_s = self.recompute_epoch_s.value - self.cache_epoch_s.value
        return _break_even(self.encode_s.value, saved_s)

    @property
    def break_even_range(self) -> tuple[float, float]:
        """The break-even epoch at the good and at the bad end of the ranges."""
        cache, recompute = self.cache_epoch_s, self.recompute_epoch_s
        best = _break_even(self.encode_s.low, recompute.high - cache.low)
        return best, _break_even(self.encode_s.high, recompute.low - cache.high)

    @property
    def pays(self) -> bool:
        """Whether the cache costs less within the planned epochs."""
        return self.break_even <= self.planned_epochs

    @property
    def verdict(self) -> str:
        """Which way to choose, and from which epoch on."""
        size = format_bytes(self.cache_bytes.value)
        planned = f"{format_epochs(self.planned_epochs)} epochs planned"
        if math.isinf(self.break_even):
            return (
                "recompute: an epoch from the cache is not faster here, so it never pays; it would "
                f"keep {size}"
            )
        low, high = (format_epochs(number) for number in self.break_even_range)
        when = f"from epoch {format_epochs(self.break_even)} on ({low} to {high})"
        if self.pays:
            return f"cache: pays {when}, of {planned}; keeps {size}"
        return f"recompute: the cache would pay {when}, past the {planned}; it would keep {size}"


def _break_even(encode_s: float, saved_s: float) -> float:
    return max(1.0, float(math.ceil(encode_s / saved_s))) if saved_s > 0 else math.inf


def format_epochs(number: float) -> str:
    """``2,890``: whole from 10 on; never if infinite."""
    if math.isinf(number):
        return "never"
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


@dataclass(frozen=True)
class Forecast:
    """All figures of a plan, in seconds and bytes; ``dollars`` if a price was given."""

    facts: dict[str, str | int | float]
    counts: dict[str, Estimate]
    rejects: dict[str, Estimate]
    files: list[FileForecast]
    times: dict[str, Estimate]
    dollars: Estimate | None
    heads: list[HeadForecast]
    left_out: dict[str, str] = field(default_factory=dict)  # head -> why it was not timed

    @property
    def num_bytes(self) -> Estimate:
        """Bytes of all layers, metadata included."""
        return self.counts["bytes"]

    def by_layer(self) -> dict[str, Estimate]:
        """Return layer → its bytes."""
        found: defaultdict[str, Estimate] = defaultdict(lambda: NOTHING)
        for file in self.files:
            found[file.layer] += file.num_bytes
        return dict(found)

    def to_json(self) -> str:
        """Return it as JSON, with the heads' break-even epochs and verdicts; infinity is null."""
        plain = asdict(self)
        for head, row in zip(self.heads, plain["heads"], strict=True):
            epochs = [head.break_even, *head.break_even_range]
            row["break_even"] = [None if math.isinf(number) else number for number in epochs]
            row["verdict"] = head.verdict
        return json.dumps(plain, indent=1, allow_nan=False)


def read_forecast(path: Path) -> Forecast:
    """Read back what ``to_json`` gave; SpecError where that is no such file."""
    try:
        return TypeAdapter(Forecast).validate_json(path.read_bytes())
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    except ValidationError as error:
        raise SpecError(
            f"{path}: expected what `ldznet plan --json` printed, got something else: {error}"
        ) from error


def format_bytes(number: float) -> str:
    """``228.9 MB``: four digits and a decimal unit."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.0f} B"


def format_seconds(number: float) -> str:
    """``3.21 h``: three digits and the unit that suits."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if number >= 2 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} s"
