"""Tars that changed after they were encoded: found at the price of the listing, and renewed."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from pipeline.encode.hash_tars import hash_tars
from pipeline.encode.prepare import prepare_encode
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.commit import read_commit
from pipeline.store.current import list_current
from pipeline.store.store import Store
from pipeline.store.task_ids import parse_part_id
from pipeline.upkeep.verify import verify_store

NAMES = ("scenes-train-00000.tar", "scenes-val-00000.tar")


@pytest.fixture(scope="module")
def spec(ldm_folder):
    return Spec(
        latents=LatentsSpec(model=str(ldm_folder), size=64),
        features=FeaturesSpec(blocks=(1,), timesteps=(300,)),
    )


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, corpus_folder, spec):
    """A corpus of two tars, and a store of it."""
    folder = tmp_path_factory.mktemp("encoded")
    (folder / "c").mkdir()
    for name in NAMES:
        shutil.copy(corpus_folder / name, folder / "c" / name)
    encode(spec, folder)
    return folder


@pytest.fixture
def work(tmp_path, encoded):
    """Both, where they were encoded, since a tar is known by its URL; restored after the test."""
    shutil.copytree(encoded, tmp_path / "kept")
    yield encoded
    shutil.rmtree(encoded)
    shutil.copytree(tmp_path / "kept", encoded)


def prepare(spec, work, **options):
    """Prepare a run; return it, and the tars that had to be hashed."""
    run = prepare_encode(spec, [str(work / "c/*.tar")], str(work / "store"), batch=8, **options)
    suspects = run.suspects
    if suspects:
        found = hash_tars(suspects, on_ray=False)
        run = run.resolve(found.digests, found.unread)
    return run, [tar.below for tar in suspects]


def encode(spec, work, **options):
    run, _ = prepare(spec, work, **options)
    stage = EncodeStage(run.config)
    return [*(failed.outcome for failed in run.failed), *map(stage.encode, run.items)]


def change_image(name, data):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.putpixel((0, 0), (255, 0, 255))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def change_mask(name, data):
    mask = np.array(Image.open(io.BytesIO(data)).convert("L"))
    row, column = np.argwhere(mask == 0)[0]
    mask[row, column] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


def rewrite(path, suffix, change):
    """Change the first member of a suffix in place; the tar keeps its size."""
    num_bytes, done = path.stat().st_size, False
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            if member.name.endswith(suffix) and not done:
                data, done = change(member.name, data), True
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert done
    return path.stat().st_size == num_bytes


def read_contents(work):
    """Mean of latents, masks and features of every pair by (key, phrase)."""
    source = open_layers(str(work / "store"))
    reader = PairReader(source, tasks="*", inputs=frozenset({"latent", "features"}), blocks=(1,))
    batch = reader.read(range(len(reader)), draws=[0] * len(reader))
    return {
        (key, phrase, number): (
            batch.inputs["latent"][number].sum().item(),
            int(batch.mask[number].sum()),
            batch.inputs["features"][1][number].float().sum().item(),
        )
        for number, (key, phrase) in enumerate(zip(batch.keys, batch.phrases, strict=True))
    }


def test_an_unchanged_corpus_is_not_read(spec, work):
    run, hashed = prepare(spec, work)
    assert (run.items, hashed) == ((), [])


def test_new_times_of_the_same_bytes_cost_one_hash_and_no_encode(spec, work):
    path = work / "c" / NAMES[0]
    os.utime(path, (1, 1))
    run, hashed = prepare(spec, work)
    assert (run.items, hashed) == ((), [NAMES[0]])
    assert prepare(spec, work)[1] == []  # the new times are kept
    for table in (work / "store").glob("*/inventory"):
        shutil.rmtree(table)
    assert prepare(spec, work)[1] == [NAMES[0]]  # in a cache


@pytest.mark.parametrize(
    ("suffix", "change"), [(".jpg", change_image), (".mask0.png", change_mask)]
)
def test_a_changed_tar_fails_alone_and_is_renewed_on_request(spec, work, suffix, change):
    """One pixel, or one pixel of a mask; the phrases are equal."""
    before = read_contents(work)
    rewrite(work / "c" / NAMES[0], suffix, change)
    (failed,) = encode(spec, work)
    assert (failed.status, failed.cause) == ("failed", "changed")
    assert "the tar changed since it was encoded" in failed.error
    assert "--changed renew" in failed.error
    assert read_contents(work) == before
    (renewed,) = encode(spec, work, changed="renew")
    assert renewed.status == "committed"
    after = read_contents(work)
    assert after.keys() == before.keys()
    different = [pair for pair in before if after[pair] != before[pair]]
    assert len({key for key, *_ in different}) == 1  # one image's pairs, in latents or masks
    place = 0 if suffix == ".jpg" else 1
    assert all(after[pair][place] != before[pair][place] for pair in different)
    assert prepare(spec, work)[0].items == ()
    assert [check.damage for check in verify_store(Store.open(str(work / "store")))] == [[]] * 4


def test_features_of_an_older_content_are_never_joined(spec, work):
    """Latents that were renewed alone: readers say so, and encode makes the features."""
    rewrite(work / "c" / NAMES[0], ".jpg", change_image)
    latents = spec.model_copy(update={"features": None})
    assert [outcome.status for outcome in encode(latents, work, changed="renew")] == ["committed"]
    with pytest.raises(ValueError, match="has latents but no features of the same content"):
        read_contents(work)
    (item,) = prepare(spec, work)[0].items
    assert (item.latents, item.features, item.next_features) == (1, None, 1)
    encode(spec, work)
    assert len(read_contents(work)) > 0


def test_a_changed_tar_may_be_kept_unread(spec, work):
    rewrite(work / "c" / NAMES[0], ".jpg", change_image)
    for options in ({"changed": "keep"}, {}):
        run = prepare(spec, work, **options)[0]
        assert (run.items, run.failed, run.missing.num_kept) == ((), (), 1)
    (failed,) = prepare(spec, work, rehash=True)[0].failed
    assert failed.outcome.cause == "changed"
    assert [item.renews for item in prepare(spec, work, changed="renew")[0].items] == [True]


def test_rehash_finds_what_no_mark_tells(spec, work):
    path = work / "c" / NAMES[0]
    there = path.stat()
    data = bytearray(path.read_bytes())
    data[600] ^= 1  # within the first member
    path.write_bytes(data)
    os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns))
    assert prepare(spec, work)[0].items == ()
    run, hashed = prepare(spec, work, rehash=True)
    assert hashed == list(NAMES)
    assert [failed.outcome.cause for failed in run.failed] == ["changed"]
    assert len(prepare(spec, work)[0].failed) == 1  # what was found is not forgotten


@pytest.mark.thorough
def test_a_part_that_a_renewal_lacks_is_encoded_and_one_of_it_repaired(spec, work, tmp_path):
    """Killed after the first encode's first part, and after the renewal's second."""
    spec = spec.model_copy(update={"features": None})
    path, store = work / "c" / NAMES[0], Store.open(str(tmp_path / "split"))
    split_bytes = path.stat().st_size // 3 + 1

    def encode_parts(*parts, **options):
        work = prepare_encode(spec, [str(path)], store.storage.url, batch=8, **options)
        if work.suspects:
            found = hash_tars(work.suspects, on_ray=False)
            work = work.resolve(found.digests, found.unread)
        stage = EncodeStage(work.config)
        items = [item for item in work.items if not parts or item.task.part in parts]
        outcomes = [*(x.outcome for x in work.failed), *map(stage.encode, items)]
        return [outcome.error or outcome.status for outcome in outcomes]

    def list_read():
        (layer,) = store.list_layers()
        found = list_current(store, layer.folder).current.values()
        commits = [read_commit(store.storage, layer.folder, record) for record in found]
        assert len({commit.source.sha256 for commit in commits}) == 1
        return {parse_part_id(commit.task)[1] for commit in commits}

    def find_damage():
        return [damage for check in verify_store(store) for damage in check.damage]

    assert encode_parts(0, split_bytes=split_bytes) == ["committed"]
    rewrite(path, ".jpg", change_image)
    assert encode_parts(1, changed="renew") == ["committed"]
    assert list_read() == {1}  # of two contents of one part each the later
    assert all("--changed renew" in error for error in encode_parts())
    assert encode_parts(0, changed="renew") == ["committed"]
    assert list_read() == {0, 1}
    assert encode_parts(changed="renew") == ["committed"]
    assert list_read() == {0, 1, 2}
    assert find_damage() == []
    next(store.storage.root.glob("*/data/*p0000of*/0001-*/index.parquet")).write_bytes(b"")
    assert encode_parts(damage=find_damage()) == ["committed"]  # the pin is of the first content
    assert list_read() == {0, 1, 2}
    assert find_damage() == []


def test_a_new_tar_beside_a_changed_one_is_encoded(spec, work, corpus_folder):
    rewrite(work / "c" / NAMES[0], ".jpg", change_image)
    shutil.copy(corpus_folder / "scenes-train-00001.tar", work / "c" / "new.tar")
    assert sorted(outcome.status for outcome in encode(spec, work)) == ["committed", "failed"]


def test_a_renamed_tar_is_a_new_task_and_the_old_one_is_told(spec, work):
    (work / "c" / NAMES[0]).rename(work / "c" / "renamed.tar")
    run, _ = prepare(spec, work)
    assert [item.task.below for item in run.items] == ["renamed.tar"]
    assert "the store has 1 task of other tars; where one was renamed" in run.describe()


def move(work, spec, folder):
    """Move the corpus to another folder and have the tars there found; return the folder."""
    (work / "c").rename(work / folder)
    assert at(spec, work, f"{folder}/*.tar").items == ()
    return work / folder


def at(spec, work, *patterns, **options):
    """Prepare a run over tars at other places."""
    places = [str(work / pattern) for pattern in patterns]
    run = prepare_encode(spec, places, str(work / "store"), batch=8, **options)
    if run.suspects:
        found = hash_tars(run.suspects, on_ray=False)
        run = run.resolve(found.digests, found.unread)
    return run


def test_a_tar_that_moved_is_known_at_its_new_place_whatever_the_root(spec, work):
    move(work, spec, "e")
    (work / "f").mkdir()
    shutil.copy(work / "e" / NAMES[0], work / "f" / "more.tar")
    run = at(spec, work, "e/*.tar", "f/*.tar")
    assert [item.task.url.rsplit("/", 1)[1] for item in run.items] == ["more.tar"]


def test_a_copy_that_changes_is_the_changed_tar_while_the_first_is_still_there(spec, work):
    shutil.copytree(work / "c", work / "p")
    assert at(spec, work, "p/*.tar").items == ()
    rewrite(work / "p" / NAMES[0], ".jpg", change_image)
    run = at(spec, work, "p/*.tar")
    assert (run.items, [failed.outcome.cause for failed in run.failed]) == ((), ["changed"])


def test_another_dataset_is_not_taken_for_one_that_moved(spec, work, corpus_folder):
    move(work, spec, "e")
    (work / "h").mkdir()
    shutil.copy(corpus_folder / "scenes-train-00001.tar", work / "h" / NAMES[0])
    run = at(spec, work, "h/*.tar")
    assert (run.failed, [item.next_latents for item in run.items]) == ((), [0])


@pytest.mark.parametrize(
    "options", [{"root": "x"}, {"limit": 1}, {"rehash": True}, {"changed": "renew"}]
)
def test_what_is_about_tars_needs_a_corpus(spec, work, options):
    with pytest.raises(ValueError, match="--corpus: expected the tars that --root"):
        prepare_encode(spec, None, str(work / "store"), batch=8, **options)


def test_a_renewal_in_parts_that_was_killed_is_completed_by_one_rerun(
    tmp_path, corpus_folder, spec
):
    """Killed when the first part had its latents and not its features."""
    (tmp_path / "c").mkdir()
    shutil.copy(corpus_folder / NAMES[0], tmp_path / "c" / NAMES[0])
    outcomes = encode(spec, tmp_path, split_bytes=15_000)
    assert len(outcomes) == 3
    rewrite(tmp_path / "c" / NAMES[0], ".jpg", change_image)
    encode(spec, tmp_path, changed="renew")
    newer = sorted((tmp_path / "store").glob("*/commits/*.0001.json"))
    first = next(path for path in newer if "latents-" in str(path) and "-p0000" in path.name)
    for path in set(newer) - {first}:
        path.unlink()
    for inventory in (tmp_path / "store").glob("*/inventory"):
        shutil.rmtree(inventory)
    outcomes = encode(spec, tmp_path, changed="renew")
    assert [outcome.status for outcome in outcomes] == ["committed"] * 3
    assert prepare(spec, tmp_path)[0].items == ()
    assert len(read_contents(tmp_path)) > 0
