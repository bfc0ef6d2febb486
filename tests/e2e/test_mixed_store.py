"""A store of pairs with and without masks, negatives and ignore regions, trained on and scored.

What readers, training and evaluation say of it is compared with loops over what plain Zarr and
pyarrow read of its files.
"""

import json
import logging
import math
import pickle
import shutil
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from scipy.integrate import simpson

from pipeline.base.yaml import SpecError
from pipeline.evaluate.baselines import mean_area
from pipeline.evaluate.run import format_rows, run_evaluate
from pipeline.evaluate.scoring import choose_pairs
from pipeline.read.choice import PairChoice
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers
from pipeline.runs.checkpoint import load_checkpoint
from pipeline.runs.new_head import build_head
from pipeline.train.data import check_readers, open_readers
from pipeline.train.overlays import ValidationOverlays
from pipeline.train.step import HeadTrainer
from tests.support.encode_here import encode_here
from tests.support.mixed_corpus import write_mixed_corpus
from tests.support.train_runs import (
    CPU,
    assert_close_curves,
    find_port,
    fit_as_rank,
    fit_here,
    losses,
    make,
    read_curves,
    read_records,
)

CONFIG = make(
    head="probe", num_steps=3, batch_size=5, validate_every=3, negatives=True, overlays=True
)
THRESHOLDS = [float(np.float32(x)) for x in np.linspace(0, 1, 51)[1:-1]]


@dataclass
class Pair:
    """A pair as plain Zarr and pyarrow read it."""

    row: dict
    mask: np.ndarray | None
    counts: np.ndarray  # bool: the pixels that are not ignored
    features: dict


@pytest.fixture(scope="module")
def folder(tmp_path_factory, spec):
    folder = tmp_path_factory.mktemp("mixed")
    return encode_here(spec, write_mixed_corpus(folder / "corpus"), folder / "store")


@pytest.fixture(scope="module")
def out(tmp_path_factory, folder):
    out = tmp_path_factory.mktemp("run")
    assert fit_here(CONFIG, folder, out) == 3
    return out


def read_plain(folder, part):
    """The pairs of the tasks whose name holds ``part``, by files alone."""
    found = []
    latents, over = next(folder.glob("latents-*")), next(folder.glob("features-*"))
    records = {}
    for path in sorted((latents / "commits").glob(f"*{part}*.json")):
        record = json.loads(path.read_bytes())
        records[record["task"]] = record
    for task, record in records.items():
        data = latents / "data" / task / record["attempt"]
        arrays = zarr.open_group(data / "arrays.zarr", mode="r")
        (attempt,) = (over / "data" / task).iterdir()
        features = zarr.open_group(attempt / "arrays.zarr", mode="r")
        for number, row in enumerate(pq.read_table(data / "index.parquet").to_pylist()):
            counts = np.ones((64, 64), bool)
            if row["ignore_row"] is not None:
                counts = arrays["ignore"][row["ignore_row"]] == 0
            mask = None if row["mask_row"] is None else arrays["mask"][row["mask_row"]]
            blocks = {block: features[f"block{block:02}"][number] for block in range(6, 11)}
            found.append(Pair(row, mask, counts, blocks))
    return found


def with_masks(pairs, *, negatives):
    return [x for x in pairs if x.mask is not None or (negatives and x.row["negative"])]


def slow_figures(pairs, probabilities):
    """mIoU, IoU_FG, AP_clipseg, best threshold and pairs, by loops over pairs and thresholds."""
    means, pooled, points = [], [], {}
    for limit in THRESHOLDS:
        ratios, sums = [], np.zeros(3, np.int64)
        for pair, probability in zip(pairs, probabilities, strict=True):
            if not pair.counts.any():
                continue
            said, true = probability[pair.counts] > limit, pair.mask[pair.counts] == 1
            tp, fp, fn = (said & true).sum(), (said & ~true).sum(), (~said & true).sum()
            ratios.append(tp / (1 + tp + fp + fn))
            sums += (tp, fp, fn)
        tp, fp, fn = sums.tolist()
        means.append(math.fsum(ratios) / len(ratios))
        pooled.append(tp / (1 + tp + fp + fn))
        if tp + fp:
            recall, precision = tp / (1 + tp + fn), tp / (1 + tp + fp)
            points[recall] = max(precision, points.get(recall, 0.0))
    xs = sorted(points)
    area = float(simpson([points[x] for x in xs], x=xs)) if len(xs) > 1 else 0.0
    best = int(np.argmax(means))
    return (max(means), max(pooled), area), THRESHOLDS[best], len(ratios)


def slow_false_answers(pairs, probabilities, limit):
    counted = [
        bool((probability[pair.counts] > limit).any())
        for pair, probability in zip(pairs, probabilities, strict=True)
        if pair.counts.any()
    ]
    return sum(counted) / len(counted)


def predict_alone(head, pairs):
    """Each pair's probabilities, from features of the middle draw read by Zarr."""
    found = []
    for pair in pairs:
        features = {
            number: torch.from_numpy(draws[1]).float()[None]
            for number, draws in pair.features.items()
            if number in head.feature_channels
        }
        with torch.inference_mode():
            found.append(torch.sigmoid(head(features=features).float())[0, 0].numpy())
    return found


@pytest.mark.thorough
def test_two_workers_train_as_one(folder, out, tmp_path):
    """Their losses are of one step's pairs together, of which one worker may have all ignored."""
    port, start = find_port(), get_context("fork").Process
    workers = [
        start(
            target=fit_as_rank,
            args=(CONFIG, folder, tmp_path),
            kwargs={"rank": rank, "num_workers": 2, "port": port},
        )
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert_close_curves(tmp_path, out)
    (ours,), (theirs,) = (read_curves(x)[1].values() for x in (tmp_path, out))
    assert ours["num_negatives"] == theirs["num_negatives"] > 0


@pytest.mark.parametrize("negatives", [False, True])
def test_a_reader_gives_the_masks_zeros_of_negatives_and_the_ignore_regions(folder, negatives):
    source = open_layers(str(folder))
    reader = PairReader(source, tasks="*", inputs=frozenset({"latent"}), negatives=negatives)
    expected = with_masks(read_plain(folder, "m-"), negatives=negatives)
    assert len(reader) == len(expected) > 0
    order = np.random.default_rng(0).permutation(len(reader))
    for part in reader.read_masks(order):  # this memory is used again
        part.fill_(7)
    del part
    batch = reader.read(order, draws=[0] * len(order))
    again = pickle.loads(pickle.dumps(reader)).read(order, draws=[0] * len(order))
    assert torch.equal(again.mask, batch.mask)
    assert torch.equal(again.ignore, batch.ignore)
    for place, number in enumerate(order):
        pair = expected[number]
        mask = np.zeros((64, 64)) if pair.mask is None else pair.mask
        np.testing.assert_array_equal(batch.mask[place], mask)
        np.testing.assert_array_equal(batch.ignore[place], ~pair.counts)
        assert (batch.keys[place], batch.phrases[place]) == (pair.row["key"], pair.row["phrase"])
    for found, read in zip(reader.read_masks(order), (batch.mask, batch.ignore), strict=True):
        assert torch.equal(found, read)
    assert mean_area(reader) == pytest.approx(
        np.mean([0 if x.mask is None else x.mask.mean() for x in expected]), rel=1e-5
    )


def test_without_masks_every_pair_is_read_and_no_mask_is(folder, tmp_path):
    store = shutil.copytree(folder, tmp_path / "store")
    for path in [*store.rglob("mask"), *store.rglob("ignore")]:
        shutil.rmtree(path)
    source = open_layers(str(store))
    reader = PairReader(source, tasks="*", inputs=frozenset({"latent"}), masks=False)
    assert len(reader) == len(read_plain(folder, "m-"))
    batch = reader.read([0, len(reader) - 1], draws=[0, 0])
    assert (batch.mask, batch.ignore) == (None, None)


def test_the_loss_is_the_mean_over_counted_pixels_however_it_is_accumulated(folder):
    source = open_layers(str(folder))
    train, _ = open_readers(CONFIG, source)
    pairs = with_masks(read_plain(folder, "train"), negatives=True)
    assert len(train) == len(pairs)
    assert any(not pair.counts.any() for pair in pairs)
    assert any(pair.row["negative"] and pair.counts.any() for pair in pairs)
    torch.manual_seed(0)
    head = build_head(CONFIG.head, source.latents, source.features)
    probabilities = predict_alone(head, pairs)
    total = 0.0
    for pair, probability in zip(pairs, probabilities, strict=True):
        if pair.counts.any():
            mask = np.zeros((64, 64)) if pair.mask is None else pair.mask
            entropy = -np.log(np.where(mask == 1, probability, 1 - probability).astype(float))
            total += entropy[pair.counts].mean()
    numbers = list(range(len(pairs)))
    found = []
    for cuts in ([numbers], [numbers[:1], numbers[1:4], numbers[4:]]):
        trainer = HeadTrainer(CONFIG, pickle.loads(pickle.dumps(head)), device=CPU)
        passes = [train.read(some, draws=[1] * len(some)) for some in cuts]
        found.append(trainer.train_step(passes, num_global=len(pairs), step=0))
    assert found[0][0] == pytest.approx(total / len(pairs), rel=1e-4)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_batch_of_ignored_pixels_alone_moves_nothing(folder):
    source = open_layers(str(folder))
    train, _ = open_readers(CONFIG, source)
    pairs = with_masks(read_plain(folder, "train"), negatives=True)
    (number, *_) = (i for i, pair in enumerate(pairs) if not pair.counts.any())
    head = build_head(CONFIG.head, source.latents, source.features)
    trainer = HeadTrainer(CONFIG, head, device=CPU)
    batch = train.read([number], draws=[0])
    assert trainer.train_step([batch], num_global=1, step=0) == (0.0, 0.0)


def test_evaluation_equals_loops_over_the_files(folder, out):
    rows = run_evaluate(str(folder), out, batch_size=1)
    head, _ = load_checkpoint(out)
    pairs = read_plain(folder, "val")
    truth = with_masks(pairs, negatives=False)
    negatives = [pair for pair in pairs if pair.row["negative"]]
    predicted = {rows[0].name: lambda some: predict_alone(head, some)}
    predicted[rows[1].name] = lambda some: [np.ones((64, 64), np.float32)] * len(some)
    for row in rows[:2]:
        predict = predicted[row.name]
        figures, threshold, num = slow_figures(truth, predict(truth))
        found = (row.scores.mIoU, row.scores.IoU_FG, row.scores.AP_clipseg)
        assert found == pytest.approx(figures, abs=1e-9)
        assert row.scores.num_pairs == num < len(truth)
        assert row.scores.mIoU_threshold == pytest.approx(threshold)
        false = predict(negatives)
        assert row.negatives == {
            "false_answers": slow_false_answers(negatives, false, 0.5),
            "false_answers_best": slow_false_answers(negatives, false, np.float32(threshold)),
            "num_negatives": sum(bool(pair.counts.any()) for pair in negatives),
        }
    assert rows[1].negatives["false_answers"] == 1.0
    text = format_rows(rows)
    assert "everything foreground" in text
    assert "any pixel over 0.5: 100.0, over mIoU's best threshold" in text


def test_the_mean_masks_leave_out_ignored_pixels_and_negatives(folder, out):
    (row,) = (row for row in run_evaluate(str(folder), out, batch_size=4) if "mean" in row.name)
    train = with_masks(read_plain(folder, "train"), negatives=False)
    pairs = with_masks(read_plain(folder, "val"), negatives=False)

    def mean(some):
        counts = np.stack([pair.counts for pair in some]).astype(np.float32)
        masks = np.stack([pair.mask for pair in some]) * counts
        return (masks.sum(0) / np.maximum(counts.sum(0), 1)).astype(np.float32)

    probabilities = []
    for pair in pairs:
        seen = [x for x in train if x.row["phrase"] == pair.row["phrase"]]
        probabilities.append(mean(seen or train))
    figures, *_ = slow_figures(pairs, probabilities)
    found = (row.scores.mIoU, row.scores.IoU_FG, row.scores.AP_clipseg)
    assert found == pytest.approx(figures, abs=1e-9)


def test_a_run_trains_validates_and_draws(folder, out):
    (record,) = (record for record in read_records(out) if "validation" in record)
    scores = run_evaluate(str(folder), out, limit=CONFIG.validation_pairs)[0]
    assert record["validation"]["mIoU"] == pytest.approx(scores.scores.mIoU, abs=0.01)
    assert record["validation"]["num_negatives"] == scores.negatives["num_negatives"]
    assert all(math.isfinite(loss) for loss in losses(out).values())
    assert len(list((out / "overlays").iterdir())) == 1


def test_overlays_leave_out_ignored_pixels(folder, out):
    source = open_layers(str(folder))
    head, _ = load_checkpoint(out)
    head.start_at_prior(0.99)  # so that it answers, in ignored pixels too
    _, validation = open_readers(CONFIG, source)
    _, captions = ValidationOverlays(CONFIG, source, validation, draw=1).draw(
        head, device=CPU, threshold=0.5
    )
    pairs = with_masks(read_plain(folder, "val"), negatives=False)
    shown = [pairs[number] for number in choose_pairs(len(pairs), len(captions))]
    expected = []
    for pair, probability in zip(shown, predict_alone(head, shown), strict=True):
        said, true = (probability > 0.5) & pair.counts, (pair.mask == 1) & pair.counts
        share = (said & true).sum() / (said | true).sum() if (said | true).any() else 1.0
        expected.append(f"{pair.row['phrase']} · IoU {share:.2f} over 0.50")
    assert captions == expected
    assert any(
        (x > 0.5)[~y.counts].any() for x, y in zip(predict_alone(head, shown), shown, strict=True)
    )


def test_tasks_without_masks_are_said_by_name_once(folder, caplog):
    caplog.set_level(logging.WARNING)
    check_readers(CONFIG, open_layers(str(folder)))
    (said,) = caplog.messages
    assert "data.train '*train*': 1 of 3 tasks have no pair with a mask" in said
    assert "m-train-1" in said
    caplog.clear()
    data = {"train": "*train-0*", "validation": "*train-[12]*"}
    check_readers(make(CONFIG, data=data, negatives=False), open_layers(str(folder)))
    (said,) = caplog.messages
    assert "data.validation '*train-[12]*': 1 of 2 tasks have no pair with a mask" in said
    none = make(CONFIG, data={"train": "*train-1*"})
    with pytest.raises(SpecError, match="at least one committed pair with a mask"):
        check_readers(none, open_layers(str(folder)))


def test_negatives_that_are_asked_for_must_be_there(store_folder):
    with pytest.raises(SpecError, match=r"at least one committed pair that meets .*negative"):
        check_readers(CONFIG, open_layers(str(store_folder)))


def test_an_area_or_a_phrase_that_is_asked_for_meets_negatives_too(folder):
    source = open_layers(str(folder))
    pairs = with_masks(read_plain(folder, "train"), negatives=True)
    choice = PairChoice(max_area=0.1)
    reader = PairReader(source, tasks="*train*", inputs=frozenset(), choice=choice)
    expected = [x for x in pairs if x.row["negative"] or x.row["mask_area"] <= np.float32(0.1)]
    assert 0 < len(reader) == len(expected) < len(pairs)
