"""The items of one big JSON list, one at a time.

A file of 340 MB takes as much as text and ten times as much when it is parsed whole; so a reader
keeps the text and each item's place, and parses an item when it is wanted.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.base.yaml import SpecError

_SPACE = re.compile(r"[ \t\n\r]*")


class Item(NamedTuple):
    """A parsed item, and its place in the text: ``json.loads(text[start:end])`` is it again."""

    start: int
    end: int
    value: Any


def read_json_text(path: Path) -> str:
    """Read a JSON file's text; SpecError where it is not there or no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error


def iterate_items(text: str, *, where: str) -> Iterator[Item]:
    """Yield the items of a JSON list, whose file ``where`` names in errors.

    Raises:
        SpecError: the text is no JSON list, or ends before the list does.
    """
    decode = json.JSONDecoder().raw_decode
    at = _skip_space(text, 0)
    more = whole = False
    if text.startswith("[", at):
        at = _skip_space(text, at + 1)
        whole = text.startswith("]", at)
        more = not whole
    while more:
        try:
            value, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{where}: is no whole JSON list: {error}; fetch it again") from error
        yield Item(at, end, value)
        at = _skip_space(text, end)
        more, whole = text.startswith(",", at), text.startswith("]", at)
        at = _skip_space(text, at + 1) if more else at
    if not whole or _skip_space(text, at + 1) < len(text):
        raise SpecError(
            f"{where}: expected one whole JSON list, got {text[at : at + 20]!r} at character "
            f"{at} of {len(text)}; is it another file, or cut short?"
        )


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()
