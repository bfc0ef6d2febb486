"""The reader: batches are what the store holds, and what is missing or damaged is an error."""

import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr

from models.ldm.quantize import dequantize_int8
from pipeline.base.yaml import SpecError
from pipeline.encode.prepare import prepare_encode
from pipeline.read.batch import PairBatch, move_inputs
from pipeline.read.choice import PairChoice
from pipeline.read.reader import PairReader
from pipeline.read.source import Source, open_layers
from pipeline.spec.fields import FeaturesSpec
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.commit import DamagedStoreError
from pipeline.store.store import MissingStoreError, Store
from pipeline.store.task_ids import describe_unmatched

ALL = frozenset({"latent", "text", "image", "features"})


@pytest.fixture
def source(store_folder, tmp_path):
    shutil.copytree(store_folder, tmp_path / "store")
    return open_layers(str(tmp_path / "store"))


def test_a_batch_is_what_plain_zarr_reads(source):
    reader = PairReader(source, tasks="*train*", inputs=ALL, blocks=(6, 10))
    numbers = [len(reader) - 1, 0, 5]
    batch = reader.read(numbers, draws=[1, 0, 1])
    assert batch.inputs["features"][10].dtype == torch.float16
    moved = move_inputs(batch.inputs, torch.device("cpu"))
    assert moved["features"][10].dtype == torch.float32
    row = 0
    commits = source.store.newest_commits(source.latents.folder)
    over = source.store.newest_commits(source.features.folder)
    for task in (task for task in commits if "train" in task):
        arrays, features = (
            zarr.open_group(source.store.storage.root / c.data_folder / "arrays.zarr", mode="r")
            for c in (commits[task], over[task])
        )
        index = source.store.read_index(commits[task]).to_pylist()
        for i, pair in enumerate(index):
            for place, (number, draw) in enumerate(zip(numbers, [1, 0, 1], strict=True)):
                if number == row:
                    latent = arrays["latent_mean"][pair["latent_row"]].astype(np.float32)
                    scaled = torch.from_numpy(latent) * source.latents.scaling_factor
                    assert torch.equal(batch.inputs["latent"][place], scaled)
                    text = torch.from_numpy(arrays["text"][pair["text_row"]]).float()
                    assert torch.equal(batch.inputs["text"][place], text)
                    image = torch.from_numpy(arrays["image"][pair["latent_row"]])
                    assert torch.equal(batch.inputs["image"][place], image)
                    feature = torch.from_numpy(features["block10"][i, draw])
                    assert torch.equal(batch.inputs["features"][10][place], feature)
                    assert torch.equal(moved["features"][10][place], feature.float())
                    mask = torch.from_numpy(arrays["mask"][i])
                    assert torch.equal(batch.mask[place], mask)
                    assert (batch.keys[place], batch.phrases[place]) == (
                        pair["key"],
                        pair["phrase"],
                    )
            row += 1
    assert row == len(reader)
    assert sorted(batch.inputs["features"]) == [6, 10]


def test_a_task_that_was_read_once_costs_its_chunks_alone(source, monkeypatch):
    """However many tasks lie between, of whose records few are kept."""
    monkeypatch.setattr("pipeline.read.commits._NUM_KEPT", 1)
    reader = PairReader(source, tasks="*", inputs=ALL, blocks=(6, 10))
    numbers, draws = range(len(reader)), [0, 1] * (len(reader) // 2) + [0] * (len(reader) % 2)
    first = reader.read(numbers, draws=draws)
    assert first.keys
    for name in ("read", "read_range", "size"):  # whatever but a chunk needs
        monkeypatch.setattr(source.store.storage, name, None)
    again = reader.read(numbers, draws=draws)
    assert (again.keys, again.phrases) == (first.keys, first.phrases)
    assert torch.equal(again.mask, first.mask)
    for name in ("latent", "text", "image"):
        assert torch.equal(again.inputs[name], first.inputs[name])
    for block in (6, 10):
        assert torch.equal(again.inputs["features"][block], first.inputs["features"][block])


def test_keys_and_phrases_are_read_where_they_are_asked_for(source, monkeypatch):
    reader = PairReader(source, tasks="*", inputs=frozenset({"features"}), blocks=(6,))
    batch = reader.read([3, 0], draws=[0, 0])
    expected = reader.index.take([3, 0]).to_pydict()
    taken = pickle.loads(pickle.dumps(batch))
    assert type(taken) is PairBatch
    for one in (batch, taken):
        assert (one.keys, one.phrases) == (tuple(expected["key"]), tuple(expected["phrase"]))
    monkeypatch.setattr(Store, "read_index", None)
    fresh = PairReader(source, tasks="*", inputs=frozenset({"features"}), blocks=(6,))
    without = fresh.read([3, 0], draws=[0, 0], texts=False)
    assert torch.equal(without.mask, batch.mask)
    assert (without.keys, without.phrases) == ((), ())


def test_only_what_is_asked_for_is_read(source):
    """With every other file gone, a reader of latents alone does not notice."""
    for path in source.store.storage.root.rglob("c"):
        if path.is_dir() and path.parent.name not in ("latent_mean", "mask"):
            shutil.rmtree(path)
    reader = PairReader(source, tasks="*", inputs=frozenset({"latent"}))
    assert sorted(reader.read([0, 1], draws=[0, 0]).inputs) == ["latent"]
    with pytest.raises(DamagedStoreError, match="text/c/0/0/0: a committed shard is missing"):
        PairReader(source, tasks="*", inputs=frozenset({"text"})).read([0], draws=[0])


@pytest.mark.parametrize("array", ["latent_mean", "mask", "block07"])
def test_a_flipped_byte_is_an_error_with_file_and_row(source, array):
    reader = PairReader(source, tasks="*val*", inputs=ALL, blocks=(7,))
    reader.read(range(len(reader)), draws=[1] * len(reader))
    layer = source.features if array.startswith("block") else source.latents
    commit = next(c for t, c in source.store.newest_commits(layer.folder).items() if "val" in t)
    folder = source.store.storage.root / commit.data_folder / "arrays.zarr" / array
    (path,) = (path for path in (folder / "c").rglob("*") if path.is_file())
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)
    reader = PairReader(source, tasks="*val*", inputs=ALL, blocks=(7,))
    with pytest.raises(DamagedStoreError, match=rf"{array}/c/0.*row \d+.*CRC-32C differs"):
        reader.read(list(range(len(reader))) * 2, draws=[0] * len(reader) + [1] * len(reader))


def test_draws_are_those_of_the_features_that_are_read(source):
    with_features = PairReader(source, tasks="*", inputs=frozenset({"features"}), blocks=(6,))
    assert with_features.num_draws == source.features.features.num_draws == 2
    assert PairReader(source, tasks="*", inputs=frozenset({"latent"})).num_draws == 1


def test_int8_and_empty_condition_read_back_as_float(tmp_path, corpus_folder, spec):
    features = FeaturesSpec(blocks=(8,), timesteps=(400,), condition="empty", storage="int8")
    run = prepare_encode(
        spec.model_copy(update={"features": features}),
        [str(corpus_folder / "*val*.tar")],
        str(tmp_path / "store"),
        batch=8,
    )
    assert EncodeStage(run.config).encode(run.items[0]).status == "committed"
    source = open_layers(str(tmp_path / "store"))
    reader = PairReader(source, tasks="*", inputs=frozenset({"features"}), blocks=(8,))
    commit = next(iter(source.store.newest_commits(source.features.folder).values()))
    group = zarr.open_group(source.store.storage.root / commit.data_folder / "arrays.zarr")
    latent_rows = reader.index["latent_row"].to_pylist()
    batch = reader.read(range(len(reader)), draws=[0] * len(reader))
    stored = batch.inputs["features"][8]
    assert (stored.values.dtype, stored.scale.dtype) == (torch.int8, torch.float32)
    moved = move_inputs(batch.inputs, torch.device("cpu"))["features"][8]
    assert (moved.dtype, moved.shape) == (torch.float32, stored.shape)
    for place, row in enumerate(latent_rows):
        values, scale = group["block08"][row, 0], group["block08_scale"][row, 0]
        expected = dequantize_int8(torch.from_numpy(values), torch.from_numpy(scale))
        assert torch.equal(moved[place], expected)


def test_what_the_store_lacks_is_said_before_anything_is_read(source, tmp_path, spec):
    with pytest.raises(SpecError, match=r"blocks \[1, 6\].*\[1\] were not encoded.*6, 7, 8, 9, 10"):
        PairReader(source, tasks="*", inputs=ALL, blocks=(1, 6))
    without = Source(source.store, source.latents, None, source.snapshot)
    with pytest.raises(SpecError, match="there is no features layer"):
        PairReader(without, tasks="*", inputs=ALL, blocks=(6,))


@pytest.mark.parametrize("pattern", ["nothing*", "/data/*.tar", "scenes-val-0.tar", "{a,b}*", ""])
def test_a_pattern_that_matches_no_task_is_named_with_the_tasks_there(source, pattern):
    with pytest.raises(SpecError) as raised:
        PairReader(source, tasks=pattern, inputs=frozenset(), option="data.train")
    said = str(raised.value)
    assert said.startswith(f"data.train: {pattern!r}: no task of {source.store.storage.url} has")
    assert "; the store has 3: scenes-train-0" in said
    assert "a pattern of ids has *, ? and [] alone, as 'scenes-train-0" in said
    assert "PairChoice" not in said


def test_of_many_tasks_a_pattern_error_names_a_few_from_first_to_last():
    ids = [f"tar-{number:06d}-0123456789ab" for number in range(100_000)]
    said = describe_unmatched("--tasks", ["x*"], "STORE", ids)
    assert "the store has 100000, among them tar-000000-0123456789ab, tar-020000-" in said
    assert len(said) < 400
    assert "the store has no task" in describe_unmatched("--tasks", ["x*"], "STORE", [])


def test_a_head_that_reads_images_needs_them_stored(tmp_path, corpus_folder, spec):
    latents = spec.latents.model_copy(update={"keep_image": False})
    run = prepare_encode(
        spec.model_copy(update={"latents": latents, "features": None}),
        [str(corpus_folder / "*val*.tar")],
        str(tmp_path / "store"),
        batch=8,
    )
    EncodeStage(run.config).encode(run.items[0])
    source = open_layers(str(tmp_path / "store"), reads_features=False)
    with pytest.raises(SpecError, match="encode one with keep_image: true"):
        PairReader(source, tasks="*", inputs=frozenset({"image"}))


def test_features_missing_for_a_task_are_named(source):
    record = next((source.store.storage.root / source.features.folder / "commits").glob("*val*"))
    record.unlink()
    fresh = open_layers(str(source.store.storage.root))
    with pytest.raises(SpecError, match="has latents but no features of the same content; run"):
        PairReader(fresh, tasks="*", inputs=ALL, blocks=(6,))
    assert len(PairReader(fresh, tasks="*train*", inputs=ALL, blocks=(6,)))


def test_a_snapshot_pins_what_is_read(source):
    """A commit made after the snapshot is not seen."""
    folder = source.store.storage.root / source.latents.folder / "commits"
    num = len(PairReader(source, tasks="*", inputs=frozenset({"latent"})))
    record = next(folder.glob("*val*"))
    record.rename(folder / "held-back")
    fresh = open_layers(str(source.store.storage.root))
    (folder / "held-back").rename(record)
    assert len(PairReader(fresh, tasks="*", inputs=frozenset({"latent"}))) < num


def test_parts_of_a_batch_are_read_alone(source):
    reader = PairReader(source, tasks="*", inputs=ALL, blocks=(7, 10))
    numbers, draws = [3, 0, 3, len(reader) - 1], [0, 1, 1, 0]
    batch = reader.read(numbers, draws=draws)
    assert torch.equal(reader.read_masks(numbers)[0], batch.mask)
    features = reader.read_features(numbers, draws=draws)
    assert sorted(features) == [7, 10]
    for block in features:
        assert torch.equal(features[block], batch.inputs["features"][block])


def test_any_number_of_threads_reads_the_same(source):
    numbers = [5, 1, 9, 9, 0, 17, 2]
    batches = [
        PairReader(source, tasks="*", inputs=ALL, blocks=(6, 9), num_threads=num_threads).read(
            numbers, draws=[0, 1, 0, 1, 1, 0, 0]
        )
        for num_threads in (1, 3)
    ]
    one, three = (batch.inputs | batch.inputs["features"] for batch in batches)
    for name in set(one) - {"features"}:
        assert torch.equal(one[name], three[name]), name
    assert batches[0].keys == batches[1].keys


def test_a_batch_in_use_is_not_written_over(source):
    """Memory is used again, but only what nobody has a view of."""
    reader = PairReader(source, tasks="*", inputs=ALL, blocks=(6,))
    first = reader.read([0, 1], draws=[0, 0])
    row, mask = first.inputs["features"][6][1], first.mask.clone()
    expected = row.clone()
    kept = first.mask
    del first
    for number in range(2, len(reader) - 1):
        reader.read([number, number + 1], draws=[1, 1])
    assert torch.equal(row, expected)
    assert torch.equal(kept, mask)


@pytest.mark.parametrize("number", [-1, 10**6])
def test_pairs_and_draws_that_are_not_there_are_an_index_error(source, number):
    reader = PairReader(source, tasks="*", inputs=ALL, blocks=(6,))
    with pytest.raises(IndexError, match=f"no pair {number} among {len(reader)}"):
        reader.read([0, number], draws=[0, 0])
    with pytest.raises(IndexError, match=r"no row \d+, split 2 in"):
        reader.read([0], draws=[2])


def test_several_globs_name_corpora(source):
    num = {
        glob: len(PairReader(source, tasks=glob, inputs=frozenset()))
        for glob in ("*train-00000*", "*val*", "*train*")
    }
    both = PairReader(source, tasks=("*train-00000*", "*val*", "*val-00000*"), inputs=frozenset())
    assert len(both) == num["*train-00000*"] + num["*val*"] < num["*train*"] + num["*val*"]


def test_a_choice_reads_the_pairs_that_it_takes_and_no_others(source):
    everything = PairReader(source, tasks="*", inputs=frozenset({"latent"}))
    areas = everything.index["mask_area"].to_numpy()
    limit = float(np.median(areas))
    some = PairReader(
        source, tasks="*", inputs=frozenset({"latent"}), choice=PairChoice(min_area=limit)
    )
    taken = np.flatnonzero(areas >= np.float32(limit))
    assert 0 < len(taken) == len(some) < len(everything)
    assert some.index.equals(everything.index.take(taken))
    ours = some.read(range(len(some)), draws=[0] * len(some))
    theirs = everything.read(taken, draws=[0] * len(taken))
    assert (ours.keys, ours.phrases) == (theirs.keys, theirs.phrases)
    assert torch.equal(ours.mask, theirs.mask)
    assert torch.equal(ours.inputs["latent"], theirs.inputs["latent"])


def test_splits_by_key_share_no_image_and_lose_none(source):
    def keys(low, high):
        choice = PairChoice(keys_from=low, keys_to=high, keys_seed=3)
        return PairReader(source, tasks="*", inputs=frozenset(), choice=choice).index["key"]

    low, high = (set(keys(*part).to_pylist()) for part in ((0, 0.5), (0.5, 1)))
    assert low
    assert high
    assert not low & high
    everything = PairReader(source, tasks="*", inputs=frozenset())
    assert low | high == set(everything.index["key"].to_pylist())
    assert len(keys(0, 0.5)) + len(keys(0.5, 1)) == len(everything)


def test_a_choice_of_no_pair_says_which(source):
    with pytest.raises(SpecError, match=r"committed pair that meets phrase: no such in the tasks"):
        PairReader(source, tasks="*", inputs=frozenset(), choice=PairChoice(phrase="no such"))


def test_an_index_that_points_outside_its_arrays_is_damage(source, monkeypatch):
    monkeypatch.setattr(
        Store, "read_index", lambda self, commit: _shift(ORIGINAL(self, commit), 1000)
    )
    reader = PairReader(source, tasks="*val*", inputs=frozenset({"latent"}))
    with pytest.raises(DamagedStoreError, match="its index names a row outside its"):
        reader.read([0], draws=[0])


ORIGINAL = Store.read_index


def _shift(table, by):
    shifted = pa.array(np.asarray(table["latent_row"]) + by)
    return table.set_column(table.column_names.index("latent_row"), "latent_row", shifted)


def test_several_layers_must_be_named(source, corpus_folder, spec):
    features = FeaturesSpec(blocks=(8,), timesteps=(100,))
    prepare_encode(
        spec.model_copy(update={"features": features}),
        [str(corpus_folder / "*.tar")],
        str(source.store.storage.root),
        batch=8,
    )
    with pytest.raises(
        SpecError, match=r"expected one features layer, got features-.*features-.*data\.features"
    ):
        open_layers(str(source.store.storage.root))
    named = source.features.fingerprint
    assert open_layers(str(source.store.storage.root), features=named).features == source.features
    with pytest.raises(SpecError, match="expected a features layer 'cafe'"):
        open_layers(str(source.store.storage.root), features="cafe")


@pytest.mark.parametrize("gone", ["the store", "a layer", "a chunk"])
def test_a_store_that_goes_away_is_called_missing_and_not_damaged(copied_store, gone):
    """While a reader is open, and where another process opens one, which sees no store."""
    source = open_layers(str(copied_store))
    reader = PairReader(source, tasks="*", inputs=frozenset({"latent"}))
    reader.read([0], draws=[0])
    source.store.storage.release()
    layer = copied_store / source.latents.folder
    if gone == "a chunk":
        for path in (p for p in layer.glob("data/**/c/**/*") if p.is_file()):
            path.unlink()
        with pytest.raises(DamagedStoreError, match=r"a committed shard is missing.*--repair FILE"):
            reader.read([1], draws=[0])
        return
    (copied_store if gone == "the store" else layer).rename(copied_store.with_name("away"))
    what = "expected a store, found" if gone == "the store" else "expected the layer latents-"
    with pytest.raises(MissingStoreError, match=f"{what}.* sees it. Was it moved") as raised:
        reader.read([1], draws=[0])
    assert "repair" not in str(raised.value)
    with pytest.raises(MissingStoreError, match=what):
        PairReader(source, tasks="*", inputs=frozenset({"latent"}))
