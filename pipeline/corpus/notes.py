"""Peculiarities of a corpus that are kept or converted by a rule, and what is said of each.

A commit record counts them by name (``Accounting.notes``): none is a reject, but each may change
what the data mean.
"""

from collections.abc import Mapping

from pipeline.base.progress_text import count_noun

# A name's noun, and what is said of so many.
_SAYINGS = {
    "cut_prompts": ("prompt", "cut at the text encoder's length: what follows was not read"),
    "turned_images": ("image", "turned as EXIF tells"),
    "repeated_phrases": ("pair", "whose phrase their sample has more than once"),
    "enlarged_views": ("view", "enlarged more than 4 times"),
    "profiled_images": ("image", "with a colour profile of its own"),
}


def describe_notes(notes: Mapping[str, int]) -> list[str]:
    """Return a line a note, as ``12 views enlarged more than 4 times``; none of those of 0."""
    lines = []
    for name, number in notes.items():
        noun, said = _SAYINGS.get(name, ("", name))
        if number:
            lines.append(f"{count_noun(number, noun) if noun else number} {said}")
    return lines
