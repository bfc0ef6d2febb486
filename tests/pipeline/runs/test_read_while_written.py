"""A checkpoint that is read while its run replaces and prunes it is one of them, whole."""

import shutil
import threading
from contextlib import contextmanager

import pytest

from pipeline.base.yaml import SpecError
from pipeline.runs.checkpoint import (
    BEST,
    MODEL,
    RECORD,
    DamagedCheckpointError,
    find_checkpoint,
    load_checkpoint,
    read_record,
)
from pipeline.runs.checkpoint_writer import CheckpointWriter
from pipeline.runs.step_folders import publish_folder, read_steady
from tests.pipeline.runs.test_checkpoint_writer import (  # noqa: F401  layers: a fixture
    layers,
    list_weights,
    make_head,
    make_record,
    save_steps,
)

NUM_READS = 60


@contextmanager
def repeating(act):
    """Have a thread call ``act`` with 1, 2, … in the block; raise what it raised."""
    over, errors = threading.Event(), []

    def repeat():
        number = 1
        try:
            while not over.is_set():
                act(number)
                number += 1
        except BaseException as error:  # noqa: BLE001  raised below
            errors.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if errors:
        raise errors[0]


def check(head, record):
    assert all((value == record.step).all() for value in head.parameters())


@pytest.mark.parametrize("linked", [True, False])
def test_the_best_and_the_newest_are_read_while_they_are_replaced(tmp_path, layers, linked):  # noqa: F811
    """Each save makes another the best and removes the one before."""
    writer = CheckpointWriter(tmp_path, num_kept=1, first_step=0)

    def save(number):
        head = make_head(number)
        writer.save(head, make_record(layers, number), list_weights(head), best=linked)
        writer.wait()

    save(1)
    place = tmp_path / BEST if linked else tmp_path
    with repeating(lambda number: save(number + 1)):
        seen = set()
        for _ in range(NUM_READS):
            head, record = load_checkpoint(place)
            check(head, record)
            seen.add(record.step)
            if linked:  # a step's own folder may be pruned before it is read
                read_record(place)
            find_checkpoint(tmp_path)
        while len(seen) < 3:
            seen.add(load_checkpoint(place)[1].step)
    writer.close()


def test_a_step_is_read_while_another_of_the_same_step_replaces_it(tmp_path, layers):  # noqa: F811
    variants = []
    for fill in (0, 1):
        out = tmp_path / f"variant-{fill}"
        head = make_head(fill)
        writer = CheckpointWriter(out, num_kept=1, first_step=0)
        record = make_record(layers, 1, loop={"fill": fill})
        writer.save(head, record, list_weights(head), best=False)
        writer.close()
        variants.append(find_checkpoint(out))
    folder = tmp_path / "checkpoints" / "step-000001"
    shutil.copytree(variants[0], folder)

    def replace(number):
        written = folder.with_name(f".new-{number}")
        shutil.copytree(variants[number % 2], written)
        publish_folder(written, folder)

    with repeating(replace):
        for _ in range(NUM_READS):
            head, record = load_checkpoint(folder)
            assert all((value == record.loop["fill"]).all() for value in head.parameters())
            assert read_record(folder).step == 1


@pytest.mark.parametrize("name", [MODEL, RECORD, "config.json"])
def test_what_is_damaged_is_told_at_once(tmp_path, layers, monkeypatch, name):  # noqa: F811
    """Also through the link, by one reading."""
    save_steps(tmp_path, layers, [1], best=[1])
    path = tmp_path / BEST / name
    path.write_bytes(path.read_bytes()[:-9])
    monkeypatch.setattr("pipeline.runs.step_folders._MAX_TRIES", 1)
    for place in (tmp_path / BEST, tmp_path, find_checkpoint(tmp_path)):
        with pytest.raises(DamagedCheckpointError, match=name):
            load_checkpoint(place)
    monkeypatch.undo()
    tries = []

    def read(folder):
        tries.append(folder)
        raise DamagedCheckpointError(name)

    with pytest.raises(DamagedCheckpointError):
        read_steady(lambda: find_checkpoint(tmp_path), read)
    assert len(tries) == 1


def test_a_checkpoint_that_was_pruned_is_no_checkpoint(tmp_path, layers):  # noqa: F811
    save_steps(tmp_path, layers, [1, 2, 3], num_kept=1)
    with pytest.raises(SpecError, match="step-000001: expected a checkpoint"):
        load_checkpoint(tmp_path / "checkpoints" / "step-000001")
