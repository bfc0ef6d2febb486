"""Figures that must hold whatever the machine: parameters, and the error of storage forms."""

import pytest
import torch

from models.heads.registry import HEADS
from models.ldm.sd14 import SD14_UNET
from pipeline.bench.inputs import prepare_model, write_scenes
from pipeline.bench.parameters import count_parameters
from pipeline.bench.storage import StorageErrors, measure_storage, read_views
from pipeline.spec.fields import LatentsSpec

pytestmark = pytest.mark.thorough

SPEC = LatentsSpec(model="demo", size=64)


@pytest.fixture(scope="module")
def counted():
    return {row.network: row for row in count_parameters(SD14_UNET)}


def test_every_head_is_counted_and_the_parts_add_up(counted):
    assert set(counted) == {"LDM's UNet", *HEADS, "ldznet, concatenation"}
    for row in counted.values():
        parts = (row.unet, row.final, row.pools, row.added, row.stem, row.other)
        assert row.total == sum(parts) > 0


def test_parameters_at_sd14s_size_are_the_papers(counted):
    assert counted["LDM's UNet"].total == 859_520_964
    assert (counted["znet"].total, counted["znet"].final) == (859_512_376, 55)
    ldznet = counted["ldznet"]
    assert (ldznet.total, ldznet.pools + ldznet.added) == (925_882_936, 66_370_560)
    assert ldznet.total // 10**6 == ldznet.paper_millions == 925
    assert counted["rgbnet"].total == counted["znet"].total + counted["rgbnet"].stem
    # five 1×1 convolutions from twice the channels, with their biases
    assert counted["ldznet, concatenation"].added == 5 * (2 * 1280 * 1280 + 1280)


def test_the_papers_figure_stands_beside_its_own_architecture_alone(counted):
    assert [row.network for row in counted.values() if row.paper_millions] == ["ldznet"]
    spelled_out = {**SD14_UNET, "_name_or_path": "x", "sample_size": 96, "dropout": 0.0}
    heads = {row.network: row for row in count_parameters(spelled_out)}
    assert heads["ldznet"].paper_millions == 925
    wider_text = count_parameters({**SD14_UNET, "cross_attention_dim": 1024})
    assert [row.paper_millions for row in wider_text] == [None] * len(wider_text)


def test_storage_errors_are_those_of_the_values_given():
    feature = torch.tensor([3.0, -4.0, 0.1, 0.0]).reshape(1, 1, 2, 2)
    errors = StorageErrors()
    errors.add({6: feature})
    errors.add({6: 2 * feature})
    rows = {row.form: row for row in errors.rows()}
    assert {form: row.draw_bytes for form, row in rows.items()} == {
        "float16": 8,
        "int8": 4 + 4,
        "int4": 2 + 2,
    }
    restored = torch.tensor([95.0, -127.0, 3.0, 0.0]) * 4 / 127
    error = (restored - feature.flatten()).norm() / feature.norm()
    assert rows["int8"].relative_rms == pytest.approx(float(error), rel=1e-4)
    largest = (restored - feature.flatten()).abs().max() / 4
    assert rows["int8"].relative_max == pytest.approx(float(largest), rel=1e-4)


def test_storage_of_real_features_is_within_the_bounds(ldm_folder, corpus_folder):
    views = read_views([str(corpus_folder / "scenes-train-*.tar")], SPEC, num=3)
    assert len({view.source.key for view in views}) == 3
    rows = measure_storage(ldm_folder, views, blocks=[6, 7])
    assert [(row.block, row.form) for row in rows] == [
        (block, form) for block in (6, 7) for form in ("float16", "int8", "int4")
    ]
    bounds = {"float16": 2**-11, "int8": 0.5 / 127 * 1.001, "int4": 0.5 / 7 * 1.002}
    for row in rows:
        assert 0 < row.relative_max <= bounds[row.form]
        assert row.relative_rms > 0
    # within a channel rms(x) is smaller than max|x|, so the order of forms is all that must hold
    assert all(a.relative_rms < b.relative_rms for a, b in ((rows[0], rows[1]), (rows[1], rows[2])))
    # 96 channels of 2×2: a float32 scale each for int8, half a byte a value and a float16 for int4
    assert [row.draw_bytes for row in rows[:3]] == [768, 96 * (4 + 4), 96 * (2 + 2)]


def test_views_are_taken_from_every_tar(corpus_folder):
    views = read_views([str(corpus_folder / "scenes-*.tar")], SPEC, num=6)
    assert [view.source.key.split("-")[0] for view in views] == ["train"] * 4 + ["val"] * 2


def test_the_demos_inputs_are_the_default(tmp_path):
    pattern = write_scenes(tmp_path / "c", num=2, num_tars=1, size_px=64)
    views = read_views(pattern, SPEC, num=2)
    assert [view.image.shape for view in views] == [(64, 64, 3)] * 2
    model = prepare_model(None, tmp_path / "ldm", size_px=64)
    assert measure_storage(model, views[:1], blocks=[7])


def test_no_views_are_refused(ldm_folder):
    with pytest.raises(ValueError, match="expected at least one view"):
        measure_storage(ldm_folder, [], blocks=[6])
