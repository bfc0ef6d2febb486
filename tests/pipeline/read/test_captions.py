"""Layers that keep captions and no embeddings of them: read, trained on and scored all the same."""

import pickle
import shutil

import numpy as np
import pytest
import torch

from models.ldm.files import ModelFilesError
from models.ldm.text_encoder import TextEncoder
from pipeline.base.yaml import SpecError
from pipeline.evaluate.run import run_evaluate
from pipeline.read.choice import PairChoice
from pipeline.read.dataset import PairDataset
from pipeline.read.prompt_embedder import PromptEmbedder
from pipeline.read.reader import PairReader
from pipeline.read.source import open_layers
from pipeline.spec.fields import LatentsSpec, Spec
from tests.support.encode_here import encode_here
from tests.support.mixed_corpus import write_mixed_corpus
from tests.support.train_runs import fit_newest, losses, make

TEXT = frozenset({"text"})
CONFIG = make(num_steps=2, batch_size=4, validation_pairs=4, validate_every=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory, ldm_folder):
    """A copy of the model, which a test may move away."""
    return shutil.copytree(ldm_folder, tmp_path_factory.mktemp("moved") / "ldm")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_mixed_corpus(tmp_path_factory.mktemp("mixed") / "corpus")


def encode(corpus, model, folder, **options):
    section = LatentsSpec(model=str(model), size=64, keep_json=("task_id",), **options)
    return encode_here(Spec(latents=section), corpus, folder / "store")


@pytest.fixture(scope="module")
def bare(tmp_path_factory, corpus, model):
    """Without embeddings."""
    return encode(corpus, model, tmp_path_factory.mktemp("bare"), text="none")


@pytest.fixture(scope="module")
def stored(tmp_path_factory, corpus, model):
    """The same with embeddings."""
    return encode(corpus, model, tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def source(bare):
    return open_layers(str(bare), reads_features=False)


@pytest.fixture(scope="module")
def reader(source):
    return PairReader(source, tasks="*", inputs=TEXT, masks=False)


def read_text(reader, numbers):
    return reader.read(numbers, draws=[0] * len(numbers)).inputs["text"]


def test_a_prompt_is_embedded_as_the_layer_with_embeddings_holds_it(reader, stored):
    with_text = open_layers(str(stored), reads_features=False)
    other = PairReader(with_text, tasks="*", inputs=TEXT, masks=False)
    numbers = np.random.default_rng(0).permutation(len(reader))
    assert len(other) == len(reader)
    found, expected = read_text(reader, numbers), read_text(other, numbers)
    assert torch.equal(found, found.half().float())
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    phrases = reader.read(numbers, draws=[0] * len(numbers)).phrases
    none = torch.tensor([not phrase for phrase in phrases])
    assert torch.equal(found[none], expected[none])
    assert 0 < int(none.sum()) < len(numbers)


def test_what_else_is_in_a_batch_or_a_process_changes_no_digit(source, reader):
    numbers = list(range(len(reader)))
    whole = read_text(reader, numbers)
    for number in (4, 0):
        fresh = PairReader(source, tasks="*", inputs=TEXT, masks=False)
        assert torch.equal(read_text(fresh, [number])[0], whole[number])
    assert torch.equal(read_text(pickle.loads(pickle.dumps(reader)), numbers), whole)
    batch = PairDataset(reader).__getitems__(numbers)
    assert torch.equal(batch.inputs["text"], whole)


def test_a_prompt_is_embedded_once_and_the_model_opened_when_it_is_first_needed(
    source, monkeypatch
):
    asked = []
    forward = TextEncoder.forward
    monkeypatch.setattr(TextEncoder, "forward", lambda self, x: asked.extend(x) or forward(self, x))
    reader = PairReader(source, tasks="*", inputs=TEXT, masks=False)
    assert reader._embedder._encoder is None
    for _ in range(2):
        read_text(reader, range(len(reader)))
    assert len(asked) == len(set(asked)) > 1
    assert "" not in asked


def test_kept_embeddings_are_bounded(source, monkeypatch):
    embedder = PromptEmbedder(source.latents, device=None, model=None)
    monkeypatch.setattr(embedder._cache._held, "max_cost", 1)
    first = embedder.embed(["a red circle", "a tree", "a red circle"])
    assert first["text"].dtype == np.float16
    assert len(embedder._cache.get_known(["a red circle", "a tree"])) == 0
    np.testing.assert_array_equal(first["text"][0], first["text"][2])


def test_a_model_that_is_not_there_is_an_error_that_says_what_to_do(source, model, tmp_path):
    moved = model.rename(model.with_name("elsewhere"))
    try:
        reader = PairReader(source, tasks="*", inputs=TEXT, masks=False)
        with pytest.raises(ModelFilesError, match=r"name it: head\.model in a training's config"):
            read_text(reader, [0])
        named = PairReader(source, tasks="*", inputs=TEXT, masks=False, model=str(moved))
        assert read_text(named, [0]).shape[0] == 1
    finally:
        moved.rename(model)


def test_a_head_trains_and_is_scored_as_on_stored_embeddings(bare, stored, tmp_path):
    for folder, out in ((bare, "none"), (stored, "stored")):
        assert fit_newest(CONFIG, folder, tmp_path / out) == 2
    ours, theirs = losses(tmp_path / "none"), losses(tmp_path / "stored")
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=2e-3)
    scores = [
        run_evaluate(str(folder), tmp_path / out)[0].scores
        for folder, out in ((bare, "none"), (stored, "stored"))
    ]
    assert scores[0].num_pairs == scores[1].num_pairs
    assert scores[0].mIoU == pytest.approx(scores[1].mIoU, abs=0.02)


def test_a_phrase_that_is_not_there_is_an_empty_one(source, reader):
    numbers = range(len(reader))
    phrases = reader.read(numbers, draws=[0] * len(numbers)).phrases
    assert phrases.count("") == reader.index["phrase"].null_count > 0
    for choice, num in (
        (PairChoice(phrase="^$"), phrases.count("")),
        (PairChoice(without_phrase="."), phrases.count("")),
        (PairChoice(phrase="."), len(phrases) - phrases.count("")),
    ):
        some = PairReader(source, tasks="*", inputs=frozenset(), masks=False, choice=choice)
        assert len(some) == num


def test_kept_columns_are_filters_and_others_are_named(source):
    def count(*where):
        choice = PairChoice(where=where)
        reader = PairReader(source, tasks="*val*", inputs=frozenset(), masks=False, choice=choice)
        return len(reader)

    kept = PairReader(source, tasks="*val*", inputs=frozenset(), masks=False).index
    assert count(("task_id", "==", "100")) == count(("task_id", "==", 100)) == 1
    assert 0 < count(("task_id", "<", 1000), ("task_id", ">=", 99.5)) < count() == len(kept)
    with pytest.raises(SpecError, match=r"latents-.*where: expected a column.*uid.*task_id"):
        count(("uid", "==", 1))


def test_pairs_without_a_mask_are_left_out_where_masks_are_read(source):
    with pytest.raises(SpecError, match="at least one committed pair with a mask"):
        PairReader(source, tasks="*train-1*", inputs=TEXT)
