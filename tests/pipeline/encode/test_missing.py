"""What an encode run has to do: tasks not committed, damaged, or not to be read."""

import re
from dataclasses import replace

import pytest

import pipeline.corpus.known_tars
from pipeline.corpus.tasks import list_tasks, split_tasks
from pipeline.stage.work import WorkItem
from pipeline.store.commit import list_records, read_commit, record_path, seal_record
from pipeline.store.store import Store
from pipeline.upkeep.verify import Damage
from tests.support.missing import list_missing


@pytest.fixture
def store(copied_store):
    return Store.open(str(copied_store))


@pytest.fixture
def layers(store):
    return store.list_layers()


@pytest.fixture
def tasks(corpus_folder):
    return list_tasks([str(corpus_folder / "*.tar")])


def remove_record(store, layer, task, generation=0):
    path = store.storage.root / record_path(layer.folder, task.id, generation)
    data = path.read_bytes()
    path.unlink()
    return path, data


def damage_of(layer, task, generation=0):
    return Damage(layer.folder, task.id, generation, "path", "what")


def test_an_empty_store_lacks_everything(tmp_path, layers, tasks):
    store = Store.open(str(tmp_path / "empty"))
    assert list_missing(store, *layers, tasks) == [WorkItem(task, None, None) for task in tasks]
    assert not (tmp_path / "empty").exists()


def test_a_full_store_lacks_nothing(store, layers, tasks):
    assert list_missing(store, *layers, tasks) == []
    assert list_missing(store, layers[0], None, tasks) == []


def test_a_layer_that_lacks_a_task_is_named(store, layers, tasks):
    remove_record(store, layers[1], tasks[1])
    assert list_missing(store, *layers, tasks) == [WorkItem(tasks[1], 0, None)]
    assert list_missing(store, layers[0], None, tasks) == []
    remove_record(store, layers[0], tasks[2])
    assert list_missing(store, *layers, tasks) == [
        WorkItem(tasks[1], 0, None),
        WorkItem(tasks[2], None, 0),
    ]


def test_only_the_tasks_asked_for(store, layers, tasks):
    remove_record(store, layers[1], tasks[1])
    assert list_missing(store, *layers, [tasks[0], tasks[2]]) == []


@pytest.mark.parametrize("kinds", [(0,), (1,), (0, 1)])
def test_what_is_damaged_is_missing_and_goes_to_the_next_generation(store, layers, tasks, kinds):
    damage = [damage_of(layers[kind], tasks[0]) for kind in kinds]
    (item,) = list_missing(store, *layers, tasks, damage=damage * 2)
    there = [None if kind in kinds else 0 for kind in range(2)]
    after = [1 if kind in kinds else 0 for kind in range(2)]
    assert item == WorkItem(tasks[0], *there, *after)


def test_damage_that_was_repaired_is_no_work(store, layers, tasks):
    """The same report twice; and one of a later generation than there is."""
    path, data = remove_record(store, layers[1], tasks[0])
    path.write_bytes(data)
    newer = path.with_name(path.name.replace(".0000.", ".0001."))
    newer.write_bytes(data.replace(b'"generation": 0', b'"generation": 1'))
    for generation in (0, 2):
        damage = [damage_of(layers[1], tasks[0], generation)]
        assert list_missing(store, *layers, tasks, damage=damage) == []
    (item,) = list_missing(store, *layers, tasks, damage=[damage_of(layers[1], tasks[0], 1)])
    assert item == WorkItem(tasks[0], 0, None, 0, 2)


def test_damage_elsewhere_is_said(store, layers, tasks, caplog):
    others = [damage_of(layers[0], tasks[2]), Damage("features-0", tasks[0].id, 0, "", "")]
    assert list_missing(store, *layers, tasks[:2], damage=others) == []
    assert "2 damaged tasks of the report are not of this run's spec and corpus" in caplog.text
    caplog.clear()
    list_missing(store, *layers, tasks, damage=[damage_of(layers[0], tasks[2])])
    assert caplog.text == ""


def test_a_record_that_cannot_be_read_is_a_fault_of_its_task_alone(store, layers, tasks):
    path, _ = remove_record(store, layers[0], tasks[0])
    path.write_text("{")
    remove_record(store, layers[1], tasks[1])
    broken, other = list_missing(store, *layers, tasks)
    assert (broken.task, broken.status) == (tasks[0].id, "failed")
    assert re.search(rf"{path.name}: the commit record cannot be read", broken.error)
    assert other == WorkItem(tasks[1], 0, None)
    # With features missing too it is the same fault; named in a report it is work.
    remove_record(store, layers[1], tasks[0])
    assert list_missing(store, *layers, tasks)[0].error == broken.error
    (item, _) = list_missing(store, *layers, tasks, damage=[damage_of(layers[0], tasks[0])])
    assert item == WorkItem(tasks[0], None, None, next_latents=1)


def test_a_tar_of_another_corpus_with_the_same_path_gets_an_id_of_its_own(
    tmp_path, store, layers, tasks
):
    copy = tmp_path / "x.tar"
    copy.write_bytes(b"other")
    (item,) = list_missing(store, *layers, [replace(tasks[0], url=copy.as_uri(), num_bytes=5)])
    assert (item.task.id != tasks[0].id, item.latents) == (True, None)


def test_a_tar_that_moved_with_its_bytes_is_the_same(tmp_path, store, layers, tasks, corpus_folder):
    copy = tmp_path / "x.tar"
    copy.write_bytes((corpus_folder / tasks[0].url.rsplit("/", 1)[1]).read_bytes())
    assert list_missing(store, *layers, [replace(tasks[0], url=copy.as_uri())]) == []


def test_a_tar_is_known_by_its_url_under_another_id(store, layers, tasks):
    assert list_missing(store, *layers, [replace(tasks[0], id="other")]) == []


NUM_PARTS = 3


@pytest.fixture
def parts(tasks):
    """Every tar as three parts."""
    return split_tasks(tasks, -(-tasks[0].num_bytes // NUM_PARTS))


@pytest.fixture
def split_store(store, layers, tasks, parts):
    """The store as if its tars had been encoded in parts: records alone, no data."""
    for layer in layers:
        for task, record in list_records(store.storage, layer.folder).items():
            commit = read_commit(store.storage, layer.folder, record)
            (store.storage.root / commit.name).unlink()
            for part in parts:
                if part.tar_id == task:
                    copy = commit.model_copy(update={"task": part.id, "files": ()})
                    text = copy.model_dump_json(indent=1).encode()
                    store.storage.create(copy.name, seal_record(text))
    return store


def test_parts_are_tasks(split_store, layers, tasks, parts):
    assert len(parts) == 9
    assert list_missing(split_store, *layers, tasks) == []
    remove_record(split_store, layers[0], parts[4])
    remove_record(split_store, layers[1], parts[8])
    assert list_missing(split_store, *layers, tasks) == [
        WorkItem(parts[4], None, 0),
        WorkItem(parts[8], 0, None),
    ]


def test_a_part_is_repaired_alone(split_store, layers, tasks, parts):
    remove_record(split_store, layers[0], parts[1])
    damage = [damage_of(layers[0], parts[0])]
    assert list_missing(split_store, *layers, tasks, damage=damage) == [
        WorkItem(parts[0], None, 0, 1),
        WorkItem(parts[1], None, 0),
    ]


def test_a_moved_tars_head_is_read_once_for_all_its_parts(
    tmp_path, split_store, layers, tasks, corpus_folder, monkeypatch
):
    read, heads = pipeline.corpus.known_tars.digest_head, []

    def count(task):
        heads.append(task.url)
        return read(task)

    monkeypatch.setattr(pipeline.corpus.known_tars, "digest_head", count)
    copy = tmp_path / "x.tar"
    copy.write_bytes((corpus_folder / tasks[0].url.rsplit("/", 1)[1]).read_bytes())
    moved = replace(tasks[0], url=copy.as_uri())
    assert list_missing(split_store, *layers, [moved, *tasks[1:]]) == []
    assert heads == [copy.as_uri()]


def test_a_tar_keeps_the_parts_that_it_was_committed_in(store, layers, tasks, request):
    """Whatever the layer would split it into now."""
    split = [layers[0].model_copy(update={"split_bytes": 1024}), layers[1]]
    assert list_missing(store, *split, tasks) == []
    store = request.getfixturevalue("split_store")
    assert list_missing(store, *layers, tasks) == []
