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

import numpy as np

from pipeline.corpus.members import Limits, RejectedError, group_members
from pipeline.corpus.parts import select_part
from pipeline.corpus.source import open_source
from pipeline.corpus.tar import DamagedTarError, list_members
from pipeline.corpus.tasks import CorpusError, Task
from pipeline.decode.sample import open_reader, read_text

MAX_TARS = 16
MAX_READ_BYTES = 4 * 10**9
"""Of the sampled tars together, for a remote one is fetched whole. At least two are sampled."""

Sample = tuple[tuple[str, bytes], ...]
"""A sample's members: name and data of image, text and masks in order."""


@dataclass(frozen=True)
class TarSurvey:
    """What one task's part of a tar holds, by its member list and its texts."""

    task: Task
    num_samples: int = 0  # complete by their names, with a valid text
    phrases: Counter[str] = field(default_factory=Counter)  # of those samples
    rejects: Counter[str] = field(default_factory=Counter)  # by reason
    fault: str = ""  # why the tar cannot be read
    stands_for: int = 1  # number of tasks in its stratum


def count_bytes(task: Task) -> float:
    """Return a task's share of its tar's bytes; a tar's parts are of equal size."""
    return task.num_bytes / task.num_parts


def sample_corpus(
    tasks: Sequence[Task], *, num_samples: int, seed: int
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


def survey_tar(task: Task, *, num_samples: int, start: float) -> tuple[TarSurvey, list[Sample]]:
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
        groups, rejected = select_part(
            *group_members(members)[:2], part=task.part, num_parts=task.num_parts
        )
        rejects = Counter(str(reject.reason) for reject in rejected)
        phrases: Counter[str] = Counter()
        good = []
        read = open_reader(file)
        for group in groups:
            try:
                phrases.update(read_text(group, read, Limits()).phrases or [""])
                good.append(group)
            except RejectedError as error:
                rejects[str(error.reason)] += 1
        wanted = min(len(good), num_samples)
        picked = [good[int((i + start) * len(good) / wanted)] for i in range(wanted)]
        samples = [tuple((m.name, read(m)) for m in group.members) for group in picked]
    return TarSurvey(task, len(good), phrases, rejects), samples


def count_phrases(sample: Sample) -> int:
    """Return the number of phrases of a sample."""
    return len(json.loads(sample[1][1])["phrases"])


def write_tar(path: Path, samples: Sequence[Sample], *, phrases_end: str = "") -> None:
    """Write samples as a tar, each in a folder of its own, since keys of two tars may be equal.

    ``phrases_end`` is added to every phrase.
    """
    with tarfile.open(path, "w") as tar:
        for number, (image, (text_name, text), *masks) in enumerate(samples):
            phrases = [phrase + phrases_end for phrase in json.loads(text)["phrases"]]
            document = json.dumps({"phrases": phrases}).encode()
            for name, data in (image, (text_name, document), *masks):
                info = tarfile.TarInfo(f"{number}/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
