"""The figures of PhraseCut's official evaluator: mean and cumulative IoU at the images' own size.

Data flow: the annotations and the index's column ``task_id`` -> each pair's task -> its truth,
drawn from the polygons by the official rule at the image's size -> a prediction, resized from the
view to the view's box; what is outside of the box is background -> sums at every threshold.

The official evaluator takes boolean masks and says nothing of a threshold: figures are given at 0.5
and at the threshold that is best for the mean IoU. A task without a prediction counts 0 in the mean
and is not in the cumulative IoU, as there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.heads.metrics import SegmentationMetrics
from models.heads.score_bins import num_thresholds
from pipeline.base.json_list import iterate_items, read_json_text
from pipeline.base.orientation import turn_upright
from pipeline.base.raster import draw_polygons
from pipeline.base.yaml import SpecError
from pipeline.spec.fields import LatentsSpec

TASK_ID = "task_id"
_BOX = ("box_left", "box_top", "box_right", "box_bottom")


@dataclass(frozen=True)
class Annotations:
    """The tasks of a ``refer_<split>.json``; each is parsed when its truth is drawn."""

    where: str
    text: str = field(repr=False)
    spans: Mapping[str, tuple[int, int]] = field(repr=False)  # by task id, places in ``text``

    @classmethod
    def read(cls, path: Path) -> "Annotations":
        """Read a file of tasks; SpecError where it is none, or lacks the polygons."""
        text = read_json_text(path)
        spans = {}
        for start, end, task in iterate_items(text, where=str(path)):
            if not isinstance(task, dict) or not {TASK_ID, "Polygons"} <= task.keys():
                raise SpecError(
                    f"{path}: expected tasks with task_id and Polygons, got {text[start:end]:.80}; "
                    "refer_input_<split>.json has none, refer_<split>.json has them"
                )
            spans[str(task[TASK_ID])] = (start, end)
        return cls(str(path), text, spans)

    def draw(self, task_id: str, size: tuple[int, int]) -> np.ndarray:
        """Return a task's truth (H, W) bool; SpecError where its polygons are none."""
        start, end = self.spans[task_id]
        try:
            instances = json.loads(self.text[start:end])["Polygons"]
            return draw_polygons([p for each in instances for p in each], size, "official")
        except (TypeError, ValueError) as error:
            raise SpecError(f"{self.where}: task {task_id}: {error}") from error


class NativeMasks:
    """The truth of a reader's pairs at their images' size, and their predictions there."""

    def __init__(
        self,
        annotations: Annotations,
        spec: LatentsSpec,
        read_columns: Callable[[Sequence[str]], pa.Table],
    ) -> None:
        """Join pairs and tasks; of several pairs of a task the first counts.

        ``read_columns`` reads columns of the index by name, with a row a pair.

        Raises:
            SpecError: the layer has no task ids, or several views of an image, or no pair is of
                a task.
        """
        _check_spec(spec)
        index = read_columns([*_BOX, "source_height", "source_width", "orientation", TASK_ID])
        self._annotations = annotations
        self._turned = spec.orientation == "apply"
        self._box_N4 = np.stack([index[name].to_numpy() for name in _BOX], axis=1)
        self._size_N2 = np.stack(
            [index["source_height"].to_numpy(), index["source_width"].to_numpy()], axis=1
        )
        self._turn_N = index["orientation"].fill_null(1).to_numpy()
        ids = index[TASK_ID].to_pylist()
        first: dict[str, int] = {}
        for number, task_id in enumerate(ids):
            first.setdefault(task_id, number)
        self._ids = {number: i for i, number in first.items() if i in annotations.spans}
        if not self._ids:
            raise SpecError(
                f"{annotations.where}: none of its {len(annotations.spans)} tasks is a pair's, "
                f"whose task_id are such as {sorted({i for i in ids if i})[:3]}; give the file of "
                "the split that is scored"
            )

    def draw(self, numbers: Sequence[int] | np.ndarray) -> list[Tensor | None]:
        """Return the upright truth (H, W) bool of each pair that counts, None of the others."""
        return [self._draw(int(number)) for number in numbers]

    def _draw(self, number: int) -> Tensor | None:
        task_id = self._ids.get(number)
        if task_id is None:
            return None
        turn = int(self._turn_N[number]) if self._turned else 1
        height, width = self._size_N2[number].tolist()
        stored = (width, height) if turn > 4 else (height, width)  # annotations know no EXIF
        return torch.from_numpy(turn_upright(self._annotations.draw(task_id, stored), turn))

    def add(
        self,
        metrics: SegmentationMetrics,
        numbers: Sequence[int] | np.ndarray,
        truths: Sequence[Tensor | None],
        probability_BHW: Tensor,
    ) -> None:
        """Add pairs' predictions, in their views, to the sums of ``metrics``."""
        for number, truth_HW, view_HW in zip(numbers, truths, probability_BHW, strict=True):
            if truth_HW is not None:
                whole_HW = place_view(view_HW, self._box_N4[number].tolist(), truth_HW.shape)
                metrics.add(whole_HW[None], truth_HW[None])


def place_view(view_HW: Tensor, box: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return a view's probabilities at its image's size (H, W), 0 outside of its box.

    Resized bilinearly, with antialiasing where it becomes smaller. ``box`` is left, top, right and
    bottom in pixels of the image, the last two outside.
    """
    left, top, right, bottom = box
    whole_HW = torch.zeros(tuple(size))
    whole_HW[top:bottom, left:right] = torch.nn.functional.interpolate(
        view_HW[None, None], (bottom - top, right - left), mode="bilinear", antialias=True
    )[0, 0].clamp(0, 1)
    return whole_HW


def list_official_figures(metrics: SegmentationMetrics, num_tasks: int) -> dict[str, float]:
    """Return the figures in [0, 1] at 0.5 and at the best threshold, and the numbers of tasks.

    ``metrics``: what ``NativeMasks.add`` added to, or sums of those.
    """
    exact = SegmentationMetrics(added_px=0)
    exact.merge(metrics)
    num_scored = int(exact.state()["num_pairs"])
    mean_K, cumulative_K = exact.list_ious()
    figures: dict[str, float] = {"num_tasks": num_tasks, "num_missing": num_tasks - num_scored}
    for name, k in (("", num_thresholds // 2), ("_best", int(mean_K.argmax()))):
        figures[f"mean_IoU{name}"] = float(mean_K[k]) * num_scored / num_tasks
        figures[f"cumulative_IoU{name}"] = float(cumulative_K[k])
        figures[f"threshold{name}"] = (k + 1) / (num_thresholds + 1)
    return figures


def format_official_rows(rows: Mapping[str, Mapping[str, float]], width: int) -> list[str]:
    """Return the lines of a table in percent, a row a predictor by name."""
    lines = [f"{'':{width}}  mean IoU  cumulative, at the images' own size, over the threshold"]
    for name, figures in rows.items():
        for which in ("", "_best"):
            lines.append(
                f"{name:{width}}  {100 * figures[f'mean_IoU{which}']:8.1f}  "
                f"{100 * figures[f'cumulative_IoU{which}']:10.1f}  "
                f"{figures[f'threshold{which}']:.2f}{', the best for the mean' if which else ''}"
            )
    counts = next(iter(rows.values()))
    return [
        *lines,
        f"{counts['num_tasks']} tasks, of which {counts['num_missing']} without a prediction: each "
        "counts 0 in the mean",
    ]


def _check_spec(spec: LatentsSpec) -> None:
    if TASK_ID not in spec.keep_json:
        raise SpecError(
            "--protocol phrasecut joins pairs and tasks by the column task_id; encode with "
            f"keep_json: [task_id] in the spec of latents, got {list(spec.keep_json)}"
        )
    if spec.crop == "phrase" or spec.flip:
        raise SpecError(
            "--protocol phrasecut needs one view an image, not cut by its truth; encode the test "
            f"split with crop: resize, got crop: {spec.crop}, flip: {spec.flip}"
        )
