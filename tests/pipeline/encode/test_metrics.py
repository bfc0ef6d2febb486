"""What an actor's outcomes become at a node's metrics port, and what each adds to the counters."""

import re
import time
import urllib.request

import pytest
import ray
from ray._private.utils import get_dashboard_dependency_error

from pipeline.bench.store import make_layers
from pipeline.encode import metrics as encode_metrics
from pipeline.encode.metrics import ActorGauge, EncodeMetrics, list_increases
from pipeline.stage.work import STAGES, EncodeConfig, TaskOutcome

OUTCOMES = [
    TaskOutcome(
        task="a", status="committed", num_pairs=7, num_bytes=1000, elapsed_s=3.0,
        busy_s={"unet": 1.5, "vae": 0.5, "read": 0.0}, rejects={"no_text": 2, "bad_image": 1},
    ),
    TaskOutcome(task="b", status="lost", num_pairs=5, num_bytes=10, rejects={"no_text": 1}),
    TaskOutcome(task="c", status="failed", error="OSError: gone"),
]  # fmt: skip
SUMS = {
    ("tasks_total", "committed"): 1,
    ("tasks_total", "lost"): 1,
    ("tasks_total", "failed"): 1,
    ("pairs_total", ""): 7,
    ("written_bytes_total", ""): 1010,
    ("rejects_total", "no_text"): 2,  # those of a lost task are the other run's
    ("rejects_total", "bad_image"): 1,
    ("stage_seconds_total", "unet"): 1.5,
    ("stage_seconds_total", "vae"): 0.5,
}


def make_config():
    latents, features = make_layers()
    return EncodeConfig("store", latents, features, batch=1)


def test_outcomes_add_up_to_the_counters():
    sums = {}
    for outcome in OUTCOMES:
        for name, value, labels in list_increases(outcome):
            key = (name.removeprefix("ldznet_encode_"), *(labels.values() or [""]))
            sums[key] = sums.get(key, 0) + value
    assert sums == SUMS


def test_ray_takes_every_outcome(caplog):
    metrics = EncodeMetrics(make_config())
    for outcome in OUTCOMES:
        metrics.record(outcome)
    everything = TaskOutcome(task="d", status="committed", busy_s=dict.fromkeys(STAGES, 1.0))
    metrics.record(everything)
    assert not caplog.records


def test_the_documented_names_are_those_there_are():
    documented = set(re.findall(r"ray_(ldznet_encode_\w+?)[\s{\[]", encode_metrics.__doc__))
    metrics = EncodeMetrics(make_config())
    there = {counter.info["name"] for counter in metrics._counters.values()}
    there |= {metrics._duration.info["name"], metrics._last.info["name"]}
    there.add(ActorGauge(make_config(), num_max=2)._gauge.info["name"])
    assert documented == there


@ray.remote(num_cpus=0)
class Actor:
    def __init__(self, config):
        self._metrics = EncodeMetrics(config)

    def record(self, outcomes):
        for outcome in outcomes:
            self._metrics.record(outcome)


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return answer.read().decode()


def read_series(text):
    """{(name, status, reason or stage): value}, and the layers named."""
    found, layers = {}, set()
    for name, labels, value in re.findall(r"^ray_ldznet_encode_(\w+)\{(.*)\} (\S+)$", text, re.M):
        plain = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        layers.add(plain["layer"])
        key = plain.get("status") or plain.get("reason") or plain.get("stage") or plain.get("le")
        found[name, key or ""] = float(value)
    return found, layers


@pytest.mark.slow
@pytest.mark.skipif(
    get_dashboard_dependency_error() is not None,
    reason="Ray serves metrics only where ray[default] is installed",
)
def test_prometheus_finds_the_series_of_an_actor():
    ray.init(
        address="local", num_cpus=1, include_dashboard=False,
        _system_config={"metrics_report_interval_ms": 1000},
    )  # fmt: skip
    try:
        config = make_config()
        actor = Actor.remote(config)
        ray.get(actor.record.remote(OUTCOMES))
        port = ray.nodes()[0]["MetricsExportPort"]
        deadline_s = time.monotonic() + 60
        found = {}
        while not found.keys() >= SUMS.keys() and time.monotonic() < deadline_s:
            time.sleep(1.0)
            found, layers = read_series(scrape(port))
        assert {key: found.get(key) for key in SUMS} == SUMS
        assert layers == {config.features.folder}
        assert found["task_duration_seconds_count", ""] == len(OUTCOMES)
        assert found["task_duration_seconds_bucket", "4.0"] == len(OUTCOMES)
        assert found["last_task_timestamp_seconds", ""] == pytest.approx(time.time(), abs=3600)
    finally:
        ray.shutdown()
