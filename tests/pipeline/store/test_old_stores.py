"""Stores of every earlier version read for ever: values, snapshot, verify, and what is missing."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from pipeline.base.yaml import SpecError
from pipeline.corpus.tasks import list_tasks
from pipeline.encode.hash_tars import hash_tars
from pipeline.encode.missing import CorpusWork
from pipeline.read.reader import PairReader
from pipeline.read.source import Source
from pipeline.spec.build_layers import build_layers
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec, dump_section
from pipeline.spec.layer import fingerprint
from pipeline.store.layout import list_arrays
from pipeline.store.snapshot import create_snapshot, read_snapshot
from pipeline.store.store import Store
from pipeline.upkeep.gc import list_orphans
from pipeline.upkeep.verify import verify_store
from tests.support.missing import list_missing

GOLDEN = Path(__file__).parents[2] / "golden"
EXPECTED = json.loads((GOLDEN / "store_v1.json").read_text())


@pytest.fixture
def store(tmp_path):
    return Store.open(str(shutil.copytree(GOLDEN / "store_v1", tmp_path / "store")))


def test_every_value_is_what_it_was(store):
    found = {}
    for layer in store.list_layers():
        for task, commit in store.newest_commits(layer.folder).items():
            for name in list_arrays(layer):
                array = store.open_array(layer, commit, name)
                data = b"".join(
                    array.read_rows([row])[0].tobytes() for row in range(array.num_rows)
                )
                digest = hashlib.sha256(data).hexdigest()
                found[f"{layer.folder}/{task}/{name}"] = digest
    assert found == EXPECTED["sha256"]


def test_its_layers_are_what_their_specs_make_today(store):
    """A field that came later is not in the canonical spec while it is at its default."""
    for layer in store.list_layers():
        section = layer.latents if layer.kind == "latents" else layer.features
        canonical = layer.canonical | {"section": dump_section(section, without=set(layer.source))}
        assert fingerprint(canonical) == layer.fingerprint
    changed = store.list_layers()[0].latents.model_copy(update={"color": "srgb"})
    assert "color" in dump_section(changed, without=set())
    assert "orientation" not in dump_section(changed, without=set())


def test_its_specs_make_its_layers(store, ldm_folder):
    """With the digests of its model, since another machine may calibrate the tiny one otherwise."""
    latents, *over = store.list_layers()
    for there in over:
        spec = Spec(
            latents=LatentsSpec(model=str(ldm_folder), size=64),
            features=FeaturesSpec(blocks=(7, 10), timesteps=(300,), storage=there.features.storage),
        )
        made = build_layers(spec, where="spec")
        for layer, former in zip(made, (latents, there), strict=True):
            of_model = former.canonical.keys() & {"weights", "scaling_factor", "latents"}
            canonical = layer.canonical | {name: former.canonical[name] for name in of_model}
            assert canonical.keys() == layer.canonical.keys()
            assert fingerprint(canonical) == former.fingerprint


def test_a_rerun_over_its_corpus_has_nothing_to_do(store, tmp_path):
    """Its records have no marks: they take the first that are seen, and later ones are compared."""
    latents, *over = store.list_layers()
    corpus = shutil.copytree(GOLDEN / "store_v1_corpus", tmp_path / "corpus")
    for _ in range(2):
        for features in over:
            assert list_missing(store, latents, features, list_tasks([f"{corpus}/*.tar"])) == []
    (corpus / "scenes-val-00000.tar").touch()
    work = CorpusWork(store, latents, over[0], list_tasks([f"{corpus}/*.tar"]))
    suspects = work.list_missing().suspects
    assert [tar.below for tar in suspects] == ["scenes-val-00000.tar"]
    found = hash_tars(suspects, on_ray=False)
    missing = work.list_missing(found.digests, found.unread)
    assert (missing.items, missing.num_tasks) == ((), 2)


def test_its_snapshot_is_found_and_taken_again_the_same(store):
    pinned = read_snapshot(store, EXPECTED["snapshot"])
    assert create_snapshot(store, pinned.records) == pinned


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_pairs_are_read(store, storage):
    latents, *over = store.list_layers()
    features = next(layer for layer in over if layer.features.storage == storage)
    snapshot = read_snapshot(store, EXPECTED["snapshot"])
    reader = PairReader(
        Source(store, latents, features, snapshot),
        tasks="*",
        inputs=frozenset({"latent", "text", "features"}),
        blocks=(7, 10),
    )
    batch = reader.read(range(len(reader)), draws=[0] * len(reader))
    assert batch.inputs["latent"].shape == (len(reader), 4, 8, 8)
    assert batch.inputs["features"][10].shape == (len(reader), 96, 2, 2)
    assert "text_pooled" not in batch.inputs


def test_it_verifies_and_nothing_of_it_is_an_orphan(store):
    checks = list(verify_store(store))
    assert len(checks) == 6
    assert [check.damage for check in checks] == [[]] * 6
    assert list(list_orphans(store)) == []


def test_a_store_of_a_later_version_names_the_version(store):
    layer = store.list_layers()[0]
    path = store.storage.local_path(f"{layer.folder}/spec.json")
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({**plain, "schema_version": 2}))
    with pytest.raises(SpecError, match="has schema version 2, this ldznet reads up to 1"):
        store.list_layers()
