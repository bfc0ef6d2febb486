"""The heat map of AP by block and timestep (the paper's figure 4), of probes of one block and draw.

Rows are timesteps, columns are blocks in the UNet's forward order; each cell has the mean AP over
seeds, in percent.
"""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipeline.base.whole_file import write_whole
from pipeline.sweep.config import VALIDATION
from pipeline.sweep.results import Row, Spread, group_rows
from pipeline.sweep.trials import SweepPlan, is_probe

NAME = "heat-map"
COLORS = "viridis"  # even in lightness, so it reads in grey and for the colour-blind
_BLACK_FROM = 111 / 256  # of its range: from here black text has more contrast (WCAG 2.2)
METRIC = "AP"
_CELL_IN = (0.52, 0.36)
_DPI = 200
_SIDES_IN = (2.1, 1.85)  # of labels, title and colour bar
_MARGIN_IN = 0.1
# Each combination of these has a map.
_FAMILY = ("head", "options", "features", "variant", "learning_rate", "num_steps")


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A map's cells: ``values[i, j]`` is the mean of timestep i and block j, NaN if missing."""

    name: str  # the values in which it differs from a sweep's other maps; empty if it is the only
    blocks: tuple[int, ...]
    timesteps: tuple[int, ...]
    values: np.ndarray  # float64, percent
    seeds: tuple[int, int]  # least and most in a cell
    deviation: float | None  # root mean square of the cells' standard deviations, percent
    num_pairs: int  # scored for each cell


def build_maps(rows: Iterable[Row]) -> list[HeatMap]:
    """Return a map of each family of probes that differ only in block, draw and seed."""
    families: dict[tuple[object, ...], list[tuple[Row, Spread]]] = {}
    for row, spreads in group_rows(rows):
        single = is_probe(row["head"]) and row["timesteps"] is not None
        single = single and row["scored_on"] == VALIDATION
        if single and len(row["blocks"]) == 1 and len(row["timesteps"]) == 1:
            key = tuple(row[name] for name in _FAMILY)
            families.setdefault(key, []).append((row, spreads[METRIC]))
    shown = [i for i in range(len(_FAMILY)) if len({key[i] for key in families}) > 1]
    for redundant in ("options", "head"):  # where the head, or a variant's name, says as much
        fewer = [i for i in shown if _FAMILY[i] != redundant]
        if len({tuple(key[i] for i in fewer) for key in families}) == len(families):
            shown = fewer
    return [
        _build_map(" ".join(str(key[i]) for i in shown), cells) for key, cells in families.items()
    ]


def _build_map(name: str, rows: Sequence[tuple[Row, Spread]]) -> HeatMap:
    cells = [(row["timesteps"][0], row["blocks"][0], spread) for row, spread in rows]
    timesteps = tuple(sorted({t for t, _, _ in cells}))
    blocks = tuple(sorted({block for _, block, _ in cells}))
    values = np.full((len(timesteps), len(blocks)), np.nan)
    for t, block, spread in cells:
        values[timesteps.index(t), blocks.index(block)] = 100 * spread.mean
    counts = [spread.num for _, _, spread in cells]
    squares = [spread.deviation**2 for _, _, spread in cells if spread.deviation is not None]
    deviation = 100 * float(np.sqrt(np.mean(squares))) if squares else None
    seeds = (min(counts), max(counts))
    num_pairs = rows[0][0]["num_pairs"]  # the same in all rows of a variant and a layer
    return HeatMap(name, blocks, timesteps, values, seeds, deviation, num_pairs)


def write_heat_maps(plan: SweepPlan, rows: Iterable[Row]) -> list[str]:
    """Write ``heat-map.png``, or one file for each family of probes; return the file names."""
    names = []
    for found in build_maps(rows):
        suffix = re.sub(r"[^A-Za-z0-9.]+", "-", found.name)
        name = f"{NAME}-{suffix}.png" if found.name else f"{NAME}.png"
        write_whole(plan.out / name, draw_heat_map(found, note=_describe(plan, found)))
        names.append(name)
    return names


def _describe(plan: SweepPlan, found: HeatMap) -> str:
    low, high = found.seeds
    num = f"{low}" if low == high else f"{low} to {high}"
    parts = [
        plan.config.title or plan.store_url.rstrip("/").rsplit("/", 1)[-1],
        f"{found.num_pairs:,} validation pairs",
        f"{num} seed{'s' if high > 1 else ''} a cell",
    ]
    if found.deviation is not None:
        parts.append(f"standard deviation over seeds {found.deviation:.1f}")
    return ", ".join(parts)


def draw_heat_map(found: HeatMap, *, note: str) -> bytes:
    """Return a PNG, with each cell's number in black or white, whichever has more contrast."""
    num_rows, num_columns = found.values.shape
    size = (_SIDES_IN[0] + _CELL_IN[0] * num_columns, _SIDES_IN[1] + _CELL_IN[1] * num_rows)
    layout = ConstrainedLayoutEngine(w_pad=_MARGIN_IN, h_pad=_MARGIN_IN)
    figure = Figure(figsize=(max(size[0], 5.0), max(size[1], 2.6)), dpi=_DPI, layout=layout)
    axes = figure.add_subplot()
    finite = found.values[np.isfinite(found.values)]
    norm = Normalize(finite.min(), max(finite.max(), finite.min() + 1e-6))
    image = axes.imshow(found.values, cmap=COLORS, norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(found.values):
        if np.isfinite(value):
            color = "black" if norm(value) >= _BLACK_FROM else "white"
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(num_columns), [str(block) for block in found.blocks])
    axes.set_yticks(range(num_rows), [str(t) for t in found.timesteps])
    axes.set_xticks(np.arange(0.5, num_columns - 1), minor=True)
    axes.set_yticks(np.arange(0.5, num_rows - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("UNet block", fontsize=10)
    axes.set_ylabel("timestep t", fontsize=10)
    heading = "AP of probes by UNet block and timestep" + (f": {found.name}" if found.name else "")
    # A title may have a user's text, so it is not parsed for formulas.
    axes.set_title(heading, loc="left", fontsize=11, pad=22, parse_math=False)
    axes.annotate(
        note,
        xy=(0, 1),
        xytext=(0, 7),  # points above the cells
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8,
        color="#555555",
        parse_math=False,
    )
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
    bar.set_label("AP, %", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white", metadata={"Software": None})
    return file.getvalue()
