"""Rows of figures as a Markdown table that reads as plain text too."""

from collections.abc import Mapping, Sequence


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return an aligned Markdown table: the first row's keys as header, numbers to the right.

    None is an empty cell. A float gets four significant digits; an int its thousands apart;
    a bool is yes or no.
    """
    assert rows, "a table has at least one row"
    names = list(rows[0])
    cells = [[_format(row[name]) for name in names] for row in rows]
    widths = [max(3, *(len(line[i]) for line in [names, *cells])) for i in range(len(names))]
    numeric = [all(not isinstance(row[name], str | bool) for row in rows) for name in names]
    rule = [("-" * (w - 1) + ":") if n else "-" * w for w, n in zip(widths, numeric, strict=True)]
    return "\n".join(_join(line, widths, numeric) for line in [names, rule, *cells])


def _join(line: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = [
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(line, widths, numeric, strict=True)
    ]
    return "| " + " | ".join(padded) + " |"


def _format(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        rounded = float(f"{value:.4g}")  # 999.96 is a 1000 without decimals
        return f"{value:.0f}" if 1e3 <= abs(rounded) < 1e7 else f"{value:#.4g}"
    return str(value)
