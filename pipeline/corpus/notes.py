"""Peculiarities of a corpus that are kept or converted by a rule, and what is said of each.

A commit record counts them by name (``Accounting.notes``): none is a reject, but each may change
what the data mean. ``index.parquet`` has a column for each, by which to find them.
"""

from collections.abc import Mapping

from pipeline.base.progress_text import count_noun

# A name's noun, and what is said of so many.
_SAYINGS = {
    "cut_prompts": (
        "pair",
        "with a prompt that the tokenizer cut at its length (77 tokens in CLIP): what follows was "
        "not read (column prompt_cut)",
    ),
    "repeated_phrases": (
        "pair",
        "with a phrase that their sample has more than once, each with a mask of its own (column "
        "instance)",
    ),
    "enlarged_views": ("view", "enlarged more than 4 times (column scale)"),
    "turned_images": (
        "image",
        "turned upright by EXIF, where masks of the unturned pixels would lie elsewhere; for "
        "those: orientation: ignore (column orientation)",
    ),
    "profiled_images": (
        "image",
        "with a colour profile other than sRGB, which color: raw stores as it is and color: srgb "
        "converts (column color_profile)",
    ),
    "half_value_masks": (
        "mask",
        "with other values than 0 and 1, or 0 and the largest: half of the range and more was "
        "taken as foreground (column mask_area)",
    ),
    "unread_json": (
        "sample",
        "with a JSON beside its caption that cannot be read, and was set aside (column phrase)",
    ),
    "cut_captions": ("caption", "cut at 1,000 characters (column phrase)"),
    "recoded_captions": (
        "caption",
        "with bytes that are no UTF-8, which became U+FFFD (column phrase)",
    ),
    "unusable_profiles": (
        "image",
        "with a colour profile that is damaged or not of its kind of pixels, stored as if without "
        "(column color_profile: unusable)",
    ),
}


def describe_notes(notes: Mapping[str, int]) -> list[str]:
    """Return a line a note, as ``12 views enlarged more than 4 times``; none of those of 0."""
    lines = []
    for name, number in notes.items():
        noun, said = _SAYINGS.get(name, ("", name))
        if number:
            lines.append(f"{count_noun(number, noun) if noun else number} {said}")
    return lines
