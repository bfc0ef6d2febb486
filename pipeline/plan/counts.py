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
        names = ("masks", "plain", "negatives", "views", "own_views", "ignores", "drawn")
        offered = {name: self._total([s.offered[name] for s in self._surveys]) for name in names}

        def keep_images(found: Estimate) -> Estimate:
            return _keep(found, kept=seen["stored"], offered=seen["samples"])

        masks = _keep(offered["masks"], kept=seen["masks"], offered=seen["offered_masks"])
        # A mask that is not seen takes along the view that is of it alone.
        own = offered["own_views"].value / max(offered["views"].value, 1.0)
        views = keep_images(offered["views"].scaled(1 - own))
        views += masks.scaled(1.0 if own else 0.0)
        share = views.value / max(offered["views"].value, 1.0)
        drawn = offered["drawn"].scaled(share)
        pairs = masks + keep_images(offered["plain"]) + drawn
        all_pairs = sum(offered[name].value for name in ("masks", "plain", "drawn"))
        prompts = self._count_prompts(kept=min(pairs.value / max(all_pairs, 1.0), 1.0))
        features = self._spec.features
        draws = NOTHING
        if features is not None:
            rows = pairs if features.condition == "phrase" else views
            draws = rows.scaled(features.num_draws)
        return {
            "tar_bytes": Estimate.exact(self._fetched),
            "samples": samples,
            "stored": keep_images(samples),
            "set_aside": self._total([s.num_set_aside for s in self._surveys]),
            "views": views,
            "pairs": pairs,
            "masks": masks,
            "trained": masks + keep_images(offered["negatives"]) + drawn,
            "ignores": offered["ignores"].scaled(share),
            "prompts": prompts,
            "new_prompts": NOTHING if spec.text == "none" else self._count_new(prompts),
            "draws": draws,
        }

    def _count_prompts(self, *, kept: float) -> Estimate:
        """Return the sum over tasks of each task's distinct stored prompts, with the empty one."""
        forms = len(self._spec.latents.prompts)
        empty = Estimate.exact(float(len(self._task_bytes)))
        counts = [
            [times + s.offered["drawn"] / len(s.phrases) for times in s.phrases.values()]
            for s in self._surveys
        ]
        if self._spec.latents.text == "none" or not any(counts):
            return empty
        power = float(
            np.mean([growth_exponent(c, num_forms=forms, kept=kept) for c in counts if c])
        )
        found = [count_distinct(c, num_forms=forms, kept=kept) for c in counts]
        return self._total(found, power=power) + empty

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


def _keep(offered_all: Estimate, *, kept: float, offered: float) -> Estimate:
    """Scale a total by the share of the sample that was stored; both passes had the same images.

    Where the sample had none, all are taken to be stored, and none to all are in the range.
    """
    num = round(offered / NUM_PASSES)
    low, high = share_range(
        min(round(kept / NUM_PASSES), num), num, num_units=max(offered_all.value, 1.0)
    )
    share = kept / offered if offered else 1.0
    return Estimate(offered_all.value * share, offered_all.low * low, offered_all.high * high)
