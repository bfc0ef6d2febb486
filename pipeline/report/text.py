"""How the report writes text and numbers: escaped, in percent, a dash where there is none."""

import html
import math
import unicodedata
from collections.abc import Sequence

DASH = "–"
MINUS = "−"  # as wide as the plus sign, so that signs stand below each other


def escape(text: str) -> str:
    """Text for HTML, in an attribute too; control characters and lone surrogates are replaced."""
    clean = "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else "\ufffd"
        for char in text
    )
    return html.escape(clean)


def join_lines(lines: Sequence[str]) -> str:
    """The lines as one text."""
    return "\n".join(lines)


def format_percent(score: float) -> str:
    """A score in [0, 1] in percent, a dash where it is not finite."""
    return f"{100 * score:.1f}" if math.isfinite(score) else DASH


def format_points(difference: float) -> str:
    """A difference in [-1, 1] in percentage points, signed unless it is zero to the digit shown."""
    shown = format_percent(abs(difference))
    if shown in (DASH, "0.0"):
        return shown
    return f"{'+' if difference > 0 else MINUS}{shown}"
