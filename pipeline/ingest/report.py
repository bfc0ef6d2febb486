"""What ``ldznet ingest`` tells: counts beside the published ones, samples as text, rejects."""

from collections.abc import Iterator, Mapping
from itertools import islice

from pipeline.base.progress_text import count_noun
from pipeline.ingest.sample import IngestError, Listing, Recipe
from pipeline.ingest.shards import RunTotals
from pipeline.ingest.writer import MISSING, encode_members

NUM_SHOWN = 3


def describe_listing(listing: Listing, limit: int | None) -> Iterator[str]:
    """Yield what the annotations hold, and some samples."""
    yield f"{listing.split}: {_join_counts(listing.listed, listing.published)}; nothing is written"
    yield from (f"note: {note}" for note in listing.notes)
    for recipe in islice(listing.recipes, min(NUM_SHOWN, limit or NUM_SHOWN)):
        yield from _describe_sample(recipe)


def describe_run(listing: Listing, done: RunTotals, out: str, limit: int | None) -> str:
    """Return the lines that end a run; ``done.num_kept`` tars were there before."""
    published = {} if limit else listing.published
    counts = {"images": done.images, "pairs": done.pairs, "negatives": done.negatives}
    others = {name: n for name, n in listing.listed.items() if name not in counts}
    lines = [f"{listing.split}: {_join_counts({**counts, **others}, published)}"]
    if done.without_phrase:
        lines.append(f"images without a phrase: {done.without_phrase:,}")
    for reason, number in sorted(done.rejects.items(), key=lambda item: -item[1]):
        lines.append(f"rejected: {reason} {number:,}, such as {done.examples[reason]}")
    lines += [f"note: {note}" for note in listing.notes]
    if done.num_kept:
        lines.append(
            f"kept as they were: {count_noun(done.num_kept, 'finished tar')}, of which no image "
            "was read again; what has changed since goes in once they are removed"
        )
    if done.images == 0:
        return "\n".join([*lines, "nothing was written: no image was left"])
    if done.rejects:
        lines.append(
            f"which ones: {out}/{listing.split}-*_rejects.jsonl; once they are mended, remove the "
            "tars from the first of them on, and give the command again"
        )
    return "\n".join([*lines, f"{done.num_bytes / 1e6:,.1f} MB in {out}/{listing.split}-*.tar"])


def find_unexpected(counted: Mapping[str, int], expected: Mapping[str, int | None]) -> list[str]:
    """Return a sentence for each count that is not the expected one, or is not known yet."""
    unknown = "a number that is known once the images are read"
    return [
        f"--expect-{name}: expected {number:,}, got "
        + (f"{counted[name]:,}" if name in counted else unknown)
        for name, number in expected.items()
        if number is not None and counted.get(name) != number
    ]


def _join_counts(counts: Mapping[str, int], published: Mapping[str, int]) -> str:
    told = {name: f" (published {number:,})" for name, number in published.items()}
    names = dict.fromkeys([*counts, *published])
    return ", ".join(f"{name} {counts.get(name, 0):,}{told.get(name, '')}" for name in names)


def _describe_sample(recipe: Recipe) -> Iterator[str]:
    try:
        members = encode_members(sample := recipe.build())
    except (IngestError, *MISSING) as error:
        yield f"{recipe.key}: rejected: {error}"
        return
    sizes = ", ".join(f".{name} {len(data):,} bytes" for name, data in members.files.items())
    yield f"{recipe.key}: {sizes or 'rejected'}"
    for phrase in sample.phrases:
        area = "" if phrase.mask is None else f", mask {phrase.mask.mean():.1%}"
        ids = "".join(f", {name} {value}" for name, value in phrase.ids.items())
        yield f"  {phrase.text!r}{area}{ids}"
    yield from (f"  not: {text!r}" for text in sample.negatives)
    for reject in members.rejects:
        yield f"  rejected: {reject.phrase or 'the image'}: {reject.reason}: {reject.detail}"
