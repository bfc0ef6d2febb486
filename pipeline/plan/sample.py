"""A corpus' sample: a few tars whole by their framing and texts, and some of their images.

Data flow: tasks -> some of them, a random one from each stratum of size -> framing and texts of all
their samples, which are cheap -> a few samples of each, evenly spaced from a random start -> small
tars of those, for the timing to encode. What framing and texts tell (samples, phrases, prompts,
what is rejected for its names or text) is counted, not guessed.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.corpus.members import Limits, RejectReason, SampleMembers, group_members
from pipeline.corpus.parts import select_part
from pipeline.corpus.phrases import BadTextError, parse_phrases
from pipeline.corpus.source import open_source
from pipeline.corpus.tar import DamagedTarError, list_members
from pipeline.corpus.tasks import CorpusError, Task

MAX_TARS = 16
MAX_READ_BYTES = 4 * 10**9
"""Of the tars looked into: a remote one costs its whole fetch. Two are, whatever their size."""
_LIMITS = Limits()

Sample = tuple[tuple[str, bytes], ...]
"""A sample's members: name and data of image, text and masks in order."""


@dataclass(frozen=True)
class TarSurvey:
    """What one tar holds, by its framing and its texts; ``fault`` is why it fails, or ""."""

    task: Task
    num_samples: int = 0  # whole by their names and with a readable text
    phrases: Counter[str] = field(default_factory=Counter)  # of those
    rejects: Counter[str] = field(default_factory=Counter)  # by reason
    fault: str = ""
    stands_for: int = 1  # tasks of its stratum, itself one of them

    @property
    def num_bytes(self) -> float:
        """The task's share of its tar's bytes."""
        return count_bytes(self.task)

    @property
    def num_phrases(self) -> int:
        """Phrases, repeated ones too."""
        return self.phrases.total()


@dataclass(frozen=True)
class CorpusSample:
    """What was looked into: the tars' surveys, and the members of the samples chosen."""

    surveys: tuple[TarSurvey, ...]
    samples: tuple[Sample, ...]

    @property
    def num_read_bytes(self) -> int:
        """Bytes of the tars looked into."""
        return sum(survey.task.num_bytes for survey in self.surveys)


def count_bytes(task: Task) -> float:
    """Return a task's share of its tar's bytes; parts are cut to equal ones."""
    return task.num_bytes / task.num_parts


def sample_corpus(tasks: Sequence[Task], *, num_samples: int, seed: int) -> CorpusSample:
    """Survey some tars and choose ``num_samples`` of their samples.

    Raises:
        CorpusError: no tar looked into holds a sample that can be encoded.
        OSError: a tar cannot be read.
    """
    rng = np.random.default_rng(seed)
    chosen = choose_tasks(tasks, rng)
    share = -(-num_samples // len(chosen))
    surveys, samples = [], []
    for task, stands_for in chosen:
        survey, members = survey_tar(task, num_samples=share, start=float(rng.random()))
        surveys.append(replace(survey, stands_for=stands_for))
        samples += members
    if not samples:
        faults = "; ".join(s.fault or f"{s.task.url}: {dict(s.rejects)}" for s in surveys[:3])
        raise CorpusError(
            f"corpus: none of the {len(chosen)} tars looked into holds a sample that could be "
            f"encoded: {faults}; see the README for what a tar holds"
        )
    order = rng.permutation(len(samples))[:num_samples]
    return CorpusSample(tuple(surveys), tuple(samples[i] for i in sorted(order)))


def choose_tasks(tasks: Sequence[Task], rng: np.random.Generator) -> list[tuple[Task, int]]:
    """Return a task of each stratum of size and how many are in it.

    There are ``MAX_TARS`` strata, or as many as ``MAX_READ_BYTES`` lets.
    """
    ordered = sorted(tasks, key=lambda task: (count_bytes(task), task.id))
    mean = max(sum(task.num_bytes for task in tasks) / len(tasks), 1)
    num = min(len(tasks), max(2, min(MAX_TARS, int(MAX_READ_BYTES / mean))))
    strata = np.array_split(np.arange(len(ordered)), num)
    return [(ordered[int(rng.choice(stratum))], len(stratum)) for stratum in strata]


def survey_tar(task: Task, *, num_samples: int, start: float) -> tuple[TarSurvey, list[Sample]]:
    """Count what a tar holds, and read ``num_samples`` samples, evenly spaced from ``start``.

    ``start`` is in [0, 1), of one spacing. A damaged tar is a survey with its fault, and no sample.
    """
    with open_source(task) as (file, _):
        try:
            members = list_members(file, num_bytes=task.num_bytes)
        except DamagedTarError as error:
            return TarSurvey(task, fault=f"{task.url}: {error}"), []
        groups, rejected = select_part(
            *group_members(members), part=task.part, num_parts=task.num_parts
        )
        rejects = Counter(str(reject.reason) for reject in rejected)
        phrases: Counter[str] = Counter()
        good = []
        for group in groups:
            found = _read_phrases(file, group)
            if isinstance(found, RejectReason):
                rejects[str(found)] += 1
            else:
                phrases.update(found)
                good.append(group)
        picked = [good[i] for i in _space_evenly(len(good), num_samples, start)]
        samples = [_read_members(file, group) for group in picked]
    return TarSurvey(task, len(good), phrases, rejects), samples


def _space_evenly(num: int, wanted: int, start: float) -> list[int]:
    wanted = min(num, wanted)
    return [int((i + start) * num / wanted) for i in range(wanted)]


def _read_phrases(file: BinaryIO, group: SampleMembers) -> tuple[str, ...] | RejectReason:
    """A sample's phrases, or why it is rejected before its image is looked at."""
    sizes = (group.image.size, group.text.size, *(mask.size for mask in group.masks))
    if max(sizes) > _LIMITS.max_member_bytes:
        return RejectReason.MEMBER_TOO_LARGE
    if group.text.size > _LIMITS.max_text_bytes:
        return RejectReason.BAD_TEXT
    file.seek(group.text.offset)
    try:
        phrases = parse_phrases(
            file.read(group.text.size),
            max_phrases=_LIMITS.max_phrases,
            max_phrase_chars=_LIMITS.max_phrase_chars,
        )
    except BadTextError:
        return RejectReason.BAD_TEXT
    if len(group.masks) == len(phrases):
        return phrases
    few = len(group.masks) < len(phrases)
    return RejectReason.MISSING_MASK if few else RejectReason.BAD_MASK


def _read_members(file: BinaryIO, group: SampleMembers) -> Sample:
    found = []
    for member in (group.image, group.text, *group.masks):
        file.seek(member.offset)
        found.append((member.name, file.read(member.size)))
    return tuple(found)


def count_phrases(sample: Sample) -> int:
    """Return how many phrases a sample has."""
    return len(json.loads(sample[1][1])["phrases"])


def write_tar(path: Path, samples: Sequence[Sample], *, phrases_end: str = "") -> None:
    """Write samples as a tar, each under a folder of its own: keys of two tars may be equal.

    ``phrases_end`` is put after every phrase.
    """
    with tarfile.open(path, "w") as tar:
        for number, (image, (text_name, text), *masks) in enumerate(samples):
            phrases = [phrase + phrases_end for phrase in json.loads(text)["phrases"]]
            document = json.dumps({"phrases": phrases}).encode()
            for name, data in (image, (text_name, document), *masks):
                info = tarfile.TarInfo(f"{number}/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
