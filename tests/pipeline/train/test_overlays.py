"""Overlays of validation pairs: the same pairs each time, truth and prediction where they are."""

import re

import numpy as np
import pytest
import torch

from pipeline.encode.prepare import prepare_encode
from pipeline.evaluate.scoring import evaluation_draw
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers
from pipeline.report.overlay import TINT
from pipeline.runs.config import HeadConfig, TrainConfig
from pipeline.spec.fields import LatentsSpec, Spec
from pipeline.stage.encode_stage import EncodeStage
from pipeline.train.overlays import (
    GAP_PX,
    NUM_PAIRS,
    TRUTH,
    ValidationOverlays,
    draw_latent,
    draw_pair,
    draw_sheet,
    shorten,
)

CPU = torch.device("cpu")
CONFIG = TrainConfig(head=HeadConfig(name="znet"), num_steps=1)


class _AlwaysHead(torch.nn.Module):
    """Logits of one value everywhere: a prediction that is known."""

    def __init__(self, logit):
        super().__init__()
        self.logit = logit

    def forward(self, latent, text):
        return torch.full((len(latent), 1, 64, 64), self.logit)


def open_overlays(store_folder):
    source = open_layers(str(store_folder), reads_features=False)
    inputs = frozenset({"latent", "text"})
    validation = PairReader(source, tasks=CONFIG.data.validation, inputs=inputs)
    draw = evaluation_draw(range(validation.num_draws))
    return ValidationOverlays(CONFIG, source, validation, draw=draw), validation


def test_the_same_pairs_each_time_with_truth_and_prediction(store_folder):
    overlays, validation = open_overlays(store_folder)
    images, captions = overlays.draw(_AlwaysHead(9.0), device=CPU, threshold=0.5)
    none, _ = overlays.draw(_AlwaysHead(-20.0), device=CPU, threshold=0.5)
    assert len(images) == len(captions) == min(NUM_PAIRS, len(validation))
    side = images.shape[1]
    assert images.shape == (len(images), side, 3 * side + 2 * GAP_PX, 3)
    assert images.dtype == np.uint8
    truth = slice(side + GAP_PX, 2 * side + GAP_PX)
    np.testing.assert_array_equal(images[:, :, : 2 * side], none[:, :, : 2 * side])
    grey = none[:, :, -side:]  # nothing predicted
    assert (grey == grey[..., :1]).all()
    tinted = (grey.astype(float) + TINT) / 2  # all of it, at half opacity
    np.testing.assert_allclose(images[:, :, -side:], tinted, atol=1)
    marked = (none[:, :, truth] != grey).any(axis=-1).mean(axis=(1, 2))
    again, same = open_overlays(store_folder)[0].draw(_AlwaysHead(9.0), device=CPU, threshold=0.5)
    np.testing.assert_array_equal(again, images)
    assert same == captions
    phrases = set(validation.index["phrase"].to_pylist())
    assert {caption.split(" · IoU ")[0] for caption in captions} <= phrases
    areas = [float(re.search(r" · IoU ([0-9.]+) over 0.50$", caption)[1]) for caption in captions]
    assert 0 < min(areas) < max(areas) < 1  # of masks that differ, everything predicted
    np.testing.assert_allclose(marked, areas, atol=0.12)  # the outline's rim is outside


def test_without_stored_views_the_latent_is_the_picture(tmp_path, corpus_folder, ldm_folder):
    spec = Spec(latents=LatentsSpec(model=str(ldm_folder), size=64))
    run = prepare_encode(spec, [str(corpus_folder / "*val*.tar")], str(tmp_path / "s"), batch=8)
    stage = EncodeStage(run.config)
    assert [stage.encode(item).status for item in run.items] == ["committed"]
    stage.close()
    images, _ = open_overlays(tmp_path / "s")[0].draw(_AlwaysHead(-20.0), device=CPU, threshold=0.5)
    side = images.shape[1]
    block = side // 8  # a latent of 64 px has 8 values a side
    first = images[0, :, :side].reshape(8, block, 8, block, 3)
    assert (first == first[:, :1, :, :1]).all()
    assert len(np.unique(first)) > 8


def test_a_latents_channels_fill_the_range():
    latent_CHW = np.linspace(-3, 5, 4 * 16, dtype=np.float32).reshape(4, 4, 4)
    picture = draw_latent(latent_CHW, 8)
    assert picture.shape == (8, 8, 3)
    assert (picture.min(axis=(0, 1)) == 0).all()
    assert (picture.max(axis=(0, 1)) == 255).all()
    assert (draw_latent(np.ones((4, 4, 4), np.float32), 8) == 0).all()


def test_truth_and_prediction_have_their_colours():
    image = np.full((192, 192, 3), 128, np.uint8)
    mask = np.zeros((192, 192), bool)
    mask[40:80, 40:80] = True
    drawn = draw_pair(image, mask, mask.astype(np.float64), threshold=0.5)
    assert tuple(drawn[40, 192 + GAP_PX + 40]) == TRUTH
    assert tuple(drawn[40, 2 * (192 + GAP_PX) + 40]) == TINT
    assert (drawn[:, :192] == 128).all()


def test_what_is_over_the_threshold_is_predicted(store_folder):
    """A head that says 0.27 everywhere, as an early one does where its table has a good mIoU."""
    overlays, _ = open_overlays(store_folder)
    _, over = overlays.draw(_AlwaysHead(-1.0), device=CPU, threshold=0.26)
    _, all_over = overlays.draw(_AlwaysHead(9.0), device=CPU, threshold=0.26)
    _, below = overlays.draw(_AlwaysHead(-1.0), device=CPU, threshold=0.28)
    assert over == all_over
    assert all(caption.endswith("IoU 0.00 over 0.28") for caption in below)
    image, probability = np.full((192, 192, 3), 128, np.uint8), np.full((192, 192), 0.27)
    probability[:, 96:] = 0.25
    drawn = draw_pair(image, probability > 1, probability, threshold=0.26)
    assert tuple(drawn[9, 2 * (192 + GAP_PX) + 95]) == TINT  # the outline


@pytest.mark.parametrize("num", [1, 2, 3, 8])
def test_a_sheet_has_room_for_every_pair(num):
    images = np.full((num, 40, 150, 3), 77, np.uint8)
    images[:, 0, 0] = np.arange(num)[:, None]
    sheet = draw_sheet(images, ["a phrase"] * num)
    assert np.count_nonzero((sheet == 77).all(axis=-1)) == num * (40 * 150 - 1)


def test_a_long_phrase_is_cut_to_one_line():
    assert shorten("the\ncup  left", 400) == "the cup left"
    cut = shorten("the small cup " * 20, 200)
    assert cut.startswith("the small cup")
    assert cut.endswith("…")
    assert shorten("Чашка · красная", 300) == "Чашка · красная"
