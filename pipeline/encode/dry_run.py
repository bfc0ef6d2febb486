"""What encode would make of a corpus: the first tar of each pattern, and some of its samples.

All members are judged by their names, and ``NUM_DECODED`` samples, evenly spaced, are decoded as
encode decodes them. It needs no store, no weights and no Ray. Nothing is written but the copy of a
remote tar, which has no name and is gone at the end.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple

from models.ldm.family import read_configs
from models.ldm.files import ModelFilesError, resolve_model
from pipeline.base.progress_text import count_noun, format_scaled, make_printable
from pipeline.corpus.members import Reject, RejectReason, SampleMembers, TarContents, group_members
from pipeline.corpus.notes import describe_notes
from pipeline.corpus.source import open_source
from pipeline.corpus.tar import DamagedTarError, Member, list_members
from pipeline.corpus.tasks import Task, list_tasks
from pipeline.corpus.text import SampleText, list_keys
from pipeline.decode.images import sniff_format
from pipeline.decode.pairs import count_notes, index_rows
from pipeline.decode.pool import DecodedSample, SampleDecoder
from pipeline.decode.sample import open_reader
from pipeline.decode.views import SourceImage
from pipeline.spec.fields import LatentsSpec, Spec
from pipeline.stage.work import QUEUE_BYTES
from pipeline.store.layout import INDEX_SCHEMA

NUM_DECODED = 64  # of 640x480 with five masks they take a second
NUM_SHOWN = 3
_MAX_WORKERS = 4
_MAX_CHARS, _MAX_NAMED = 100, 3  # of a text or name, and names of a kind, that are shown
_MAX_KEYS = 30
_BYTES = (" B", " kB", " MB", " GB", " TB", " PB")
_WITHOUT_SPEC = LatentsSpec(model="", crop="resize")
_OF_THE_VIEW = (RejectReason.OUTSIDE_VIEW, RejectReason.TOO_THIN)  # without a spec there is none


class StoredSample(NamedTuple):
    """A sample that would be stored; ``keys`` are those of its JSON."""

    members: SampleMembers
    text: SampleText
    source: SourceImage
    image_format: str
    keys: list[str]


@dataclass
class TarLook:
    """What one tar holds by its names, and what became of the samples that were decoded."""

    contents: TarContents
    num_decoded: int = 0
    stored: list[StoredSample] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the index, of all their pairs
    rejects: list[Reject] = field(default_factory=list)  # of the samples that were decoded
    notes: Counter[str] = field(default_factory=Counter)
    fault: str = ""  # why prompts that are cut are not counted

    @property
    def keys(self) -> list[str]:
        """Keys of the JSON of all of them, each once."""
        return list(dict.fromkeys(key for sample in self.stored for key in sample.keys))


def dry_run(patterns: Sequence[str], spec: Spec | None, *, say: Callable[[str], None]) -> bool:
    """Say for the first tar of each pattern what would be stored; return whether anything would.

    Without a ``spec`` nothing is said of views and pairs, and all that has pixels counts as stored.

    Raises:
        CorpusError: a pattern matches nothing, or nothing that can be read.
        OSError: a tar cannot be listed or read.
    """
    is_any = False
    for pattern in patterns:
        tasks = list_tasks([pattern])
        faults = [task.fault for task in tasks if task.fault]
        task = next(task for task in tasks if not task.fault)
        whole = format_scaled(sum(task.num_bytes for task in tasks), _BYTES)
        say(f"{make_printable(pattern)}: {count_noun(len(tasks), 'tar')}, {whole}")
        for fault in faults[:_MAX_NAMED]:
            say(f"  cannot be read ({len(faults)}): {fault}")
        say(f"  the first is {task.url}, {format_scaled(task.num_bytes, _BYTES)}")
        try:
            look = look_into(task, spec.latents if spec else _WITHOUT_SPEC)
        except DamagedTarError as error:
            say(f"  its task would fail: {error}")
            continue
        if spec is None:
            look.rejects = [x for x in look.rejects if x.reason not in _OF_THE_VIEW]
            look.notes.pop("enlarged_views", None)
        for line in [*_describe(look, spec), *_describe_samples(look, spec)]:
            say(f"  {line}")
        is_any = is_any or bool(look.stored)
    return is_any


def look_into(task: Task, spec: LatentsSpec) -> TarLook:
    """Group a tar's members, and decode some of its samples; raises as ``open_source``."""
    with open_source(task) as (file, _):
        look = TarLook(group_members(list_members(file, num_bytes=task.num_bytes)))
        num = len(look.contents.samples)
        step = max(1.0, num / NUM_DECODED)
        chosen = [look.contents.samples[int(i * step)] for i in range(min(num, NUM_DECODED))]
        with (
            SampleDecoder(num_workers=min(_MAX_WORKERS, os.cpu_count() or 1)) as decoder,
            closing(decoder.decode_views(file, chosen, spec, max_bytes=QUEUE_BYTES)) as samples,
        ):
            views = count()
            for members, found in zip(chosen, samples, strict=True):
                look.num_decoded += 1
                look.rejects += found.rejects
                for view in found.views:  # whose pixels are not kept
                    number, keep = next(views), spec.keep_json
                    look.rows += index_rows(
                        view, latent_row=number, mask_row=0, text_rows={}, keep_json=keep
                    )
                if found.views:
                    look.notes += found.notes
                    look.stored.append(_read_stored(members, found, open_reader(file)))
    try:
        cut = _find_cut_prompts(spec, {row["prompt"] for row in look.rows})
    except ModelFilesError as error:
        cut, look.fault = set(), str(error)
    for row in look.rows:
        row["prompt_cut"] = row["prompt"] in cut
    look.notes.update(count_notes(look.rows, spec))
    return look


def _read_stored(
    members: SampleMembers, found: DecodedSample, read: Callable[[Member], bytes]
) -> StoredSample:
    head = read(replace(members.image, size=min(members.image.size, 16)))
    keys = [] if members.text is None else list_keys(read(members.text))
    source = found.views[0].source
    return StoredSample(members, found.text, source, sniff_format(head) or "", keys)


def _find_cut_prompts(spec: LatentsSpec, prompts: set[str]) -> set[str]:
    """Return the prompts that the tokenizer cuts; ModelFilesError where it is not here."""
    if "://" in spec.model or not spec.model:
        raise ModelFilesError(f"model: {spec.model} is not fetched for it")
    folder = resolve_model(spec.model, revision=spec.revision, local=True)
    # It takes seconds to import, and is of no use without a model.
    from models.ldm.text_encoder import find_cut, load_tokenizers

    tokenizers = load_tokenizers(folder)
    lengths = [int(tokenizer.model_max_length) for tokenizer in tokenizers]
    name = "max_position_embeddings"
    lengths += [int(config[name]) for config in read_configs(folder).values() if name in config]
    return find_cut(sorted(prompts), tokenizers, min(lengths))


def _describe(look: TarLook, spec: Spec | None) -> list[str]:
    """Return lines on the whole tar."""
    contents, stored = look.contents, look.stored
    num = len(contents.samples)
    of = f"of {look.num_decoded} decoded"
    lines = [
        f"samples    {num:,} by their names; {look.num_decoded:,} of them decoded, evenly spaced, "
        f"and {num - look.num_decoded:,} only named"
    ]
    parts = {
        "with phrases": sum(bool(x.text.phrases) for x in stored),
        "without text": sum(not x.text.phrases and not x.text.negatives for x in stored),
        "with masks": sum(bool(x.members.masks) for x in stored),
        "with negatives of their own": sum(bool(x.text.negatives) for x in stored),
        "with an ignore region": sum(x.members.ignore is not None for x in stored),
    }
    found = ", ".join(f"{n} {what}" for what, n in parts.items() if n)
    said = f"{len(stored)} {of} would be stored: {found}" if stored else "nothing would be"
    lines.append(f"stored     {said}")
    lines += [f"set aside  {x}" for x in _describe_set_aside(look, of)]
    for rejects, where in ((contents.rejects, ""), (look.rejects, f" {of}")):
        lines += [f"rejected   {line}" for line in _describe_rejects(rejects, where)]
    lines += [f"note       {note}" for note in describe_notes(look.notes)]
    taken = {"phrases", "negatives", *INDEX_SCHEMA.names}
    if names := [_show(key) for key in look.keys if key not in taken]:
        more = ", …" if len(names) > _MAX_KEYS else ""
        lines.append(f"json keys  {', '.join(names[:_MAX_KEYS])}{more} (for latents.keep_json)")
    return lines + (_describe_rows(look, spec) if spec is not None and stored else [])


def _describe_rows(look: TarLook, spec: Spec) -> list[str]:
    """Return what the spec makes of the samples that would be stored."""
    rows, latents = look.rows, spec.latents
    num_views = len({row["latent_row"] for row in rows})
    num_masks = sum(row["mask_row"] is not None for row in rows)
    num_negatives = sum(row["negative"] for row in rows)
    line = f"{count_noun(num_views, 'view')}, {count_noun(len(rows), 'pair')}"
    line += f": {num_masks} with a mask"
    line += f", {count_noun(num_negatives, 'negative')} of their own" if num_negatives else ""
    if latents.negatives:
        line += f"; and up to {latents.negatives} negatives a view, drawn from the tar's phrases"
    lines = [f"spec       {line}"]
    if latents.text == "none":
        lines.append("           prompts without their embeddings (text: none)")
    if look.fault:
        lines.append(f"           prompts that the tokenizer cuts are not counted: {look.fault}")
    for name in latents.keep_json:
        if name not in look.keys:
            lines.append(f"           keep_json: no decoded sample has {name!r}")
    return lines


def _describe_set_aside(look: TarLook, of: str) -> list[str]:
    named: dict[str, list[str]] = defaultdict(list)
    for member in look.contents.set_aside:
        named[_name_kind(member.name)].append(member.name)
    for sample in look.stored:
        for extension in sample.text.set_aside:
            kind = f"*.{extension} {of}, of which no phrase is read"
            named[kind].append(f"{sample.members.key}.{extension}")
    return [
        f"{len(names):,} {kind}: {', '.join(map(_show, names[:_MAX_NAMED]))}"
        + ", …" * (len(names) > _MAX_NAMED)
        for kind, names in named.items()
    ]


def _name_kind(name: str) -> str:
    folder, _, last = name.rpartition("/")
    if "__MACOSX" in folder.split("/"):
        return "in __MACOSX"
    return "._*" if last.startswith("._") else f"*.{last.rpartition('.')[2]}"


def _describe_rejects(rejects: Iterable[Reject], where: str) -> list[str]:
    groups: dict[tuple[str, str], list[Reject]] = defaultdict(list)
    for reject in rejects:
        groups[reject.reason, reject.level].append(reject)
    return [
        f"{count_noun(len(found), level)}{where}: {reason}; the first: {_show(found[0].name)}: "
        f"{_show(found[0].detail, 3 * _MAX_CHARS)}"
        for (reason, level), found in groups.items()
    ]


def _describe_samples(look: TarLook, spec: Spec | None) -> list[str]:
    """Return some lines a sample, of the first ones."""
    lines = []
    keep = spec.latents.keep_json if spec is not None else ()
    for members, text, source, image_format, keys in look.stored[:NUM_SHOWN]:
        facts = [f"{image_format} {source.width}x{source.height}"]
        facts += [count_noun(len(members.masks), "mask")] if members.masks else []
        facts += ["ignore region"] if members.ignore is not None else []
        lines.append(f"sample {_show(members.key)}: {', '.join(facts)}")
        what = "phrases  " if "phrases" in keys else "caption  "
        lines.append(f"  {what} {_quote(text.phrases)}" if text.phrases else "  no text")
        lines += [f"  negatives {_quote(text.negatives)}"] if text.negatives else []
        lines += [f"  kept      {name}: {_show(_join(text.kept[name]))}" for name in keep]
    return lines


def _join(kept: str | tuple[str | None, ...] | None) -> str:
    """Return a kept value as text: of a list the values, as they will stand in the index."""
    values = kept if isinstance(kept, tuple) else (kept,)
    return ", ".join("null" if value is None else value for value in values)


def _quote(phrases: Sequence[str]) -> str:
    shown = ", ".join(f'"{_show(phrase)}"' for phrase in phrases[:10])
    return f"{shown}, and {len(phrases) - 10} more" if len(phrases) > 10 else shown


def _show(text: str, num: int = _MAX_CHARS) -> str:
    return make_printable(text if len(text) <= num else f"{text[: num - 1]}…")
