"""A sample of a corpus: some tars, their texts, and some of their images.

Data flow: tasks -> strata by size, and a random task from each -> the member list and the texts of
all samples in those tars -> a few samples of each, evenly spaced from a random start -> small tars
of those, for the timing to encode. So samples, phrases and what is rejected for its names or texts
are counted in whole tars; only what images tell comes from the few samples.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.corpus.members import Limits, RejectedError, SampleMembers, group_members
from pipeline.corpus.parts import select_part
from pipeline.corpus.source import open_source
from pipeline.corpus.tar import DamagedTarError, list_members
from pipeline.corpus.tasks import CorpusError, Task
from pipeline.corpus.text import SampleText, fold_phrase
from pipeline.decode.sample import open_reader, read_text
from pipeline.spec.fields import LatentsSpec

MAX_TARS = 16
MAX_READ_BYTES = 4 * 10**9
"""Of the sampled tars together, for a remote one is fetched whole. At least two are sampled."""


class Sample(NamedTuple):
    """A sample: ``data`` are those of ``members.pictures``."""

    members: SampleMembers
    text: SampleText
    data: tuple[bytes, ...]


@dataclass(frozen=True)
class TarSurvey:
    """What one task's part of a tar holds, by its member list and its texts."""

    task: Task
    num_samples: int = 0  # complete by their names, with a valid text
    num_set_aside: int = 0
    offered: Counter[str] = field(default_factory=Counter)  # as ``count_offered``, and drawn
    phrases: Counter[str] = field(default_factory=Counter)  # of those samples, a count a pair
    rejects: Counter[str] = field(default_factory=Counter)  # by reason
    fault: str = ""  # why the tar cannot be read
    stands_for: int = 1  # number of tasks in its stratum


def count_bytes(task: Task) -> float:
    """Return a task's share of its tar's bytes; a tar's parts are of equal size."""
    return task.num_bytes / task.num_parts


def count_offered(text: SampleText, members: SampleMembers, spec: LatentsSpec) -> Counter[str]:
    """Return what the spec makes of a sample whose masks are all seen, without drawn negatives.

    masks: pairs with one; plain: pairs without, own negatives among them, which are counted again
    as negatives; own_views: views that are of one mask alone; ignores: views with ignore regions.
    """
    mirrored, num_masks = 1 + spec.flip, len(members.masks)
    num_own = 0 if num_masks else max(len(text.phrases), not text.negatives)
    num_crops = num_masks * spec.views if spec.crop == "phrase" and num_masks else 1
    return Counter(
        masks=mirrored * num_masks * spec.views,
        plain=mirrored * (num_own + len(text.negatives)),
        negatives=mirrored * len(text.negatives),
        views=mirrored * num_crops,
        own_views=mirrored * num_crops * (spec.crop == "phrase" and num_masks > 0),
        ignores=mirrored * num_crops * (members.ignore is not None),
    )


def sample_corpus(
    tasks: Sequence[Task], spec: LatentsSpec, *, num_samples: int, seed: int
) -> tuple[list[TarSurvey], list[Sample]]:
    """Return the surveys of some tars, and ``num_samples`` of their samples.

    Raises:
        CorpusError: no sampled tar holds a sample that can be encoded.
        OSError: a tar cannot be read.
    """
    rng = np.random.default_rng(seed)
    chosen = choose_tasks(tasks, rng)
    share = -(-num_samples // len(chosen))
    surveys, samples = [], []
    for task, stands_for in chosen:
        survey, members = survey_tar(task, spec, num_samples=share, start=float(rng.random()))
        surveys.append(replace(survey, stands_for=stands_for))
        samples += members
    if not samples:
        faults = "; ".join(s.fault or f"{s.task.url}: {dict(s.rejects)}" for s in surveys[:3])
        raise CorpusError(
            f"corpus: none of the {len(chosen)} tars looked into holds a sample that could be "
            f"encoded: {faults}; see the README for what a tar holds"
        )
    order = rng.permutation(len(samples))[:num_samples]
    return surveys, [samples[i] for i in sorted(order)]


def choose_tasks(tasks: Sequence[Task], rng: np.random.Generator) -> list[tuple[Task, int]]:
    """Return a random task from each stratum of size, and the number of tasks in the stratum.

    There are ``MAX_TARS`` strata, or as many as ``MAX_READ_BYTES`` allows.
    """
    ordered = sorted(tasks, key=lambda task: (count_bytes(task), task.id))
    mean = max(sum(task.num_bytes for task in tasks) / len(tasks), 1)
    num = min(len(tasks), max(2, min(MAX_TARS, int(MAX_READ_BYTES / mean))))
    strata = np.array_split(np.arange(len(ordered)), num)
    return [(ordered[int(rng.choice(stratum))], len(stratum)) for stratum in strata]


def survey_tar(
    task: Task, spec: LatentsSpec, *, num_samples: int, start: float
) -> tuple[TarSurvey, list[Sample]]:
    """Count what a tar holds, and read ``num_samples`` samples at even distances.

    ``start`` in [0, 1) is where the first one lies, as a share of the distance. A damaged tar gives
    a survey with a fault, and no sample.
    """
    if task.fault:
        return TarSurvey(task, fault=task.fault), []
    with open_source(task) as (file, _):
        try:
            members = list_members(file, num_bytes=task.num_bytes)
        except DamagedTarError as error:
            return TarSurvey(task, fault=f"{task.url}: {error}"), []
        found, rejected, set_aside = group_members(members)
        groups, rejected = select_part(found, rejected, part=task.part, num_parts=task.num_parts)
        rejects = Counter(str(reject.reason) for reject in rejected)
        good: list[tuple[SampleMembers, SampleText]] = []
        read = open_reader(file)
        for group in groups:
            try:
                good.append((group, read_text(group, read, Limits(), keep_json=spec.keep_json)))
            except RejectedError as error:
                rejects[str(error.reason)] += 1
        wanted = min(len(good), num_samples)
        picked = [good[int((i + start) * len(good) / wanted)] for i in range(wanted)]
        samples = [Sample(*pair, tuple(map(read, pair[0].pictures))) for pair in picked]
    num_set_aside = sum(text.num_set_aside for _, text in good)
    num_set_aside += len(set_aside) if task.part == 0 else 0
    offered, phrases = _add_offered(good, spec)
    return TarSurvey(task, len(good), num_set_aside, offered, phrases, rejects), samples


def _add_offered(
    good: Sequence[tuple[SampleMembers, SampleText]], spec: LatentsSpec
) -> tuple[Counter[str], Counter[str]]:
    """Add up what the spec makes of samples, with drawn negatives; also each phrase's pairs."""
    offered, phrases = Counter[str](), Counter[str]()
    pool = {fold_phrase(phrase) for _, text in good for phrase in text.phrases}
    for group, text in good:
        found = count_offered(text, group, spec)
        offered += found
        times = (1 + spec.flip) * (spec.views if group.masks else 1)
        phrases.update({phrase: times * num for phrase, num in Counter(text.phrases).items()})
        phrases.update(dict.fromkeys(text.negatives, 1 + spec.flip))
        num_others = len(pool) - len({*map(fold_phrase, text.phrases)})
        num_drawn = min(spec.negatives, num_others) if text.phrases else 0
        offered["drawn"] += found["views"] * num_drawn
    return offered, phrases


def write_tar(path: Path, samples: Sequence[Sample], *, phrases_end: str = "") -> None:
    """Write samples as a tar, each in a folder of its own, since keys of two tars may be equal.

    ``phrases_end`` ends every phrase. Captions are written as phrases, which makes the same pairs,
    and of the other text what the spec keeps.
    """
    with tarfile.open(path, "w") as tar:
        for number, (members, text, data) in enumerate(samples):
            files = list(zip((m.name for m in members.pictures), data, strict=True))
            if document := _describe_text(text, phrases_end):
                files.insert(1, (f"{members.key}.json", json.dumps(document).encode()))
            for name, content in files:
                info = tarfile.TarInfo(f"{number}/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _describe_text(text: SampleText, end: str) -> dict[str, object]:
    """Return the JSON that makes the same pairs, with phrases that have an ending."""
    most = Limits().max_phrase_chars - len(end)
    document: dict[str, object] = {**text.kept}
    if text.phrases or text.negatives:
        for name, phrases in (("phrases", text.phrases), ("negatives", text.negatives)):
            document[name] = [phrase[:most] + end for phrase in phrases]
    else:
        document.pop("caption", None)  # it was none
    return document
