"""PhraseCut's official figures: those of its own evaluator on the same predictions."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from models.heads.metrics import SegmentationMetrics
from pipeline.base.yaml import SpecError
from pipeline.evaluate.phrasecut import (
    Annotations,
    NativeMasks,
    format_official_rows,
    list_official_figures,
    place_view,
)
from pipeline.spec.fields import LatentsSpec
from tests.golden.make_phrasecut_official import LEFT_OUT, list_tasks, make_index, predict_views

# tests/golden/make_phrasecut_official.py: threshold → mean IoU over all 12 tasks, of which 11 have
# a prediction, and cumulative IoU over those.
OFFICIAL = {0.3: (0.6277671328, 0.6628111997), 0.5: (0.6318389180, 0.6884338453)}
SPEC = LatentsSpec(model="m", crop="resize", keep_json=("task_id",))


@pytest.fixture
def annotations(tmp_path):
    (tmp_path / "refer_test.json").write_text(json.dumps(list_tasks()))
    return Annotations.read(tmp_path / "refer_test.json")


def score(native, num):
    truths = native.draw(range(num))
    views = predict_views([np.zeros((9, 9)) if t is None else t.numpy() for t in truths])
    metrics = SegmentationMetrics(added_px=0)
    native.add(metrics, range(num), truths, views)
    return metrics


@pytest.mark.parametrize("threshold", OFFICIAL)
def test_figures_are_those_of_the_official_evaluator(annotations, threshold):
    index = make_index()
    metrics = score(NativeMasks(annotations, SPEC, index.select), len(index))
    mean_K, cumulative_K = metrics.list_ious()
    k = round(threshold * 50) - 1
    found = mean_K[k] * len(index) / len(annotations.spans), cumulative_K[k]
    assert found == pytest.approx(OFFICIAL[threshold], abs=2e-5)


def test_figures_are_given_at_a_half_and_at_the_best_threshold(annotations):
    index = make_index()
    metrics = score(NativeMasks(annotations, SPEC, index.select), len(index))
    figures = list_official_figures(metrics, len(annotations.spans))
    assert (figures["num_tasks"], figures["num_missing"]) == (12, len(LEFT_OUT))
    assert figures["threshold"] == 0.5
    assert (figures["mean_IoU"], figures["cumulative_IoU"]) == pytest.approx(OFFICIAL[0.5], 1e-4)
    mean_K, cumulative_K = metrics.list_ious()
    best = round(figures["threshold_best"] * 50) - 1
    assert figures["mean_IoU_best"] == mean_K.max() * 11 / 12 > figures["mean_IoU"]
    assert figures["cumulative_IoU_best"] == cumulative_K[best]
    lines = format_official_rows({"head": figures}, 4)
    assert lines[1] == "head      63.2        68.8  0.50"
    assert lines[-1].startswith("12 tasks, of which 1 without a prediction")


def test_of_several_pairs_of_a_task_the_first_counts_and_other_pairs_do_not(annotations):
    index = make_index()
    other = index.slice(0, 1).set_column(0, "task_id", pa.array([None], pa.string()))
    grown = pa.concat_tables([index, index.slice(0, 2), other])
    native = NativeMasks(annotations, SPEC, grown.select)
    assert [truth is None for truth in native.draw(range(14))] == [False] * 11 + [True] * 3
    assert int(score(native, 14).state()["num_pairs"]) == 11


def test_a_layer_that_ignores_exif_has_the_truth_of_the_stored_pixels(annotations):
    index = make_index()
    turned = index.column("task_id").to_pylist().index("4__0")
    upright = NativeMasks(annotations, SPEC, index.select).draw([turned])[0]
    columns = {"source_width": 80, "source_height": 50}  # as the decoder tells it then
    stored = index.to_pylist()[turned] | columns
    spec = SPEC.model_copy(update={"orientation": "ignore"})
    (truth,) = NativeMasks(annotations, spec, pa.Table.from_pylist([stored]).select).draw([0])
    assert truth.shape == (50, 80)
    assert torch.equal(torch.rot90(truth, -1), upright)  # EXIF's 6: a quarter clockwise


@pytest.mark.parametrize("size", [(24, 30), (100, 150)])
def test_a_view_lies_in_its_box_and_the_rest_is_background(size):
    view = torch.rand(48, 48, generator=torch.Generator().manual_seed(0))
    height, width = size
    whole = place_view(view, (3, 2, width - 5, height), size)
    inside = whole[2:, 3 : width - 5]
    assert whole.shape == size
    assert whole.count_nonzero() == inside.numel()
    image = Image.fromarray(view.numpy()).resize((width - 8, height - 2), Image.Resampling.BILINEAR)
    assert np.allclose(inside.numpy(), np.asarray(image), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"keep_json": ()}, r"keep_json: \[task_id\]"),
        ({"crop": "phrase"}, "crop: resize"),
        ({"flip": True}, "flip: True"),
    ],
)
def test_layers_that_have_no_prediction_a_task_are_refused(annotations, changes, named):
    spec = LatentsSpec(**{**SPEC.model_dump(), **changes})
    with pytest.raises(SpecError, match=named):
        NativeMasks(annotations, spec, make_index().select)


def test_a_file_of_another_split_is_refused(annotations):
    index = make_index().drop(["task_id"])
    index = index.append_column("task_id", pa.array(["77__1"] * len(index)))
    with pytest.raises(SpecError, match=r"none of its 12 tasks .* \['77__1'\]"):
        NativeMasks(annotations, SPEC, index.select)


def test_files_without_polygons_and_damaged_ones_are_refused_by_name(tmp_path):
    path = tmp_path / "refer_input_test.json"
    path.write_text(json.dumps([{"task_id": "1__0", "phrase": "thing"}]))
    with pytest.raises(SpecError, match=r"refer_input_<split>\.json has none"):
        Annotations.read(path)
    path.write_text(json.dumps([{"task_id": "1__0", "Polygons": [[["x"]]]}]))
    native = NativeMasks(Annotations.read(path), SPEC, make_index().select)
    with pytest.raises(SpecError, match="task 1__0: polygon"):
        native.draw([0])
