"""A tar encoded whole and the same tar in three parts: one corpus, pair for pair."""

import io
import shutil
import tarfile
from contextlib import closing

import numpy as np
import pytest
import torch

from pipeline.corpus.parts import pin_path, pin_source, read_pin
from pipeline.corpus.tasks import list_tasks
from pipeline.encode.hash_tars import hash_tars
from pipeline.encode.prepare import prepare_encode
from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.scenes.scene import write_corpus
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.layout import REJECTS
from pipeline.store.snapshot import create_snapshot
from pipeline.store.store import Store
from pipeline.upkeep.gc import list_orphans
from pipeline.upkeep.inspect import inspect_store
from pipeline.upkeep.verify import verify_store

pytestmark = pytest.mark.thorough

SIZE_PX = 64
NUM_SAMPLES = 6


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    """Six scenes, an image that is none, a sample without text, a symlink."""
    folder = tmp_path_factory.mktemp("split")
    write_corpus(folder, split="train", num_images=NUM_SAMPLES, images_per_tar=9, size_px=SIZE_PX)
    (path,) = folder.glob("*.tar")
    with tarfile.open(path, "a") as tar:
        for name in ("x.jpg", "x.json", "x.mask0.png", "y.jpg", "notes.pdf"):
            member = tarfile.TarInfo(name)
            data = b'{"phrases": ["a"]}' if name.endswith("json") else b"none"
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("z.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "x.jpg"
        tar.addfile(link)
    return path


@pytest.fixture(scope="module")
def spec(ldm_folder):
    """Batches of one row and random timesteps: any difference is one of the split."""
    return Spec(
        latents=LatentsSpec(
            model=str(ldm_folder), size=SIZE_PX, crop="phrase", views=2, keep_image=True
        ),
        features=FeaturesSpec(blocks=(6,), timesteps={"low": 0, "high": 1000, "draws": 2}),
    )


def prepare(spec, tar, folder, **options):
    """Prepare a run; hash the tar if its marks changed."""
    run = prepare_encode(spec, [str(tar)], str(folder), batch=1, **options)
    if run.suspects:
        found = hash_tars(run.suspects, on_ray=False)
        run = run.resolve(found.digests, found.unread)
    return run


def encode(stage, items):
    """The status of each item's outcome; several are under way at once."""
    return [outcome.result().status for outcome in [stage.submit(item) for item in items]]


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tar, spec):
    """The tar whole, and in three parts."""
    folders = [tmp_path_factory.mktemp("stores") / name for name in ("whole", "split")]
    for folder, split_bytes in zip(folders, (None, -(-tar.stat().st_size // 3)), strict=True):
        run = prepare(spec, tar, folder, split_bytes=split_bytes)
        with closing(EncodeStage(run.config)) as stage:
            assert set(encode(stage, run.items)) == {"committed"}
    return [Store.open(str(folder)) for folder in folders]


def read_commits(store, kind):
    layer = next(layer for layer in store.list_layers() if layer.kind == kind)
    return list(store.newest_commits(layer.folder).values())


def test_parts_are_commits_of_one_tar(stores, tar):
    whole, parts = (read_commits(store, "latents") for store in stores)
    (task,) = list_tasks([str(tar)])
    assert [commit.task for commit in whole] == [task.id]
    assert [commit.task for commit in parts] == [f"{task.id}-p000{i}of0003" for i in range(3)]
    assert {commit.source for commit in parts} == {whole[0].source}


def test_parts_and_no_whole_tar_are_pinned(stores, tar):
    whole, parts = (read_commits(store, "latents") for store in stores)
    (task,) = list_tasks([str(tar)])
    source = parts[0].source
    pin = read_pin(stores[1].storage, parts[0].layer, task.id)
    assert (pin.sha256, pin.num_bytes) == (source.sha256, source.num_bytes)
    assert not stores[0].storage.exists(f"{whole[0].layer}/sources")


def test_accounting_and_rejects_of_the_parts_are_the_tars(stores):
    whole, parts = (read_commits(store, "latents") for store in stores)
    names = ("samples", "stored_samples", "rejected_samples", "rejected_members")
    sums = {name: sum(getattr(part.accounting, name) for part in parts) for name in names}
    assert sums == {name: getattr(whole[0].accounting, name) for name in names}
    assert sums == {
        "samples": NUM_SAMPLES + 2, "stored_samples": NUM_SAMPLES,
        "rejected_samples": 2, "rejected_members": 2,
    }  # fmt: skip
    assert sum(part.accounting.stored_samples > 0 for part in parts) == 3
    tables = [stores[0].read_parquet(whole[0], REJECTS).to_pylist()]
    tables.append([r for p in parts for r in stores[1].read_parquet(p, REJECTS).to_pylist()])
    assert tables[0] == tables[1]


def test_pairs_and_values_of_the_parts_are_the_tars(stores):
    readers = []
    for store in stores:
        latents, features = store.list_layers()
        snapshot = create_snapshot(store, [latents.folder, features.folder], write=False)
        source = Source(store, latents, features, snapshot)
        inputs = frozenset({"latent", "text", "image", "features"})
        readers.append(PairReader(source, tasks="*", inputs=inputs, blocks=(6,)))
    num = len(readers[0])
    assert num == len(readers[1]) > NUM_SAMPLES
    draws = [number % 2 for number in range(num)]
    ours, theirs = (reader.read(list(range(num)), draws=draws) for reader in readers)
    assert (ours.keys, ours.phrases) == (theirs.keys, theirs.phrases)
    assert torch.equal(ours.mask, theirs.mask)
    torch.testing.assert_close(ours.inputs, theirs.inputs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["latents", "features"])
def test_stored_rows_are_the_same_in_the_same_order(stores, kind):
    rows = []
    for store in stores:
        layer = next(layer for layer in store.list_layers() if layer.kind == kind)
        names = ("latent_mean", "latent_logvar", "image", "mask") if kind == "latents" else (
            "block06", "timestep",
        )  # fmt: skip
        arrays = {name: [] for name in names}
        for commit in read_commits(store, kind):
            for name in names:
                array = store.open_array(layer, commit, name)
                arrays[name].append(array.read_rows(range(array.num_rows)))
        rows.append({name: np.concatenate(values) for name, values in arrays.items()})
    for name in rows[0]:
        np.testing.assert_array_equal(rows[0][name], rows[1][name], err_msg=name)


def test_verify_inspect_and_gc_take_parts_as_tasks(stores):
    store = stores[1]
    checks = list(verify_store(store))
    assert (len(checks), [damage for check in checks for damage in check.damage]) == (6, [])
    assert list(list_orphans(store)) == []
    assert [layer.kind for layer in store.list_layers()] == ["latents", "features"]
    whole, split = (inspect_store(store.storage.url)[0] for store in stores)
    assert (whole.num_tasks, split.num_tasks) == (1, 3)
    assert whole.rows["pairs"] == split.rows["pairs"]


def test_a_later_run_takes_the_split_from_the_layer(stores, tar, spec):
    for store, num in zip(stores, (1, 3), strict=True):
        run = prepare(spec, tar, store.storage.url)
        assert (run.num_tasks, run.items) == (num, ())


def write_anew(tar):
    """Alter a byte of a tar after its head: only the SHA-256 of all of it tells."""
    data = bytearray(tar.read_bytes())
    data[data.rindex(b"none")] ^= 1
    tar.write_bytes(data)


def test_a_part_of_a_tar_that_was_written_anew_is_refused(tmp_path, tar, spec):
    """In the run that committed the first part, and in a later one that lists the tar anew."""
    copy, latents = tmp_path / "copy.tar", Spec(latents=spec.latents)
    shutil.copy(tar, copy)
    run = prepare(latents, copy, tmp_path / "store", split_bytes=-(-tar.stat().st_size // 3))
    with closing(EncodeStage(run.config)) as stage:
        assert encode(stage, run.items[:1]) == ["committed"]
        write_anew(copy)
        for item in run.items[1:]:
            outcome = stage.encode(item)
            assert outcome.status == "failed"
            assert outcome.error.startswith("SourceChangedError")
            assert f"{run.items[0].task.id} is committed: bring that tar back" in outcome.error
        later = prepare(latents, copy, tmp_path / "store")
        assert (later.items, len(later.failed)) == ((), 3)
        assert {failed.outcome.cause for failed in later.failed} == {"changed"}
        copy.write_bytes(tar.read_bytes())
        later = prepare(latents, copy, tmp_path / "store")
        assert encode(stage, later.items) == ["committed"] * 2
    store = Store.open(str(tmp_path / "store"))
    assert [d for check in verify_store(store) for d in check.damage] == []


def test_a_tar_rewritten_before_anything_of_it_was_committed(tmp_path, tar, spec):
    """Its parts fail until the file that their error names is removed."""
    copy, latents = tmp_path / "copy.tar", Spec(latents=spec.latents)
    shutil.copy(tar, copy)
    run = prepare(latents, copy, tmp_path / "store", split_bytes=-(-tar.stat().st_size // 3))
    store = Store.open(str(tmp_path / "store"))
    task = run.items[0].task
    pin_source(store.storage, run.config.latents.folder, task, "0" * 64)  # as one killed later on
    with closing(EncodeStage(run.config)) as stage:
        outcome = stage.encode(run.items[1])
        path = pin_path(run.config.latents.folder, task.tar_id)
        assert "no part is committed yet: bring that tar back, or, if" in outcome.error
        assert f"remove {path} from the store" in outcome.error
        store.storage.remove_tree(path)
        assert encode(stage, run.items) == ["committed"] * 3


def test_a_part_is_repaired_alone(tmp_path, tar, spec):
    folder, latents = tmp_path / "store", Spec(latents=spec.latents)
    tar = shutil.copy(tar, tmp_path / "copy.tar")
    run = prepare(latents, tar, folder, split_bytes=-(-tar.stat().st_size // 3))
    with closing(EncodeStage(run.config)) as stage:
        encode(stage, run.items)
        commit = read_commits(Store.open(str(folder)), "latents")[1]
        path = folder / commit.data_folder / "index.parquet"
        path.write_bytes(path.read_bytes()[:-1])
        damage = [d for check in verify_store(Store.open(str(folder))) for d in check.damage]
        run = prepare(latents, tar, folder, damage=damage)
        assert [item.task.id for item in run.items] == [commit.task]
        good = tar.read_bytes()
        write_anew(tar)
        outcome = stage.encode(run.items[0])
        tar.write_bytes(good)
        assert "expected the tar that was encoded or listed, SHA-256 " in outcome.error
        assert encode(stage, run.items) == ["committed"]
    assert [d for check in verify_store(Store.open(str(folder))) for d in check.damage] == []
    assert [c.generation for c in read_commits(Store.open(str(folder)), "latents")] == [0, 1, 0]
