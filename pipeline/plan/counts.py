"""Images, pairs, prompts and rejects of a corpus, and the bytes of every array.

Samples and phrases are counted in the surveyed tars. What only decoding tells is the share of the
encoded sample. Totals follow from these by the bytes of the tars.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.corpus.tasks import Task
from pipeline.plan.estimate import (
    NOTHING,
    Estimate,
    count_distinct,
    estimate_total,
    growth_exponent,
    share_range,
)
from pipeline.plan.sample import TarSurvey, count_bytes
from pipeline.plan.timing import NUM_PASSES, EncodeTiming
from pipeline.spec.fields import Spec
from pipeline.store.prompt_cache import MAX_BYTES as PROMPT_CACHE_BYTES


@dataclass(frozen=True)
class CorpusCounts:
    """Expected totals of the whole corpus."""

    task_bytes: np.ndarray  # (tasks,), each task's share of its tar
    rows: dict[str, Estimate]  # by the names that a cost grows with: see timing.STAGE_ROWS
    rejects: dict[str, Estimate]  # by reason
    num_damaged: Estimate  # tasks
    files: dict[tuple[str, str], Estimate]  # (layer's folder, array or file) -> bytes

    @property
    def num_tasks(self) -> int:
        """Number of tasks: tars, and parts of long ones."""
        return len(self.task_bytes)


class CorpusCounter:
    """Extrapolates from the surveys of some tars and the encoded sample to the corpus."""

    def __init__(
        self,
        spec: Spec,
        tasks: Sequence[Task],
        surveys: Sequence[TarSurvey],
        timing: EncodeTiming,
        *,
        num_actors: int,
    ) -> None:
        self._spec, self._surveys, self._timing = spec, surveys, timing
        self._num_actors = num_actors
        self._task_bytes = np.array([count_bytes(task) for task in tasks])
        self._fetched = float(sum(task.num_bytes for task in tasks))  # each part fetches its tar

    def count(self) -> CorpusCounts:
        """Return the totals."""
        rows = self._count_rows()
        files = {}
        for key, line in self._timing.files.items():
            grown = rows.get(line.rows, NOTHING).scaled(line.a_row, relative=line.relative)
            files[key] = grown + Estimate.exact(line.a_task * len(self._task_bytes))
        rows["bytes"] = sum(files.values(), NOTHING)
        return CorpusCounts(
            task_bytes=self._task_bytes,
            rows=rows,
            rejects=self._count_rejects(rows["samples"]),
            num_damaged=self._total([float(bool(s.fault)) for s in self._surveys]),
            files=files,
        )

    def _total(self, found: Sequence[float], *, power: float = 1.0) -> Estimate:
        """Return the corpus' total of what each surveyed tar has; it grows as bytes**power."""
        return estimate_total(
            found,
            [count_bytes(survey.task) ** power for survey in self._surveys],
            weights=[survey.stands_for for survey in self._surveys],
            whole=float((self._task_bytes**power).sum()),
        )

    def _count_rows(self) -> dict[str, Estimate]:
        seen, spec = self._timing.rows, self._spec.latents
        samples = self._total([s.num_samples for s in self._surveys])
        phrases = self._total([s.phrases.total() for s in self._surveys])
        per_phrase = spec.views * (2 if spec.flip else 1)
        images = _keep(samples, kept=seen["stored"], offered=seen["samples"], times=1)
        pairs = _keep(phrases, kept=seen["pairs"], offered=seen["phrases"], times=per_phrase)
        if spec.crop == "phrase":
            views = pairs.scaled(seen["views"] / seen["pairs"])
        else:
            views = images.scaled(seen["views"] / seen["stored"])
        prompts = self._count_prompts(
            per_phrase, kept=min(seen["pairs"] / seen["phrases"] / per_phrase, 1.0)
        )
        features = self._spec.features
        draws = NOTHING
        if features is not None:
            rows = pairs if features.condition == "phrase" else views
            draws = rows.scaled(features.num_draws)
        return {
            "tar_bytes": Estimate.exact(self._fetched),
            "samples": samples,
            "stored": images,
            "views": views,
            "pairs": pairs,
            "prompts": prompts,
            "new_prompts": self._count_new(prompts),
            "draws": draws,
        }

    def _count_prompts(self, per_phrase: int, *, kept: float) -> Estimate:
        """Return the sum over tasks of each task's distinct prompts, with the empty one."""
        forms = len(self._spec.latents.prompts)
        counts = [
            [times * per_phrase for times in survey.phrases.values()] for survey in self._surveys
        ]
        power = float(
            np.mean([growth_exponent(c, num_forms=forms, kept=kept) for c in counts if c])
        )
        found = [count_distinct(c, num_forms=forms, kept=kept) for c in counts]
        return self._total(found, power=power) + Estimate.exact(float(len(self._task_bytes)))

    def _count_new(self, prompts: Estimate) -> Estimate:
        """Return the prompts that actors encode, without those kept from the tasks before.

        A prompt counts as kept if another surveyed tar has it too, as far as the prompt cache has
        room for all prompts of the surveyed tars.
        """
        forms = len(self._spec.latents.prompts)
        sets = [set(survey.phrases) for survey in self._surveys]
        met = sum(len(a & set().union(*(b for b in sets if b is not a))) for a in sets)
        vocabulary = len(set().union(*sets)) * forms
        folder = self._timing.latents.folder
        prompt_bytes = max(self._timing.files[folder, "text"].a_row, 1.0)
        fits = min(1.0, PROMPT_CACHE_BYTES / prompt_bytes / max(vocabulary, 1))
        share = fits * met / max(sum(len(a) for a in sets), 1)
        first = min(share * self._num_actors * vocabulary, share * prompts.value)
        return prompts.scaled(1 - share + first / prompts.value)

    def _count_rejects(self, samples: Estimate) -> dict[str, Estimate]:
        """Return reason to rejects: those of names and texts counted, those of images estimated."""
        found = {
            reason: self._total([survey.rejects[reason] for survey in self._surveys])
            for reason in sorted(set().union(*(survey.rejects for survey in self._surveys)))
        }
        num = self._timing.rows["samples"]
        for reason, times in self._timing.rejects.items():
            # Of so few rejects the relative error is 1 / sqrt of their number (Poisson).
            relative = 2 / (times / NUM_PASSES) ** 0.5
            more = samples.scaled(times / num, relative=relative)
            found[reason] = found.get(reason, NOTHING) + more
        return found


def _keep(offered_all: Estimate, *, kept: float, offered: float, times: int) -> Estimate:
    """Scale a total by the share of the sample that was stored; both passes had the same images."""
    num = round(offered * times / NUM_PASSES)
    low, high = share_range(
        min(round(kept / NUM_PASSES), num), num, num_units=max(offered_all.value * times, 1.0)
    )
    return Estimate(
        offered_all.value * kept / offered,
        offered_all.low * times * low,
        offered_all.high * times * high,
    )
