"""From timed stages to hours, dollars and epochs: figures that can be worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.plan.cost import Machines, choose_bottleneck, cost_encoding, measure_overlap, schedule
from pipeline.plan.counts import CorpusCounts
from pipeline.plan.estimate import NOTHING, Estimate
from pipeline.plan.files import rows_of_file
from pipeline.plan.forecast import HeadForecast, format_epochs
from pipeline.plan.timing import STAGE_ROWS, EncodeTiming, Line, fit_line
from pipeline.store.store import Store


def exactly(value):
    return Estimate(value, value, value)


ROWS = {"tar_bytes": 1e9, "samples": 100, "views": 100, "new_prompts": 10, "draws": 600}
GPU = Machines(on_gpu=True, num_actors=2, num_cores=16, start_s=10)
CPU = Machines(on_gpu=False, num_actors=2, num_cores=2, start_s=10)


@pytest.fixture
def layers(store_folder):
    store = Store.open(str(store_folder))
    return store.list_layers()


@pytest.fixture
def timing(layers):
    """Stages of which the device's is the slowest: 0.1 s a draw and 1 s a task."""
    latents, features = layers
    stages = {stage: Line(rows, 0, 0) for stage, rows in STAGE_ROWS.items()}
    stages |= {"unet": Line("draws", 1, 0.1), "decode": Line("samples", 0, 0.2)}
    busy = dict.fromkeys(STAGE_ROWS, 0.0) | {"unet": 50.0, "decode": 10.0, "commit": 8.0}
    return EncodeTiming(
        stages=stages,
        files={},
        rows={},
        rejects={},
        wall_s=60,
        busy_s=busy,
        num_tasks=8,
        spread=0.1,
        cpu_s=90,
        load_s=5,
        latents=latents,
        features=features,
        store_url="",
    )


@pytest.fixture
def counts():
    rows = {name: exactly(value) for name, value in ROWS.items()} | {"bytes": exactly(4e9)}
    return CorpusCounts(np.array([1.0, 1, 2, 4]), rows, {}, NOTHING, {})


def test_a_line_is_found_again_from_a_small_and_some_large_tasks():
    # 3 + 0.5 a row; four tasks of 100 rows together
    line = fit_line("pairs", (2, 4), (400, 4 * 3 + 0.5 * 400), num_tasks=4)
    assert (line.a_task, line.a_row) == (pytest.approx(3), pytest.approx(0.5))


def test_no_part_of_a_cost_is_negative():
    line = fit_line("pairs", (2, 0.1), (400, 400), num_tasks=4)  # the small one was too fast
    assert (line.a_task, line.a_row) == (0, 1)
    line = fit_line("pairs", (2, 50), (8, 100), num_tasks=4)  # the small one was too slow
    assert (line.a_task, line.a_row) == (25, 0)


def test_a_cost_without_rows_is_the_tasks():
    assert fit_line("draws", (0, 1), (0, 4), num_tasks=4) == Line("draws", 1, 0)


def test_the_slowest_resource_sets_a_gpus_pace_and_two_threads_commit():
    busy = dict.fromkeys(STAGE_ROWS, 1.0) | {"decode": 2.5, "commit": 4.9}
    assert choose_bottleneck(busy, on_gpu=True) == ("vae", "text", "unet")
    assert choose_bottleneck(busy | {"commit": 7.0}, on_gpu=True) == ("commit",)
    assert set(choose_bottleneck(busy, on_gpu=False)) == set(STAGE_ROWS)


def test_what_resources_do_not_overlap_is_measured(timing):
    # 60 s of wall for 50 of the device; 2 passes' last commits, 1 s each, are taken off
    assert measure_overlap(timing, on_gpu=True) == pytest.approx((60 - 2) / 50)
    assert measure_overlap(timing, on_gpu=False) == pytest.approx(60 / 68)


def test_a_gpus_hours_are_the_slowest_resources(counts, timing):
    cost = cost_encoding(counts, timing, GPU)
    assert cost.steady_s.value == pytest.approx(58 / 50 * (4 * 1 + 600 * 0.1))
    assert cost.steady_s.high == pytest.approx(1.1 * cost.steady_s.value)
    assert cost.steady_s.low == pytest.approx(cost.steady_s.value / 1.1)
    assert cost.start_s == 15
    assert cost.machine_s.value == pytest.approx(cost.steady_s.value + 2 * 15)
    # tasks of 1, 1, 2, 4 shares of 8, in that order, on two actors: the last one decides
    a_task, rest = 58 / 50, 58 / 50 * 60
    slow = (a_task + rest * 1 / 8) + (a_task + rest * 4 / 8)
    assert cost.wall_s.value == pytest.approx(15 + slow, rel=0.01)


def test_actors_that_share_a_gpu_take_turns_at_it(counts, timing):
    alone = cost_encoding(counts, timing, replace(GPU, num_actors=1))
    halves = cost_encoding(counts, timing, replace(GPU, num_gpus=0.5))
    assert halves.wall_s.value == pytest.approx(alone.wall_s.value)  # the device sets the pace
    assert halves.machine_s.value == pytest.approx(alone.machine_s.value)


def test_actors_that_wait_for_decoding_can_share_a_gpu(counts, timing):
    slow = timing.stages | {"decode": Line("samples", 0, 4.0)}
    busy = timing.busy_s | {"decode": 50.0, "unet": 8.0}
    decoding = replace(timing, stages=slow, busy_s=busy)
    alone = cost_encoding(counts, decoding, replace(GPU, num_actors=1))
    halves = cost_encoding(counts, decoding, replace(GPU, num_gpus=0.5))
    assert halves.steady_s == alone.steady_s
    assert halves.wall_s.value < 0.8 * alone.wall_s.value
    assert halves.machine_s.value < 0.8 * alone.machine_s.value


def test_two_gpus_an_actor_cost_twice(counts, timing):
    one, two = (cost_encoding(counts, timing, replace(GPU, num_gpus=n)) for n in (1, 2))
    assert two.wall_s == one.wall_s
    assert two.machine_s.value == pytest.approx(2 * one.machine_s.value)


def test_actors_share_the_cores_of_a_cpu(counts, timing):
    alone = cost_encoding(counts, timing, replace(CPU, num_actors=1))
    many = cost_encoding(counts, timing, replace(CPU, num_actors=4))
    assert alone.wall_s.value - 15 == pytest.approx(alone.steady_s.value)
    # 90 CPU seconds in 60 s of wall: of two cores, three quarters were in use
    assert many.wall_s.value - 15 == pytest.approx(0.75 * alone.steady_s.value)


def test_tasks_are_played_through_in_order():
    assert schedule(np.array([3.0, 1, 1, 1]), 2) == 3
    assert schedule(np.array([1.0, 1, 1, 3]), 2) == 4
    assert schedule(np.array([5.0]), 8) == 5
    long = schedule(np.full(200_000, 2.0), 10)
    assert long == pytest.approx(40_000, rel=1e-3)


def make_head(cache, recompute, encode, *, planned=10):
    return HeadForecast(
        head="znet",
        batch=4,
        pairs=exactly(100),
        planned_epochs=planned,
        cache_epoch_s=exactly(cache),
        recompute_epoch_s=Estimate(recompute, recompute / 2, recompute * 2),
        encode_s=exactly(encode),
        cache_bytes=exactly(2.5e12),
    )


def test_the_cache_pays_once_its_encoding_is_saved():
    head = make_head(cache=10, recompute=30, encode=50)
    assert head.break_even == 3
    assert head.break_even_range == (1, 10)
    assert head.verdict == (
        "cache: pays from epoch 3 on (1 to 10), of 10 epochs planned; keeps 2.5 TB"
    )


def test_recomputing_is_advised_where_the_cache_pays_too_late_or_never():
    late = make_head(cache=10, recompute=30, encode=1000)
    assert late.verdict.startswith("recompute: the cache would pay from epoch 50 on (20 to 200),")
    never = make_head(cache=30, recompute=30, encode=1)
    assert math.isinf(never.break_even)
    assert never.verdict.startswith("recompute: an epoch from the cache is not faster here")


def test_epochs_are_said_in_whole_numbers_with_commas():
    head = make_head(cache=10, recompute=30, encode=50, planned=2890.3)
    assert head.verdict.endswith("of 2,890 epochs planned; keeps 2.5 TB")
    assert [format_epochs(x) for x in (math.inf, 0.333, 3, 12345)] == [
        "never",
        "0.33",
        "3",
        "12,345",
    ]


def test_every_array_grows_with_what_its_rows_are(layers):
    latents, features = layers
    assert rows_of_file(latents, "text") == "prompts"
    assert rows_of_file(latents, "index.parquet") == "pairs"
    assert (rows_of_file(latents, "mask"), rows_of_file(latents, "ignore")) == ("masks", "ignores")
    assert rows_of_file(latents, "image") == "views"
    assert rows_of_file(features, "block06") == "pairs"
    assert rows_of_file(latents, "rejects.parquet") is None
