"""Reads the phrases of a sample's JSON, ``{"phrases": [...]}``.

Strict about the phrases, lenient about everything else: what a key holds that is not read may be
no JSON (NaN, a number of any length, control characters, a key twice) and no UTF-8.
"""

import json
import re

MAX_JSON_DEPTH = 100
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Not allowed in phrases and names: control characters, line separators, lone surrogates."""

_JSON_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


class BadTextError(ValueError):
    """A sample's text is no JSON, or its phrases break a rule; the message is one line."""


def parse_phrases(data: bytes, *, max_phrases: int, max_phrase_chars: int) -> tuple[str, ...]:
    """Read the phrases of ``{"phrases": [...]}``; other keys are ignored.

    UTF-8, 16 or 32, with a byte order mark or without, are told apart as RFC 4627 (section 3) does.
    Only outer whitespace is removed: case, inner spaces and Unicode form stay. Two phrases may be
    equal.

    Raises:
        BadTextError: not JSON, too deep, the phrases twice, not 1 to ``max_phrases`` of them, or
            one that is blank, unprintable, not in the text's encoding or over ``max_phrase_chars``
            characters.
    """
    try:
        text = data.decode(json.detect_encoding(data), "surrogateescape")
        _check_depth(text)
        document = json.loads(
            text,
            strict=False,  # control characters in strings; a phrase's are found below
            parse_int=float,  # takes a number of any length; int refuses 4,300 digits
            object_pairs_hook=tuple,  # no list and no dict: to see the phrases twice
        )
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise BadTextError(f"{type(error).__name__}: {error}") from error
    pairs = document if isinstance(document, tuple) else ()
    found = [value for key, value in pairs if key == "phrases"]
    if len(found) > 1:
        raise BadTextError(f'expected the key "phrases" once, got it {len(found)} times')
    phrases = found[0] if found else None
    if not isinstance(phrases, list) or not 1 <= len(phrases) <= max_phrases:
        got = _describe_phrases(phrases, document, is_there=bool(found))
        raise BadTextError(f'expected {{"phrases": [1 to {max_phrases} strings]}}, got {got}')
    return tuple(_check_phrase(i, phrase, max_phrase_chars) for i, phrase in enumerate(phrases))


def _describe_phrases(phrases: object, document: object, *, is_there: bool) -> str:
    """Say what is there in place of a list of phrases."""
    if not isinstance(document, tuple):
        return f"a document that is no object: {json.dumps(document):.40}"
    if not is_there:
        keys = ", ".join(json.dumps(key) for key, _ in document[:5]) or "none"
        return f'no key "phrases"; its keys: {keys:.200}'
    if isinstance(phrases, list):
        return f"{len(phrases)} of them" if phrases else "an empty list"
    kinds = ((str, "a string, "), (tuple, "an object, "))
    what = next((name for kind, name in kinds if isinstance(phrases, kind)), "")
    return f"{what}{json.dumps(phrases):.60}"


def _check_phrase(i: int, phrase: object, max_chars: int) -> str:
    if not isinstance(phrase, str) or not (phrase := phrase.strip()):
        raise BadTextError(f"phrase {i}: expected a string that is not blank, got {phrase!r:.40}")
    if len(phrase) > max_chars:
        detail = f"expected at most {max_chars} characters, got {len(phrase)}"
        raise BadTextError(f"phrase {i}: {detail}")
    if UNPRINTABLE.search(phrase):
        detail = "has control characters, lone surrogates or another encoding than the text's"
        raise BadTextError(f"phrase {i}: {detail}")
    return phrase


def _check_depth(text: str) -> None:
    """Refuse a deep document, on which ``json.loads`` would exhaust its recursion."""
    depth = 0
    for token in _JSON_TOKEN.finditer(text):
        first = text[token.start()]
        depth += (first in "[{") - (first in "]}")
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"expected at most {MAX_JSON_DEPTH} levels of nesting, got more")
