"""Reads the text of a sample: ``{"phrases": [...]}`` in its JSON, or a caption, or none.

Phrases come from ``KEY.json``; else ``KEY.txt`` is a caption, else the JSON's ``caption`` is one. A
caption is one phrase and describes the whole image: it is put into a stated form and never refused.
A JSON of which neither is read is a sidecar, as img2dataset and SA-1B write them.

Strict about the phrases, lenient about everything else: what a key holds that is not read may be
no JSON (NaN, a number of any length, control characters, a key twice) and no UTF-8.
"""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unicodedata import normalize

MAX_JSON_DEPTH = 100
MAX_CAPTION_CHARS = 1000
CAPTION_BYTES = 64 * 1024
"""Of a caption's file that are read: its first 1,000 characters are in them, but for blanks."""
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Not allowed in phrases and names: control characters, line separators, lone surrogates."""

_JSON_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class BadTextError(ValueError):
    """A sample's text is no JSON, or its phrases break a rule; the message is one line."""


class _Number(str):
    """A number as the JSON spells it: of any length and precision."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class SampleText:
    """What a sample's text says.

    ``phrases`` are in the image, ``negatives`` are not; there may be none of either. ``kept`` has
    for each key asked for the value of the image, or one for each phrase. ``set_aside`` are the
    extensions of the text members of which no phrase was read; ``notes`` what was converted.
    """

    phrases: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    kept: Mapping[str, str | tuple[str | None, ...] | None] = field(default_factory=dict)
    set_aside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def num_set_aside(self) -> int:
        """Number of the text members that were set aside."""
        return len(self.set_aside)

    def find_kept(self, name: str, phrase: int | None) -> str | None:
        """Return a kept value of the phrase with a number; None: of what is no phrase of it."""
        value = self.kept.get(name)
        if isinstance(value, tuple):
            return None if phrase is None else value[phrase]
        return value


def fold_phrase(phrase: str) -> str:
    """Return the form in which two phrases are one: NFC, without case, blanks as single spaces."""
    return " ".join(normalize("NFC", normalize("NFC", phrase).casefold()).split())


def parse_text(
    document: bytes | None,
    caption: bytes | None,
    *,
    max_phrases: int,
    max_phrase_chars: int,
    keep_json: Sequence[str] = (),
) -> SampleText:
    """Read the text of a sample from its JSON and its plain caption, of which either may be None.

    The JSON's UTF-8, 16 or 32, with a byte order mark or without, are told apart as RFC 4627
    (section 3) does. Of a phrase only outer whitespace is removed: case, inner spaces and Unicode
    form stay. Two phrases may be equal.

    Raises:
        BadTextError: not JSON, and no caption beside it; too deep, the phrases twice, not 1 to
            ``max_phrases`` of them, or one that is blank, unprintable, not in the text's encoding
            or over ``max_phrase_chars`` characters; a negative that is among the phrases.
    """
    pairs: tuple[tuple[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    try:
        pairs = () if document is None else _load(document)
    except BadTextError:
        if caption is None:
            raise
        notes = ("unread_json",)
    found = [value for key, value in pairs if key == "phrases"]
    values = dict(pairs)
    said_not = values.get("negatives", [])
    negatives = _find_negatives(said_not, max_phrases, max_phrase_chars, strict=bool(found))
    used = {"json"} if found or negatives else set()
    if found:
        phrases = _check_phrases(found, max_phrases, max_phrase_chars, may_be_empty=bool(negatives))
    else:
        said = caption
        if caption is None and _is_text(values.get("caption")):
            said = values["caption"]
        used |= {"txt"} if caption is not None else {"json"} if said is not None else set()
        text, changes = _normalise_caption(said or "")
        phrases, notes = (text,) if text else (), notes + changes
    own = set(map(fold_phrase, phrases))
    for phrase in negatives:
        if fold_phrase(phrase) in own:
            raise BadTextError(f"negative {phrase!r:.80}: is one of the phrases too")
    kept = {name: _keep(values.get(name), len(phrases)) for name in keep_json}
    there = [name for name, text in (("json", document), ("txt", caption)) if text is not None]
    set_aside = tuple(name for name in there if name not in used)
    return SampleText(phrases, negatives, kept, set_aside, notes)


def list_keys(document: bytes) -> list[str]:
    """Return the keys of a sample's JSON, each once, in order; none of what cannot be read."""
    try:
        return list(dict.fromkeys(key for key, _ in _load(document)))
    except BadTextError:  # ``parse_text`` tells of it, or has refused the sample
        return []


def _load(data: bytes) -> tuple[tuple[str, Any], ...]:
    """Return the keys and values of a JSON object, with objects in it as tuples of such pairs.

    Other JSON, such as a list of boxes, has none: it is some producer's sidecar.
    """
    try:
        text = data.decode(json.detect_encoding(data), "surrogateescape")
        _check_depth(text)
        document = json.loads(
            text,
            strict=False,  # control characters in strings; a phrase's are found below
            parse_int=_Number,  # int refuses 4,300 digits
            parse_float=_Number,
            object_pairs_hook=tuple,  # no list and no dict: to see the phrases twice
        )
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise BadTextError(f"{type(error).__name__}: {error}") from error
    return document if isinstance(document, tuple) else ()


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not isinstance(value, _Number)


def _check_phrases(
    found: Sequence[Any], most: int, max_chars: int, *, may_be_empty: bool
) -> tuple[str, ...]:
    if len(found) > 1:
        raise BadTextError(f'expected the key "phrases" once, got it {len(found)} times')
    phrases = found[0]
    if phrases == [] and may_be_empty:
        return ()
    if not isinstance(phrases, list) or not 1 <= len(phrases) <= most:
        got = _describe_phrases(phrases)
        raise BadTextError(f'expected {{"phrases": [1 to {most} strings]}}, got {got}')
    return tuple(_check_phrase(f"phrase {i}", x, max_chars) for i, x in enumerate(phrases))


def _find_negatives(negatives: Any, most: int, max_chars: int, *, strict: bool) -> tuple[str, ...]:
    """Return the negatives, each once; unless ``strict``, a key that holds none is another's."""
    try:
        if not isinstance(negatives, list) or len(negatives) > most:
            got = _describe_phrases(negatives)
            raise BadTextError(f'expected {{"negatives": [at most {most} strings]}}, got {got}')
        found = [_check_phrase(f"negative {i}", x, max_chars) for i, x in enumerate(negatives)]
    except BadTextError:
        if strict:
            raise
        return ()
    first: dict[str, str] = {}
    for phrase in found:
        first.setdefault(fold_phrase(phrase), phrase)
    return tuple(first.values())


def _describe_phrases(phrases: object) -> str:
    """Say what is there in place of a list of phrases."""
    if isinstance(phrases, list):
        return f"{len(phrases)} of them" if phrases else "an empty list"
    what = (
        "a string, " if _is_text(phrases) else "an object, " if isinstance(phrases, tuple) else ""
    )
    return f"{what}{_show(phrases):.60}"


def _check_phrase(name: str, phrase: object, max_chars: int) -> str:
    if not _is_text(phrase) or not (phrase := str(phrase).strip()):
        raise BadTextError(f"{name}: expected a string that is not blank, got {_show(phrase):.40}")
    if len(phrase) > max_chars:
        detail = f"expected at most {max_chars} characters, got {len(phrase)}"
        raise BadTextError(f"{name}: {detail}")
    if UNPRINTABLE.search(phrase):
        detail = "has control characters, lone surrogates or another encoding than the text's"
        raise BadTextError(f"{name}: {detail}")
    return phrase


def _normalise_caption(said: bytes | str) -> tuple[str, tuple[str, ...]]:
    """Return a caption in one line of at most 1,000 characters, and what that changed.

    Whitespace and control characters become single spaces. Bytes are UTF-8, or UTF-16 with a byte
    order mark; what is neither becomes U+FFFD.
    """
    notes = []
    if isinstance(said, bytes):
        encoding = "utf-16" if said.startswith(_UTF16) else "utf-8-sig"
        decoder = codecs.getincrementaldecoder(encoding)("replace")
        said = decoder.decode(said, final=len(said) < CAPTION_BYTES)  # else cut in a character
        if "\ufffd" in said:
            notes.append("recoded_captions")
    text = " ".join(UNPRINTABLE.sub(" ", said).split())
    if len(text) > MAX_CAPTION_CHARS:
        notes.append("cut_captions")
    return text[:MAX_CAPTION_CHARS].rstrip(), tuple(notes)


def _keep(value: Any, num_phrases: int) -> str | tuple[str | None, ...] | None:
    """Return a key's value as text: one, or where it is a list with one a phrase, as many."""
    if isinstance(value, list) and len(value) == num_phrases > 0:
        return tuple(_describe_value(each) for each in value)
    return _describe_value(value)


def _describe_value(value: Any) -> str | None:
    if value is None:
        return None
    text = str(value) if isinstance(value, str) else _show(value)
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def _show(value: Any) -> str:
    """Return a parsed value as JSON, with numbers as they were spelt."""
    if isinstance(value, tuple):
        inner = ", ".join(f"{json.dumps(key)}: {_show(each)}" for key, each in value)
        return f"{{{inner}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    return str(value) if isinstance(value, _Number) else json.dumps(value)


def _check_depth(text: str) -> None:
    """Refuse a deep document, on which ``json.loads`` would exhaust its recursion."""
    depth = 0
    for token in _JSON_TOKEN.finditer(text):
        first = text[token.start()]
        depth += (first in "[{") - (first in "]}")
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"expected at most {MAX_JSON_DEPTH} levels of nesting, got more")
