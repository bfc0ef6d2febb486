"""Scoring: the rows that need no head are what they say, and batches do not matter."""

import numpy as np
import pytest
import torch

from models.metrics import SegmentationMetrics
from pipeline.evaluate import (
    BASELINE_FOREGROUND,
    BASELINE_MEAN_MASK,
    ScoredRow,
    iterate_batches,
    score_baselines,
    score_head,
)
from pipeline.evaluate_job import choose_pairs, format_rows, run_evaluate
from pipeline.reader import PairReader, Source, choose_layers
from pipeline.spec import SpecError
from pipeline.store import Store, create_snapshot
from pipeline.train import build_head
from pipeline.train_config import HeadConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(store_folder):
    store = Store.open(str(store_folder))
    latents, features = choose_layers(store, latents=None, features=None, reads_features=True)
    return Source(
        store, latents, features, create_snapshot(store, [latents.folder, features.folder])
    )


@pytest.fixture(scope="module")
def readers(source):
    return tuple(PairReader(source, tasks=f"*{s}*", inputs=frozenset()) for s in ("train", "val"))


def test_baselines_are_what_their_names_say(readers):
    train, validation = readers
    numbers = np.arange(len(validation))
    rows = score_baselines(train, validation, numbers, batch=3)
    assert [row.name for row in rows] == [BASELINE_FOREGROUND, BASELINE_MEAN_MASK]
    masks = validation.read_masks(numbers).bool()
    share = masks.sum().item() / (masks.numel() + 1)
    assert rows[0].scores.IoU_FG == pytest.approx(share, rel=1e-6)
    all_train = train.read_masks(range(len(train))).float()
    by_phrase = np.array(train.index["phrase"].to_pylist())
    metrics = SegmentationMetrics()
    for number in numbers:
        seen = by_phrase == validation.index["phrase"][int(number)].as_py()
        mean = (all_train[seen] if seen.any() else all_train).mean(dim=0)
        metrics.add(mean[None], masks[number][None])
    assert rows[1].scores == metrics.compute()


def test_batches_come_in_order_whatever_their_size(readers):
    validation = readers[1]
    for batch in (1, 3, 100):
        found = list(iterate_batches(validation, np.arange(len(validation)), batch=batch))
        keys = [key for pairs in found for key in pairs.keys]
        assert keys == validation.index["key"].to_pylist()


def test_scores_do_not_depend_on_the_batch(source):
    head = build_head(HeadConfig(name="znet"), source.latents, source.features).eval()
    reader = PairReader(source, tasks="*val*", inputs=head.inputs)
    numbers, heard = np.arange(len(reader)), []
    scores = [
        score_head(head, reader, numbers, device=CPU, batch=batch, on_batch=heard.append)
        for batch in (2, 64)
    ]
    assert scores[0].num_pairs == scores[1].num_pairs == len(reader) == heard[-1]
    assert scores[0].IoU_FG == pytest.approx(scores[1].IoU_FG, abs=1e-4)


def test_limit_takes_a_fixed_subset_in_order():
    chosen = choose_pairs(1000, 10)
    assert len(set(chosen)) == 10
    assert list(chosen) == sorted(chosen)
    assert list(chosen) == list(choose_pairs(1000, 10))
    assert list(choose_pairs(3, 10)) == [0, 1, 2]


def test_a_missing_checkpoint_is_named(tmp_path, store_folder):
    with pytest.raises(SpecError, match="expected a checkpoint"):
        run_evaluate(str(store_folder), tmp_path)


def test_the_table_is_in_percent(readers):
    rows = score_baselines(*readers, np.arange(4), batch=4)
    lines = format_rows(rows).splitlines()
    assert len(lines) == 3
    assert f"{100 * rows[0].scores.IoU_FG:.1f}" in lines[1]
    assert ScoredRow("x", rows[0].scores).figures()["num_pairs"] == 4
