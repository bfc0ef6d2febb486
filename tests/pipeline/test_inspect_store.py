"""What ``inspect`` says of a store is what its commits say."""

import json
import shutil

import pytest

from pipeline.commit import DamagedStoreError
from pipeline.inspect_store import describe_differences, inspect_store
from pipeline.layers import build_layers
from pipeline.spec import SpecError
from pipeline.store import Store


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
    assert after[1] == before[1]


def test_the_text_says_it_in_lines(store_folder):
    latents, features = (summary.as_text() for summary in inspect_store(str(store_folder)))
    assert "size: 64" in latents
    assert "3 tasks" in latents
    assert "12 views" in latents
    assert "12 samples stored, 0 rejected, 0 other members rejected" in latents
    assert "blocks: [6, 7, 8, 9, 10]" in features
    assert "samples stored" not in features


def test_the_plain_form_is_json(store_folder):
    plain = [summary.as_dict() for summary in inspect_store(str(store_folder))]
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
