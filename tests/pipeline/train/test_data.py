"""What stops a run before it starts, and batches that come in order however they are read."""

import re
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest

from pipeline.base.yaml import SpecError
from pipeline.read.choice import PairChoice
from pipeline.read.source import open_layers
from pipeline.runs.config import HeadConfig, list_draws
from pipeline.train.data import (
    ALONE,
    TrainData,
    Worker,
    check_batch,
    check_readers,
    open_readers,
    trace_path,
    trim_traces,
)
from tests.support.encode_here import encode_here
from tests.support.train_runs import CPU, make, read_pairs


@pytest.fixture(scope="module")
def source(store_folder):
    return open_layers(str(store_folder))


def refuse(source, match, **changes):
    with pytest.raises(SpecError, match=match):
        open_readers(make(**changes), source)


def test_what_the_store_lacks_is_said(source):
    refuse(source, r"data.train: 'x\*': no task of", data={"train": "x*"})
    refuse(source, r"data.validation: 'x\*': no task of", data={"validation": "x*"})
    head = HeadConfig(name="ldznet", blocks=(3, 6))
    refuse(source, r"but \[3\] were not encoded; encode a layer with them", head=head)
    without = replace(source, features=None)
    refuse(without, "reads features, but there is no features layer", head="probe")


def test_filters_that_leave_nothing_are_named(source):
    data = {"train_filter": PairChoice(min_area=0.99)}
    refuse(source, r"committed pair that meets min_area: 0\.99 in", data=data)
    data = {"validation_filter": PairChoice(phrase="no such phrase")}
    refuse(source, "meets phrase: no such phrase in", data=data)


def test_filters_choose_the_pairs(source):
    data = {"train_filter": PairChoice(max_area=0.05), "validation_filter": PairChoice(phrase="a")}
    train, _ = open_readers(make(data=data), source)
    areas = train.index["mask_area"].to_numpy()
    whole = open_readers(make(), source)[0].index["mask_area"].to_numpy()
    assert 0 < len(areas) < len(whole)
    assert len(areas) == (whole <= np.float32(0.05)).sum()


def test_splits_may_share_tasks_where_keys_part_them(source):
    both = {"train": "*", "validation": "*"}
    refuse(source, "3 tasks match both train.*keys_to: 0.9", data=both)
    parted = both | {
        "train_filter": PairChoice(keys_to=0.5),
        "validation_filter": PairChoice(keys_from=0.5),
    }
    train, validation = open_readers(make(data=parted), source)
    keys = [set(reader.index["key"].to_pylist()) for reader in (train, validation)]
    assert all(keys)
    assert not keys[0] & keys[1]
    other_seed = parted | {"validation_filter": PairChoice(keys_from=0.5, keys_seed=1)}
    refuse(source, "match both train", data=other_seed)


@pytest.fixture(scope="module")
def source_with_a_copy(tmp_path_factory, corpus_folder, spec):
    """A store in which a tar of the training tasks is also there under a name of validation."""
    folder = tmp_path_factory.mktemp("copied")
    shutil.copytree(corpus_folder, folder / "corpus")
    train = folder / "corpus" / "scenes-train-00001.tar"
    shutil.copy(train, train.with_name("other-val-00000.tar"))
    latents = spec.model_copy(update={"features": None})
    return open_layers(
        str(encode_here(latents, folder / "corpus", folder / "store")), reads_features=False
    )


def test_a_tar_in_both_splits_is_told_once_with_both_its_names(source_with_a_copy, source, caplog):
    check_readers(make(), source)
    assert not caplog.records
    check_readers(make(), source_with_a_copy)
    (record,) = caplog.records
    said = record.getMessage()
    assert "train '*train*' and validation '*val*' both have tars of equal SHA-256 (1)" in said
    assert re.search(r"such as scenes-train-00001-\w+ and other-val-00000-\w+: the", said)
    caplog.clear()
    apart = {
        "train_filter": PairChoice(keys_to=0.5),
        "validation_filter": PairChoice(keys_from=0.5),
    }
    check_readers(make(data=apart), source_with_a_copy)
    check_readers(make(data={"validation": "scenes-val*"}), source_with_a_copy)
    assert not caplog.records


@pytest.mark.parametrize("other", [0, 1])
def test_parts_of_a_tar_are_equal_where_they_are_the_same_part(source_with_a_copy, other):
    train, validation = open_readers(make(), source_with_a_copy)
    ((ours, theirs),) = train.list_shared(validation)
    names = {ours: f"{ours}-p0000of0003", theirs: f"{theirs}-p000{other}of0003"}
    for reader in (train, validation):
        commits = reader._pairs.commits
        commits.records = tuple(
            record._replace(task=names.get(record.task, record.task)) for record in commits.records
        )
    expected = [(names[ours], names[theirs])] if other == 0 else []
    assert train.list_shared(validation) == expected


def test_a_batch_that_is_larger_than_the_data_is_told(source, caplog):
    train, _ = check_readers(make(), source)
    check_readers(make(batch_size=len(train)), source)
    assert not caplog.records
    check_readers(make(batch_size=len(train) + 1), source)
    (record,) = caplog.records
    said = f"batch_size: {len(train) + 1} pairs a step, but data.train '*train*' has {len(train)}"
    assert said in record.getMessage()


def test_draws_that_are_not_stored_are_refused(source):
    refuse(
        source,
        r"data.draws: features-\w+ stores 2 draws.*got \[0, 2\]; choose among \[0, 1\]",
        head="probe",
        data={"draws": (0, 2)},
    )
    open_readers(make(data={"draws": (0, 2)}), source)  # znet reads no features
    data = make(data={"draws": (1,)}).data
    assert list_draws(data, source.features) == (1,)


def test_a_batch_must_have_a_pair_for_every_pass():
    check_batch(make(batch_size=6, accumulate=2), num_workers=3)
    with pytest.raises(SpecError, match=r"3 workers with accumulate 2 need at least 6 pairs.*5;"):
        check_batch(make(batch_size=5, accumulate=2), num_workers=3)


def open_data(source, *, rank=0, num_workers=1, trace=None, **changes):
    config = make(head="probe", **changes)
    train, _ = open_readers(config, source)
    return TrainData(config, source, train, Worker(rank, num_workers, CPU), trace=trace)


@pytest.mark.parametrize("loader_workers", [1, 3])
def test_steps_come_in_order_whatever_reads_them(source, loader_workers):
    config = make(head="probe", accumulate=2, loader_workers=loader_workers)
    train, _ = open_readers(config, source)
    data = TrainData(config, source, train)
    first, last = 3, 3 + data.order.steps_an_epoch
    found = list(data.read_steps(first, last))
    assert [batches.step for batches in found] == list(range(first, last))
    keys = train.index["key"].to_pylist()
    for batches in found:
        share = data.order.split(batches.step)
        for part, batch in zip(share.parts, batches.passes, strict=True):
            numbers = data.order.samples_at(part, epoch=share.epoch)
            assert batch.keys == tuple(keys[number] for number in numbers)


def test_read_ahead_is_bounded_and_an_error_in_a_thread_is_raised(source, monkeypatch):
    data = open_data(source, accumulate=2, loader_workers=2)
    read, started, failing = data._reader.read, [], threading.Event()

    def count(*args, **options):
        started.append(args)
        if failing.is_set():
            raise OSError("the disk is gone")
        return read(*args, **options)

    monkeypatch.setattr(data._reader, "read", count)
    steps = data.read_steps(0, 100)
    next(steps)
    assert len(started) <= 4 + 2  # two steps of two passes, and one more being given out
    failing.set()
    with pytest.raises(OSError, match="the disk is gone"):
        list(steps)


def test_draws_are_those_of_the_config(source):
    stored = open_readers(make(head="probe"), source)[0]
    data = open_data(source, data={"draws": (1,)})
    (batches,) = data.read_steps(0, 1)
    numbers = data.order.samples_at(data.order.split(0).parts[0], epoch=0)
    expected = stored.read(numbers, draws=[1] * len(numbers)).inputs["features"]
    for block, values in batches.passes[0].inputs["features"].items():
        assert (values == expected[block]).all()


def test_traces_list_what_was_read_and_are_cut_where_a_run_goes_on(source, tmp_path):
    for rank in range(2):
        trace = trace_path(tmp_path, rank)
        for _ in open_data(source, rank=rank, num_workers=2, trace=trace).read_steps(0, 5):
            pass
    alone = open_data(source)
    for batches in alone.read_steps(0, 5):
        share = alone.order.split(batches.step)
        expected = alone.order.samples_at(np.concatenate(share.parts), epoch=share.epoch)
        assert read_pairs(tmp_path, 2)[batches.step + 1] == expected.tolist()
    with trace_path(tmp_path, 1).open("a") as file:
        file.write('{"step": 6, "pai')  # torn by a kill
    trim_traces(tmp_path, ALONE, first_step=3)
    assert sorted(read_pairs(tmp_path, 2)) == [1, 2, 3]
