"""The peer of ``bench train`` computes what the store holds, and both epochs are the same pairs."""

import pytest
import torch

from pipeline.base.yaml import SpecError
from pipeline.bench.recompute import InputEncoder, read_image_batches
from pipeline.bench.train import measure_train, write_train_store
from pipeline.read.batch import move_inputs
from pipeline.read.source import Source, open_layers
from pipeline.runs.config import HeadConfig, TrainConfig
from pipeline.train.data import TrainData, open_readers

pytestmark = pytest.mark.thorough

CPU = torch.device("cpu")


def make_config(head):
    return TrainConfig(head=HeadConfig(name=head, blocks=(7, 8)), num_steps=1, batch_size=4)


@pytest.fixture(scope="module")
def source(store_folder):
    return open_layers(str(store_folder))


def test_what_is_recomputed_is_what_the_store_holds(source):
    config = make_config("ldznet")
    reader, _ = open_readers(config, source)
    recompute = InputEncoder(source.latents, source.features, config, CPU)
    stored = TrainData(config, source, reader).read_steps(0, 100)
    num_steps = 0
    for views, step in zip(read_image_batches(config, source, reader), stored, strict=False):
        (batch,) = step.passes
        found = recompute.encode(views)
        assert (found.keys, found.phrases) == (batch.keys, batch.phrases)
        assert torch.equal(found.mask, batch.mask)
        assert views.num_global == step.num_global
        read = move_inputs(batch.inputs, CPU)
        for name in ("latent", "text"):
            torch.testing.assert_close(found.inputs[name], read[name], rtol=2e-3, atol=2e-3)
        for number, feature in read["features"].items():  # another noise: alike in spread alone
            assert found.inputs["features"][number].shape == feature.shape
            ratio = found.inputs["features"][number].std() / feature.std()
            assert 0.5 < ratio < 2
        num_steps += 1
    assert num_steps == TrainData(config, source, reader).order.steps_an_epoch


def test_a_row_a_head(source):
    rows = measure_train(
        make_config("probe"), source, heads=["probe", "rgbnet"], device=CPU, turns=1
    )
    assert [row.head for row in rows] == ["probe", "rgbnet"]
    reader, _ = open_readers(make_config("probe"), source)
    for row in rows:
        assert (row.pairs, row.steps) == (len(reader), -(-len(reader) // 4))
        assert row.ratio == pytest.approx(row.recompute_s / row.store_s)
        assert 0 <= row.data_wait <= 1


def test_a_store_without_features_is_refused(source):
    bare = Source(source.store, source.latents, None, source.snapshot)
    with pytest.raises(SpecError, match="expected a store with a features layer"):
        measure_train(make_config("znet"), bare, heads=["znet"], device=CPU, turns=1)


def test_the_scratch_store_is_one_that_heads_train_from(tmp_path):
    source = open_layers(write_train_store(tmp_path, num=2, size_px=64))
    for head in ("probe", "rgbnet", "znet", "ldznet"):
        config = TrainConfig(head=HeadConfig(name=head), num_steps=1)
        train, validation = open_readers(config, source)
        assert len(train) > 0
        assert len(validation) > 0
