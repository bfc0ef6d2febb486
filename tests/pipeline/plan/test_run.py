"""A plan from end to end on a small corpus, held against what encoding it really stored."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.plan import plan as plan_verb
from pipeline.base.yaml import SpecError
from pipeline.corpus.tasks import CorpusError, list_tasks, split_tasks
from pipeline.encode.actor_pool import ActorBounds
from pipeline.plan.compare import BYTES_WITHIN, add_runs, compare, format_comparison
from pipeline.plan.forecast import format_bytes, format_seconds, read_forecast
from pipeline.plan.report import WIDTH, format_forecast
from pipeline.plan.run import PlanOptions, check_gpus, choose_machines, make_plan, scratch_store
from pipeline.runs.config import HeadConfig, TrainConfig
from pipeline.storage.open import open_storage

PROBE = TrainConfig(head=HeadConfig(name="probe", blocks=(8, 9)), num_steps=30, batch_size=4)
ZNET = TrainConfig(head=HeadConfig(name="znet"), num_steps=30, batch_size=4)
RGBNET = TrainConfig(head=HeadConfig(name="rgbnet"), num_steps=30, batch_size=4)


@pytest.fixture(scope="module")
def options(spec, corpus_folder):
    return PlanOptions(
        corpus=(str(corpus_folder / "*.tar"),),
        spec=spec,
        heads=(PROBE, ZNET),
        price=2.0,
        actors=ActorBounds(0, 0),
        batch=8,
        num_samples=8,
        seed=3,
    )


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("beside")


@pytest.fixture(scope="module")
def forecast(options, said, scratch):
    return make_plan(replace(options, store=str(scratch / "store")), say=said.append)


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    seconds = [0, 30, 41.5, 0, 8.5]  # a run, and another that went on with it
    records = [{"verb": "encode", "elapsed_s": value} for value in seconds]
    records.insert(2, {"verb": "train", "elapsed_s": 99})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_bytes_and_rows_are_near_those_of_a_real_run(forecast, store_folder):
    rows = {row.what: row for row in compare(forecast, str(store_folder), None)}
    assert rows["tasks"].ratio == 1
    assert rows["stored"].ratio == pytest.approx(1, abs=0.1)
    assert rows["pairs"].ratio == pytest.approx(1, abs=0.1)
    assert rows["prompts"].ratio == pytest.approx(1, abs=0.1)
    assert rows["bytes"].ratio == pytest.approx(1, abs=BYTES_WITHIN)
    assert rows["bytes of features block06"].in_range
    assert rows["bytes of latents text"].ratio == pytest.approx(1, abs=0.1)
    assert rows["bytes of latents mask"].real > 0


def test_nothing_is_left_behind_and_the_store_is_not_made(forecast, scratch):
    assert list(scratch.iterdir()) == []


def test_what_is_measured_is_said(forecast, said):
    assert said[:2] == ["checking the spec against its model", "listing tars"]
    assert said[2:4] == ["looking into some of 3 tasks", "hashing the model's files"]
    assert said[-2] == "taking a first step of znet"
    assert said[-1].startswith("taking 5 more steps of znet, 4 pairs each: at most about ")
    assert forecast.facts["sampled_tasks"] == 3
    assert forecast.facts["timed_images"] == 8
    assert forecast.facts["seed"] == 3


def test_time_and_dollars_are_there_with_their_ranges(forecast):
    wall, machine = forecast.times["wall_s"], forecast.times["machine_s"]
    assert 0 < wall.low <= wall.value <= wall.high
    assert forecast.times["busy_unet_s"].value > 0
    assert forecast.dollars.value == pytest.approx(machine.value * 2 / 3600)


def test_heads_are_compared_and_summed_up(forecast):
    probe, znet, both = forecast.heads
    assert [head.head for head in forecast.heads] == ["probe", "znet", "all of them"]
    assert probe.cache_bytes.value == pytest.approx(forecast.num_bytes.value)
    latents = forecast.by_layer()[forecast.facts["latents"]]  # which ZNet reads alone
    assert znet.cache_bytes.value == pytest.approx(latents.value)
    assert both.cache_bytes == probe.cache_bytes
    assert znet.encode_s.value < probe.encode_s.value
    assert probe.pairs.value < forecast.counts["pairs"].value  # the train tars alone
    assert probe.planned_epochs == pytest.approx(30 * 4 / probe.pairs.value)


def test_the_report_is_80_columns_wide_and_names_everything(forecast):
    text = format_forecast(forecast)
    assert max(map(len, text.splitlines())) <= WIDTH
    for expected in ("block06", "mask", "distinct prompts", "wall time", "$", "probe: ", "seed 3"):
        assert expected in text


def test_the_report_begins_with_the_answer(forecast):
    stores, takes, cache = format_forecast(forecast).splitlines()[:3]
    assert stores.startswith(f"stores: {format_bytes(forecast.num_bytes.value)} (")
    assert takes.startswith(f"takes:  {format_seconds(forecast.times['wall_s'].value)} (")
    assert " on 1 worker; $" in takes
    assert cache.startswith("cache:  pays for ") or "recompute" in cache


def test_workers_are_chosen_as_encode_chooses_them(options):
    chosen = choose_machines(replace(options, actors=ActorBounds(1, 40)), 1000)
    assert (chosen.num_actors, chosen.num_decoders) == (40, 1)
    few = choose_machines(replace(options, actors=ActorBounds(1, 40), num_decoders=3), 2)
    assert (few.num_actors, few.num_decoders) == (2, 3)


def test_gpus_that_this_machine_has_not_are_an_error():
    with pytest.raises(ValueError, match=r"--gpus: expected .* none, got 0\.5"):
        check_gpus(0.5, on_gpu=False)
    with pytest.raises(ValueError, match=r"--gpus: expected .* a GPU, got 0"):
        check_gpus(0, on_gpu=True)
    check_gpus(0, on_gpu=False)
    check_gpus(2, on_gpu=True)


def test_json_keeps_the_figures_and_the_verdicts(forecast, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(forecast.to_json())
    plain = json.loads(path.read_text())
    assert plain["heads"][0]["verdict"] == forecast.heads[0].verdict
    again = read_forecast(path)
    assert again.num_bytes == forecast.num_bytes
    assert again.by_layer() == forecast.by_layer()


def test_a_comparison_says_how_near_it_was(forecast, store_folder, metrics):
    rows = compare(forecast, str(store_folder), metrics)
    assert rows[-1].real == 50
    text = format_comparison(rows)
    assert "bytes: " in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_comparing_with_what_is_no_plan_or_no_run_is_an_error(tmp_path, metrics):
    with pytest.raises(SpecError, match=r"m\.jsonl: cannot be read"):
        add_runs(tmp_path / "m.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"verb": "train", "elapsed_s": 1}\n')
    with pytest.raises(SpecError, match="expected the records of an encode run"):
        add_runs(tmp_path / "empty.jsonl")
    with pytest.raises(SpecError, match="expected what `ldznet plan --json` printed"):
        read_forecast(metrics)
    with pytest.raises(ValueError, match="--compare METRICS, --forecast FILE and --store URL"):
        plan_verb(compare=metrics)


def test_a_head_that_the_layers_cannot_feed_is_left_out_or_an_error(options, tmp_path, spec):
    without = spec.model_copy(
        update={"features": None, "latents": spec.latents.model_copy(update={"keep_image": False})}
    )
    some = replace(options, spec=without, heads=(RGBNET,), num_samples=4)
    found = make_plan(replace(some, required=False), say=lambda _: None)
    assert found.heads == []
    assert "keep_image" in found.left_out["rgbnet"]
    assert "features" not in found.facts
    text = format_forecast(found)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "it pays is not known: no head was timed" in text
    assert "less than they read: rgbnet (--json says what)." in text
    with pytest.raises(SpecError, match="keep_image"):
        make_plan(some, say=lambda _: None)


def test_a_corpus_that_is_not_there_is_an_error_before_anything_is_loaded(options, said):
    heard = []
    with pytest.raises(CorpusError, match="found none"):
        make_plan(replace(options, corpus=("/nowhere/*.tar",)), say=heard.append)
    assert heard[-1] == "listing tars"


def test_a_block_that_the_model_has_not_is_an_error_before_the_corpus_is_listed(options):
    features = options.spec.features.model_copy(update={"blocks": (6, 77)})
    spec = options.spec.model_copy(update={"features": features})
    heard = []
    with pytest.raises(SpecError, match=r"some\.yaml: features\.blocks .*77"):
        make_plan(replace(options, spec=spec, spec_name="some.yaml"), say=heard.append)
    assert "listing tars" not in heard


def stop_after_listing(line):
    if line.startswith("looking"):
        raise RuntimeError(line)


def test_long_tars_are_split_as_encode_splits_them(options):
    tars = list_tasks(options.corpus)
    limit = max(tar.num_bytes for tar in tars) // 2
    num = len(split_tasks(tars, limit))
    assert num > len(tars)
    with pytest.raises(RuntimeError, match=f"some of {num} tasks"):
        make_plan(replace(options, split_bytes=limit), say=stop_after_listing)


def test_without_heads_encoding_alone_is_forecast(options):
    heard = []
    found = make_plan(replace(options, heads=(), num_samples=4), say=heard.append)
    assert not any("step" in line for line in heard)
    assert (found.heads, found.left_out) == ([], {})
    assert "no head was timed" in format_forecast(found).splitlines()[2]


def test_options_that_make_no_sense_are_errors(tmp_path):
    one = {"corpus": ["a.tar"], "spec": tmp_path / "spec.yaml"}
    with pytest.raises(ValueError, match="--config or --no-heads, got both"):
        plan_verb(**one, config=[tmp_path / "c.yaml"], heads=False)


def test_a_plan_without_a_corpus_is_an_error():
    with pytest.raises(ValueError, match="expected --corpus and --spec"):
        plan_verb()


def test_sizes_and_times_are_said_in_a_suitable_unit():
    assert [format_bytes(x) for x in (12, 3400, 5.6e7, 1.2345e9, 2e12)] == [
        "12 B", "3.4 kB", "56 MB", "1.234 GB", "2 TB",
    ]  # fmt: skip
    assert [format_seconds(x) for x in (3, 100, 600, 36000, 864000)] == [
        "3 s", "100 s", "10 min", "10 h", "10 d",
    ]  # fmt: skip


def test_a_scratch_store_on_s3_lies_beside_the_users_and_is_removed(s3_url):
    url = s3_url
    with scratch_store(url) as beside:
        assert beside.startswith(f"{url}-plan-")
        storage = open_storage(beside)
        with storage.open_write("latents-0/data/file") as file:
            file.write(b"x")
        assert storage.exists("latents-0/data/file")
    assert list(storage.list_files()) == []


def fail_in(folder):
    with scratch_store(str(folder / "not" / "yet" / "store")) as beside:
        assert folder in Path(beside).parents
        raise RuntimeError("stop")


def test_a_scratch_store_is_removed_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        fail_in(tmp_path)
    assert list(tmp_path.iterdir()) == []
