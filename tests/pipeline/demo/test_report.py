"""What the demo's report says of rows, maps and savings."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.base.yaml import load_yaml
from pipeline.demo.recipe import HELD_OUT, RESTYLED, SIZES, DemoRecipe
from pipeline.demo.report import (
    describe_map,
    describe_savings,
    list_results,
    read_losses,
    score_objects,
)
from pipeline.demo.savings import Savings
from pipeline.scenes.scene import draw_scene
from pipeline.sweep.config import VALIDATION
from pipeline.sweep.heat_map import HeatMap
from pipeline.sweep.results import SCHEMA

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"


@pytest.fixture
def recipe():
    return load_yaml(RECIPES / "demo.yaml", DemoRecipe)


def row(variant, seed, scored_on, ap, **more):
    given = {"status": "done", "variant": variant, "head": variant.lower(), "seed": seed}
    given |= {"scored_on": scored_on, "num_pairs": 7, "mIoU": ap / 2, "IoU_FG": ap / 4, "AP": ap}
    given |= {"AP_clipseg": ap, "mIoU_threshold": ap, "IoU_FG_threshold": ap}
    return dict.fromkeys(SCHEMA.names) | given | more


def test_rows_are_means_by_what_they_were_scored_on():
    rows = [row("ZNet", seed, "another look", 0.2 + seed / 10, num_pairs=9) for seed in (0, 1, 2)]
    rows += [row("ZNet", seed, "validation", 0.4 + seed / 10) for seed in (0, 1, 2)]
    rows += [row("base", None, "validation", 0.1, head="everything foreground")]
    objects = {VALIDATION: (0.3, 0.2), RESTYLED: (0.6, 0.5), HELD_OUT: (0.1, 0.1)}
    known, baseline, every, looked, _ = list_results(rows, objects)
    assert (every.scores[:2], every.group) == ((0.3, 0.2), known.group)
    assert np.isnan(every.scores[2])
    assert known.group == "Known phrases, known look: 7 pairs"
    assert looked.group == "A look that nothing was trained on: 9 pairs"
    assert (known.name, known.baseline) == ("ZNet", False)
    assert known.scores == pytest.approx((0.25, 0.125, 0.5))
    assert known.deviations == pytest.approx((0.05, 0.025, 0.1))
    assert known.threshold == pytest.approx(0.5)  # the seeds' mean
    assert (baseline.threshold, every.threshold) == (0.1, None)
    assert (baseline.name, baseline.group) == ("everything foreground", known.group)
    assert baseline.baseline
    assert baseline.deviations == (None, None, None)


def test_every_object_scores_what_its_share_of_the_objects_is(recipe):
    """Held to the scenes: one phrase of all objects scores 1, others less."""
    size = replace(SIZES["smallest"], validation_images=6, restyled_images=2)
    scores = score_objects(recipe, size, seed=0)
    ious = []
    for index in range(2):
        scene = draw_scene(seed=0, split=recipe.restyled, index=index, size_px=128)
        for phrase, mask in zip(scene.phrases, scene.masks, strict=True):
            if not re.search(recipe.held_out, phrase):
                assert not mask[scene.owner < 0].any()
                ious.append(mask.sum() / (scene.owner >= 0).sum())
    assert scores[RESTYLED][0] == pytest.approx(np.mean(ious))
    assert 0 < scores[RESTYLED][1] < 1


def test_a_map_is_described_by_its_averages():
    values = np.array([[1.0, 9.0, 2.0, 3.0], [5.0, 6.0, 8.0, 7.0]])
    found = HeatMap("x", (2, 4, 6, 8), (100, 500), values, (1, 1), None, 5)
    assert describe_map(found) == (
        "Over all timesteps AP is highest at blocks 4 (7.5 %), 8 (5.0 %), 6 (5.0 %); over all "
        "blocks at t = 500 (6.5 %)."
    )


def test_of_losses_that_were_logged_twice_the_last_counts(tmp_path):
    records = [{"step": 5, "loss": 0.5}, {"step": 10, "loss": 0.4}, {"step": 10, "mIoU": 0.1}]
    records += [{"step": 10, "loss": 0.3}, {"validation": 1}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert read_losses(path) == {5: 0.5, 10: 0.3}


@pytest.mark.parametrize(
    ("recompute_s", "said"),
    [(3600 + 60, "3540 s of a core, 0.0492 $"), (20.0, "-100 s of a core, -0.0014 $")],
)
def test_what_was_saved_counts_reading_and_may_be_a_loss(recompute_s, said):
    lines = describe_savings(Savings(100.0, 20.0, recompute_s, 5000, 4))
    assert lines["saved"].startswith(said)
    assert lines["pairs read"].startswith("5,000 to train and validate 4 heads")
