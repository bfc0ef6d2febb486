"""A head is scored on a layer cut otherwise than its training's, as the paper's test is."""

import shutil

import pytest

from pipeline.base.yaml import SpecError
from pipeline.encode.prepare import prepare_encode
from pipeline.evaluate.baselines import BASELINE_FOREGROUND, BASELINES
from pipeline.evaluate.run import choose_scored_layers, choose_snapshot, format_rows, run_evaluate
from pipeline.ingest.phrasecut import list_phrasecut
from pipeline.ingest.run import run_ingest
from pipeline.runs.checkpoint import load_checkpoint
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec
from pipeline.spec.layer import LayerSpec, fingerprint
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.store import Store
from tests.pipeline.ingest.test_phrasecut import draw_by_pillow, flatten
from tests.support.phrasecut_files import FILE_SIZES, write_phrasecut
from tests.support.train_runs import fit_here, make

STORED = ("11__1", "11__2", "12__5", "16__1", "16__4", "17__1")


@pytest.fixture(scope="module")
def made(tmp_path_factory, store_folder, ldm_folder):
    """A run, and a store with the layer it was trained on and one of PhraseCut's test split."""
    folder = tmp_path_factory.mktemp("phrasecut")
    fit_here(make(head="probe", num_steps=2, data={"draws": (1,)}), store_folder, folder / "run")
    tasks = write_phrasecut(folder / "files")
    listing = list_phrasecut(folder / "files", split="test")
    run_ingest(listing, str(folder / "tars"), arguments={}, shard_bytes=10**6)
    latents = LatentsSpec(
        model=str(ldm_folder), size=64, crop="resize", prompts=("{}",), keep_json=("task_id",)
    )
    spec = Spec(latents=latents, features=FeaturesSpec(timesteps=(350,)))
    shutil.copytree(store_folder, folder / "store", ignore=shutil.ignore_patterns("inventory"))
    run = prepare_encode(spec, [str(folder / "tars" / "*.tar")], str(folder / "store"), batch=4)
    stage = EncodeStage(run.config)
    for item in run.items:
        assert stage.encode(item).status == "committed"
    own = load_checkpoint(folder / "run")[1].features.folder
    layers = Store.open(str(folder / "store")).list_layers(required=True)
    (other,) = [x.folder for x in layers if x.kind == "features" and x.folder != own]
    return folder, other, {task["task_id"]: task for task in tasks}


def test_official_figures_come_beside_the_papers(made):
    folder, other, tasks = made
    rows = run_evaluate(
        str(folder / "store"),
        folder / "run",
        tasks="test*",
        layer=other,
        annotations=folder / "files" / "refer_test.json",
    )
    assert [row.name for row in rows] == ["probe", BASELINE_FOREGROUND]  # no training pairs here
    assert {row.scores.num_pairs for row in rows} == {len(STORED)}
    masks = [
        draw_by_pillow(flatten(tasks[name]), FILE_SIZES[tasks[name]["image_id"]][::-1])
        for name in STORED
    ]
    expected = {
        "mean_IoU": sum(mask.mean() for mask in masks) / len(tasks),
        "cumulative_IoU": sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks),
    }
    found = rows[1].official
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert (found["num_tasks"], found["num_missing"]) == (13, 7)
    assert "13 tasks, of which 7 without a prediction" in format_rows(rows)


def test_without_a_name_it_is_the_heads_own_layer_or_the_only_one(made, tmp_path, caplog):
    folder, other, _ = made
    store = folder / "store"
    rows = run_evaluate(str(store), folder / "run", snapshot="newest")
    assert [row.name for row in rows] == ["probe", *BASELINES]
    _, record = load_checkpoint(folder / "run")
    kept = shutil.ignore_patterns("inventory", record.latents.folder, record.features.folder)
    shutil.copytree(store, tmp_path / "store", ignore=kept)
    named = run_evaluate(str(store), folder / "run", tasks="test*", layer=other)
    alone = run_evaluate(str(tmp_path / "store"), folder / "run", tasks="test*")
    assert [row.scores for row in alone] == [row.scores for row in named]
    assert f"scoring on {other}; the head was trained on {record.features.folder}" in caplog.text


def test_a_layer_of_another_model_is_refused(made):
    folder, other, _ = made
    _, record = load_checkpoint(folder / "run")
    canonical = record.features.canonical | {"weights": {"unet/x.safetensors": "0" * 64}}
    changed = record.features.model_dump() | {
        "canonical": canonical,
        "fingerprint": fingerprint(canonical),
    }
    record = record.model_copy(update={"features": LayerSpec(**changed)})
    with pytest.raises(SpecError, match="other weights"):
        choose_scored_layers(Store.open(str(folder / "store")), record, other)


def test_the_runs_snapshot_is_sought_wherever_the_models_files_lay(made, caplog):
    folder, _, _ = made
    _, record = load_checkpoint(folder / "run")
    store = Store.open(str(folder / "store"))
    moved = record.features.model_copy(update={"source": {"model": "elsewhere"}})
    elsewhere = record.model_copy(update={"snapshot": "0123456789abcdef"})
    choose_snapshot(store, elsewhere, None, (record.latents, moved))
    assert "holds no snapshot '0123456789abcdef'" in caplog.text


def test_figures_of_a_part_of_a_split_are_refused(made):
    folder, other, _ = made
    path = folder / "files" / "refer_test.json"
    with pytest.raises(SpecError, match="leave --limit out"):
        run_evaluate(str(folder / "store"), folder / "run", layer=other, annotations=path, limit=1)


def test_a_layer_that_another_store_splits_otherwise_is_the_same_one(made, caplog):
    folder, _, _ = made
    _, record = load_checkpoint(folder / "run")
    latents = record.latents.model_copy(update={"split_bytes": 12345})
    record = record.model_copy(update={"latents": latents})
    choose_scored_layers(Store.open(str(folder / "store")), record, None)
    assert "the head was trained on" not in caplog.text
