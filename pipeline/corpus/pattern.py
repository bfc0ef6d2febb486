"""What a corpus pattern is, and what one may find: braces, globs, literal names, faults.

Braces expand first (``train-{0000..0999}.tar``), then globs. What exists as it is written is taken
by its name: a folder ``data[v1]`` or ``data{a,b}`` is no pattern.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass, field

from braceexpand import braceexpand

from pipeline.base.secrets import find_url_fault
from pipeline.store.commit import Marks

MAGIC = re.compile(r"[*?\[]")


class CorpusError(ValueError):
    """A corpus that cannot be listed: nothing matches, a refused form, two names of one tar."""


@dataclass(frozen=True, slots=True)
class Found:
    """A tar that a pattern matched, or what stands in a tar's place and cannot be read.

    ``name`` is spelled as it was matched. ``identity`` is the same for two names of one file, and
    None for what has a ``fault``: what it is and what to do. ``denied``: a server refused access.
    """

    name: str
    url: str
    num_bytes: int = 0
    marks: Marks = field(default_factory=Marks)
    identity: Hashable = None
    fault: str = ""
    denied: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """What one pattern found, and the URL of the deepest folder above it that it names literally.

    The URL has no slash at its end.
    """

    folder: str
    found: list[Found]


def check_url(url: str) -> None:
    """Raise CorpusError, which shows no secret, if a path or URL has a refused form."""
    if fault := find_url_fault(url):
        raise CorpusError(f"corpus: {fault}")


def expand_braces(pattern: str, *, num_literal: int = 0) -> list[str]:
    """Expand the braces of a pattern, except in its first ``num_literal`` characters.

    Raises:
        CorpusError: unbalanced braces, or a refused form.
    """
    check_url(pattern)  # first, since the error below may show it
    literal = re.sub(r"([{}\\])", r"\\\1", pattern[:num_literal])
    try:
        urls = list(braceexpand(literal + pattern[num_literal:]))
    except ValueError as error:  # unbalanced braces
        raise CorpusError(
            f"corpus: expected braces in pairs in {pattern}: {error}; close the brace, or write "
            "\\{ and \\} where the name itself has it"
        ) from error
    for url in urls:
        check_url(url)
    return urls


def find_none(url: str) -> CorpusError:
    """Return the error of a pattern that matches nothing."""
    advice = "of a range with gaps, a glob (*.tar) takes what is there"
    return CorpusError(f"corpus: expected at least one tar at {url}, found none; {advice}")


def explain_folder(name: str) -> str:
    """Return the fault of a folder that stands in a tar's place."""
    inside = f"'{name.rstrip('/')}/*.tar'"
    return f"{name}: expected a tar, got a folder; name the tars in it, {inside}, in quotes"
