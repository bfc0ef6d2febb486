"""Reads the phrases of a sample's JSON, ``{"phrases": [...]}``, UTF-8 of bounded depth."""

import json
import re
from typing import Any, NoReturn

MAX_JSON_DEPTH = 16
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Not allowed in phrases and names: control characters, line separators, lone surrogates."""

_JSON_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


class BadTextError(ValueError):
    """A sample's text is no JSON, or its phrases break a rule; the message is one line."""


def parse_phrases(data: bytes, *, max_phrases: int, max_phrase_chars: int) -> tuple[str, ...]:
    """Read the phrases of ``{"phrases": [...]}``; other keys are ignored.

    Only outer whitespace is removed: case, inner spaces and Unicode form stay. Two phrases may be
    equal.

    Raises:
        BadTextError: not UTF-8, not JSON, too deep, a key twice, NaN, not 1 to ``max_phrases``
            phrases, or one that is blank, unprintable or over ``max_phrase_chars`` characters.
    """
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        document = json.loads(
            text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
        )
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise BadTextError(f"{type(error).__name__}: {error}") from error
    phrases = document.get("phrases") if isinstance(document, dict) else None
    if not isinstance(phrases, list) or not 1 <= len(phrases) <= max_phrases:
        raise BadTextError(f'expected {{"phrases": [1 to {max_phrases} strings]}}')
    return tuple(_check_phrase(i, phrase, max_phrase_chars) for i, phrase in enumerate(phrases))


def _check_phrase(i: int, phrase: object, max_chars: int) -> str:
    if not isinstance(phrase, str) or not (phrase := phrase.strip()):
        raise BadTextError(f"phrase {i}: expected a string that is not blank, got {phrase!r:.40}")
    if len(phrase) > max_chars:
        detail = f"expected at most {max_chars} characters, got {len(phrase)}"
        raise BadTextError(f"phrase {i}: {detail}")
    if UNPRINTABLE.search(phrase):
        raise BadTextError(f"phrase {i}: has control characters or lone surrogates")
    return phrase


def _check_depth(text: str) -> None:
    """Refuse a deep document, on which ``json.loads`` would exhaust its recursion."""
    depth = 0
    for token in _JSON_TOKEN.finditer(text):
        first = text[token.start()]
        depth += (first in "[{") - (first in "]}")
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"expected at most {MAX_JSON_DEPTH} levels of nesting, got more")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("expected each key once, got one twice")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"expected JSON, which has no {name}")
