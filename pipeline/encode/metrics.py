"""Ray metrics of encode actors and their driver, which Prometheus scrapes from every node.

Ray serves them on each node's metrics port where ``ray[default]`` is installed (``ray start
--metrics-export-port``; the head writes a file of all nodes for Prometheus' file_sd_config,
/tmp/ray/prom_metrics_service_discovery.json). Prometheus sees, with the label ``layer`` and Ray's
own (NodeAddress, SessionName, WorkerId, Component, JobId):

    ray_ldznet_encode_tasks_total{status}            committed, lost, failed
    ray_ldznet_encode_pairs_total
    ray_ldznet_encode_written_bytes_total            of committed files
    ray_ldznet_encode_rejects_total{reason}
    ray_ldznet_encode_stage_seconds_total{stage}     threads' or device's time, of STAGES
    ray_ldznet_encode_task_duration_seconds          histogram: _bucket{le}, _count, _sum
    ray_ldznet_encode_last_task_timestamp_seconds    gauge: when a task ended last, since the epoch
    ray_ldznet_encode_actors{state}                  gauge of the driver: alive, max

Such as ``sum(rate(ray_ldznet_encode_pairs_total[5m]))`` for pairs a second and
``sum by (stage) (rate(ray_ldznet_encode_stage_seconds_total[5m]))`` for actors at work in a stage.
Ray carries a histogram as counts of its buckets: its ``_sum`` is of their midpoints.
"""

import time
from collections.abc import Iterator

from ray.util.metrics import Counter, Gauge, Histogram

from pipeline.stage.work import EncodeConfig, TaskOutcome

# Seconds, doubling: a tar of some hundred pairs takes seconds on a GPU, minutes on a CPU.
DURATION_BUCKETS_S = [float(2**power) for power in range(13)]

# Names, units and the suffix _total as https://prometheus.io/docs/practices/naming/ has them.
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ldznet_encode_tasks_total": ("Tasks that ended, by status.", ("status",)),
    "ldznet_encode_pairs_total": ("Pairs of tasks that were committed.", ()),
    "ldznet_encode_written_bytes_total": ("Bytes of committed files.", ()),
    "ldznet_encode_rejects_total": ("Rejected samples, members and pairs, by reason.", ("reason",)),
    "ldznet_encode_stage_seconds_total": ("Time worked in a stage.", ("stage",)),
}


class EncodeMetrics:
    """The metrics of one actor; created once, in the actor's own process."""

    def __init__(self, config: EncodeConfig) -> None:
        self._layer = {"layer": _name_layer(config)}
        self._counters = {
            name: Counter(name, description, ("layer", *labels))
            for name, (description, labels) in _COUNTERS.items()
        }
        self._duration = Histogram(
            "ldznet_encode_task_duration_seconds",
            "Time from a task's start to its end, beside others.",
            boundaries=DURATION_BUCKETS_S,
            tag_keys=("layer",),
        )
        self._last = Gauge(
            "ldznet_encode_last_task_timestamp_seconds",
            "When a task ended last, in seconds since the epoch.",
            ("layer",),
        )

    def record(self, outcome: TaskOutcome) -> None:
        """Count one outcome. Takes microseconds; Ray sends the sums every few seconds."""
        for name, value, labels in list_increases(outcome):
            self._counters[name].inc(value, {**self._layer, **labels})
        self._duration.observe(outcome.elapsed_s, self._layer)
        self._last.set(time.time(), self._layer)


class ActorGauge:
    """The driver's gauge of the actors that are alive, beside their maximum."""

    def __init__(self, config: EncodeConfig, *, num_max: int) -> None:
        self._layer, self._num_max = {"layer": _name_layer(config)}, num_max
        self._gauge = Gauge(
            "ldznet_encode_actors", "Actors alive, and at most.", ("layer", "state")
        )

    def set_alive(self, number: int) -> None:
        """Set how many are alive now."""
        self._gauge.set(number, {**self._layer, "state": "alive"})
        self._gauge.set(self._num_max, {**self._layer, "state": "max"})


def _name_layer(config: EncodeConfig) -> str:
    return (config.features or config.latents).folder


def list_increases(outcome: TaskOutcome) -> Iterator[tuple[str, float, dict[str, str]]]:
    """Yield (counter, increase above 0, labels beside ``layer``) of an outcome."""
    yield "ldznet_encode_tasks_total", 1, {"status": outcome.status}
    if outcome.status == "committed" and outcome.num_pairs:
        yield "ldznet_encode_pairs_total", outcome.num_pairs, {}
    if outcome.num_bytes:
        yield "ldznet_encode_written_bytes_total", outcome.num_bytes, {}
    for reason, count in outcome.rejects.items():
        if count > 0 and outcome.status != "lost":
            yield "ldznet_encode_rejects_total", count, {"reason": reason}
    for stage, seconds in outcome.busy_s.items():
        if seconds > 0:
            yield "ldznet_encode_stage_seconds_total", seconds, {"stage": stage}
