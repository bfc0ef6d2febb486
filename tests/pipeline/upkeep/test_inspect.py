"""What ``inspect`` says of a store is what its commits say."""

import json
import os
import shutil
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime

import pytest

from pipeline.base.yaml import SpecError
from pipeline.bench.store import make_layer
from pipeline.corpus.tasks import list_tasks
from pipeline.spec.build_layers import build_layers
from pipeline.spec.fields import LatentsSpec
from pipeline.store.commit import DamagedStoreError
from pipeline.store.store import Store
from pipeline.upkeep.inspect import StoreInspector, inspect_store
from pipeline.upkeep.summary import describe_differences
from tests.support.encode_here import encode_here
from tests.support.mixed_corpus import write_mixed_corpus


def test_summaries_add_up_what_is_committed(store_folder, spec):
    latents, features = inspect_store(str(store_folder))
    assert latents.folder.startswith("latents-")
    assert features.folder.startswith("features-")
    assert latents.model == features.model == spec.latents.model
    assert latents.num_tasks == features.num_tasks == 3
    assert latents.rows == features.rows
    assert latents.rows["views"] == latents.stored_samples == 12
    assert (latents.rejected_samples, latents.rejected_members) == (0, 0)
    assert latents.section["size"] == 64
    for summary in (latents, features):
        data = store_folder / summary.folder / "data"
        on_disk = sum(p.stat().st_size for p in data.rglob("*") if p.is_file())
        assert summary.num_bytes == on_disk


def test_what_is_not_committed_does_not_count(copied_store):
    before = inspect_store(str(copied_store))
    store = Store.open(str(copied_store))
    folder = before[0].folder
    commit = next(iter(store.newest_commits(folder).values()))
    store.storage.create(f"{folder}/data/{commit.task}/0123456789abcdef/orphan", b"x" * 1000)
    assert inspect_store(str(copied_store)) == before
    (copied_store / commit.name).unlink()
    after = inspect_store(str(copied_store))
    assert after[0].num_tasks == 2
    assert after[0].stored_samples == 8
    assert (after[1].num_tasks, after[1].num_behind) == (2, 0)  # features without latents


def test_the_text_says_it_in_lines(store_folder):
    latents, features = (summary.as_text() for summary in inspect_store(str(store_folder)))
    assert "size: 64" in latents
    assert "3 tasks" in latents
    assert "12 views" in latents
    assert "  input  12 samples stored, 0 rejected\n" in latents
    assert "blocks: [6, 7, 8, 9, 10]" in features
    assert "samples stored" not in features


def test_pairs_with_and_without_a_mask_and_ignore_regions_are_counted(tmp_path, store_folder, spec):
    assert "masks  " not in inspect_store(str(store_folder))[0].as_text()
    latents = spec.model_copy(update={"features": None})
    folder = encode_here(latents, write_mixed_corpus(tmp_path / "corpus"), tmp_path / "store")
    found = inspect_store(str(folder))[0]
    store = Store.open(str(folder))
    rows = [row for c in store.newest_commits(found.folder).values()
            for row in store.read_index(c).to_pylist()]  # fmt: skip
    num_masks = sum(row["mask_row"] is not None for row in rows)
    num_ignores = len({(row["key"], row["view"]) for row in rows if row["ignore_row"] is not None})
    assert 0 < num_masks < len(rows)
    lines = found.as_text().splitlines()
    num_without = len(rows) - num_masks
    assert (
        f"  masks  {num_masks} pairs have one, {num_without} have none (negatives are among these)"
    ) in lines
    assert f"         {num_ignores} views with an ignore region" in lines


def test_the_plain_form_is_json(store_folder):
    plain = [asdict(summary) for summary in inspect_store(str(store_folder))]
    assert json.loads(json.dumps(plain)) == plain


def test_where_there_is_no_store_it_says_so(tmp_path):
    with pytest.raises(SpecError, match="expected a store, found no layer there"):
        inspect_store(str(tmp_path))


def test_a_damaged_record_is_an_error(copied_store):
    record = next(copied_store.glob("latents-*/commits/*.json"))
    record.write_bytes(record.read_bytes()[:-1])
    with pytest.raises(DamagedStoreError, match="the commit record cannot be read"):
        inspect_store(str(copied_store))


def test_layers_of_one_kind_say_in_what_they_differ(spec, ldm_folder):
    _, features = build_layers(spec)
    later = spec.features.model_copy(update={"timesteps": (500,), "seed": 1})
    latents, other = build_layers(spec.model_copy(update={"features": later}))
    lines = describe_differences([latents, features, other])
    assert lines == [
        "the features layers differ in",
        "  seed",
        f"    {features.folder}  0",
        f"    {other.folder}  1",
        "  timesteps",
        f"    {features.folder}  [300, 400]",
        f"    {other.folder}  [500]",
    ]
    assert describe_differences([latents, features]) == []


def test_a_changed_weight_file_is_a_difference(spec, ldm_folder, tmp_path):
    latents, _ = build_layers(spec)
    moved = shutil.copytree(ldm_folder, tmp_path / "ldm")
    with (moved / "vae" / "config.json").open("a") as file:
        file.write(" ")
    at = spec.latents.model_copy(update={"model": str(moved)})
    other, _ = build_layers(spec.model_copy(update={"latents": at}))
    lines = describe_differences([latents, other])
    assert lines[1] == "  weights vae/config.json"
    assert len(lines) == 4


def test_features_behind_their_latents_and_a_corpus_are_counted(copied_store, corpus_folder):
    next(copied_store.glob("features-*/commits/*.json")).unlink()
    inspector = StoreInspector(Store.open(str(copied_store)))
    tars = list_tasks([str(corpus_folder / "*.tar")])
    latents, features = inspector.summarise(tars=tars).layers
    assert (latents.num_behind, features.num_behind) == (None, 1)
    assert (latents.num_of_corpus, features.num_of_corpus, features.num_corpus) == (3, 2, 3)
    assert "behind 1 task of its latents layer" in features.as_text()
    assert "corpus 2 of its 3 tasks committed" in features.as_text()
    part = list_tasks([str(corpus_folder / "scenes-val-*.tar")], root=str(corpus_folder))
    assert inspector.summarise(tars=part).layers[0].num_of_corpus == 1
    assert "--root" not in latents.as_text()
    rooted = list_tasks([str(corpus_folder / "*.tar")], root=str(corpus_folder.parent))
    assert inspector.summarise(tars=rooted).layers[0].num_of_corpus == 3  # known by their URLs
    elsewhere = [
        replace(tar, id=f"other-{number}", url=f"file:///other/{number}.tar", below="other")
        for number, tar in enumerate(rooted)
    ]
    assert (
        "no task has an id of this corpus: give encode's --root"
        in inspector.summarise(tars=elsewhere).layers[0].as_text()
    )


def test_what_came_lately_is_told_by_the_files_times(copied_store):
    records = sorted(copied_store.glob("features-*/commits/*.json"))
    now_s = time.time()
    for age_s, record in zip((60, 1800, 400_000), records, strict=True):
        os.utime(record, (now_s - age_s, now_s - age_s))
    _, features = inspect_store(str(copied_store))
    assert features.newest == datetime.fromtimestamp(now_s - 60, UTC).isoformat(timespec="seconds")
    assert [(x.window_s, x.num_tasks) for x in features.recent] == [(600, 1), (3600, 2), (86400, 2)]
    assert features.recent[0].num_pairs < features.recent[1].num_pairs < features.rows["pairs"]
    assert "last   10 min: 1 task, " in features.as_text()
    assert "last   1 h: 2 tasks, " in features.as_text()
    assert "24 h" not in features.as_text()  # nothing more than in the last hour


def test_the_rate_of_a_run_that_has_just_begun_is_over_its_own_time(copied_store):
    records = sorted(copied_store.glob("features-*/commits/*.json"))
    now_s = time.time()
    for age_s, record in zip((10, 20, 30), records, strict=True):
        os.utime(record, (now_s - age_s, now_s - age_s))
    _, features = inspect_store(str(copied_store))
    assert [recent.seconds for recent in features.recent] == pytest.approx([30] * 3, abs=3)
    os.utime(records[0], (now_s - 700, now_s - 700))
    _, features = inspect_store(str(copied_store))
    assert features.recent[0].seconds == 600
    assert features.recent[1].seconds == pytest.approx(700, abs=3)


def test_the_text_fits_80_columns_and_is_no_programs(store_folder):
    for summary in inspect_store(str(store_folder)):
        lines = [line for line in summary.as_text().splitlines() if "  model  " not in line]
        assert max(map(len, lines)) <= 80
        assert "behind" not in summary.as_text()
    assert "keep_image: true" in inspect_store(str(store_folder))[0].as_text()


def test_a_clock_ahead_of_this_one_hides_nothing(copied_store):
    ahead_s = time.time() + 10**6
    for record in copied_store.glob("*/commits/*.json"):
        os.utime(record, (ahead_s, ahead_s))
    assert [x.num_tasks for x in inspect_store(str(copied_store))[0].recent] == [3, 3, 3]


def test_a_fast_look_sums_what_is_known_and_says_so(copied_store):
    inspector = StoreInspector(Store.open(str(copied_store)))
    latents = inspector.summarise(fast=True).layers[0]
    assert (latents.num_tasks, latents.num_read, latents.num_bytes) == (3, 0, 0)
    assert "3 tasks, whose records were not read yet" in latents.as_text()
    assert "samples stored" not in latents.as_text()
    assert [(x.num_tasks, x.num_pairs) for x in latents.recent[-1:]] == [(3, None)]
    assert latents.newest is not None
    whole = inspector.summarise().layers[0]
    assert inspector.summarise(fast=True).layers[0] == whole
    assert whole.num_read == 3


def test_a_watch_sees_what_is_committed_meanwhile(copied_store):
    record = next(copied_store.glob("latents-*/commits/*.json"))
    aside = record.rename(copied_store / "aside")
    inspector = StoreInspector(Store.open(str(copied_store)))
    assert inspector.summarise().layers[0].num_tasks == 2
    aside.rename(record)
    assert "3 tasks, in 2 of them " in inspector.summarise(fast=True).layers[0].as_text()
    assert inspector.summarise().layers[0].rows == inspect_store(str(copied_store))[0].rows


def test_notes_are_said_in_words(store_folder):
    latents = replace(inspect_store(str(store_folder))[0], notes={"enlarged_views": 12})
    assert "  note   12 views enlarged" in latents.as_text()
    assert max(map(len, latents.as_text().splitlines()[2:])) <= 80


def test_a_field_that_came_later_differs_from_its_default_and_not_from_nothing():
    (plain, turned) = (
        make_layer(LatentsSpec(model="none", orientation=choice), scaling_factor=1.0)
        for choice in ("apply", "ignore")
    )
    assert plain.section["orientation"] == "apply"
    assert describe_differences([plain, turned]) == [
        "the latents layers differ in",
        "  orientation",
        f'    {plain.folder}  "apply"',
        f'    {turned.folder}  "ignore"',
    ]
