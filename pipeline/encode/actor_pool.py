"""Work items on a pool of Ray Data actors: bounded tries, and memory that does not grow with them.

Data flow: items, largest first -> windows of some ten thousand -> one row, one block, one call an
item, several calls at once in an actor -> outcomes as they come. What no worker lived to answer is
run again after all others, one at a time an actor, and is failed if it is not answered then. What
was cut off since nothing ended for hours goes on as it was: slow is not deadly.

Ray carries only task names and outcomes; the actors read tars and write Zarr themselves. A window
is a dataset of its own since Ray Data's driver keeps 5-10 kB of every block until its dataset ends
(ray-project/ray issue 66016): 20,000 are some 0.2 GB, a million would be 8 GB. Between two windows
the actors start anew.
"""

import json
import logging
import random
import re
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray.data
from ray._private.log import PlainRayHandler
from ray.data.context import AutoscalingConfig
from ray.data.exceptions import ExecutionTimeoutError
from ray.util.annotations import RayDeprecationWarning

from pipeline.base.ray_cluster import NodeSize, list_nodes
from pipeline.corpus.tasks import Task
from pipeline.stage.work import TaskOutcome, WorkItem

logger = logging.getLogger(__name__)

WINDOW, WINDOW_AN_ACTOR, MAX_WINDOW = 20_000, 200, 50_000
"""Items a dataset: an actor has some hundreds, so that what its start costs is under 1 %."""
MAX_INIT_DEATHS = 10  # of workers that die as they start, one after another; Ray's default is 0
# A pool grows when its actors have three quarters of the calls that they may. It never shrinks
# while there is work: what an actor's start costs is more than what its idling does. Ray's own 1.75
# needs calls that wait at an actor, where no other can take them.
AUTOSCALING = AutoscalingConfig(
    actor_pool_util_upscaling_threshold=0.75, actor_pool_util_downscaling_threshold=0.0
)


@dataclass(frozen=True, slots=True)
class ActorBounds:
    """How many actors: as many as ``max`` where there is room, and ``min`` asked for at once.

    0 and 0 stand for none: encode in this process.
    """

    min: int
    max: int

    def __post_init__(self) -> None:
        if not (1 <= self.min <= self.max or self.min == self.max == 0):
            raise ValueError(f"actors must be 1 <= MIN <= MAX, or 0, but got {self}")

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.min}:{self.max}"

    @classmethod
    def parse(cls, text: str) -> "ActorBounds":
        """Return the bounds that ``N`` or ``MIN:MAX`` says.

        Raises:
            ValueError: it says neither.
        """
        match = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text.strip(), re.ASCII)
        try:
            if match and not (match[2] and int(match[2]) == 0):
                return cls(int(match[1]), int(match[2] or match[1]))
        except ValueError:
            pass
        raise ValueError(
            f"actors: expected N, or MIN:MAX with 1 <= MIN <= MAX, such as 16 or 2:16, got {text!r}"
        )

    def cap(self, most: int) -> "ActorBounds":
        """Return these bounds, neither above ``most``, which is at least 1."""
        return ActorBounds(min(self.min, most), min(self.max, most))


@dataclass(frozen=True, slots=True)
class Round:
    """How items are run: calls at once in an actor, tries after the first, and patience.

    Where no task ends for ``patience_s`` the dataset is ended and another goes on with what it has
    not answered: a worker may wait for a node that is gone for good, with the calls it had in hand.
    """

    in_flight: int
    retries: int
    patience_s: float


PATIENCE_S = 4 * 3600.0
"""All actors begin with the largest tars at once, and the first may end after an hour on a slow
GPU. Not for a worker that hangs: pipeline/stage/watchdog.py kills it after minutes."""
MAX_FRUITLESS = 2
"""Datasets of a round that patience ends one after another without any outcome; then the next."""
ALONE = (Round(1, 1, PATIENCE_S), Round(1, 1, 2 * PATIENCE_S))
"""The rounds after the first: a task that kills its worker takes no other along.

Two, since while Ray does not know yet that a node is lost, tries on it fail at once.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPool:
    """What runs items: a class that takes ``unpack_items`` and answers with ``pack_outcomes``.

    ``in_flight`` calls of an actor run at once in threads of their own. ``num_cpus`` and
    ``num_gpus`` are what an actor asks of its node; ``window`` is by default chosen for its actors.
    ``name`` is what Ray's dashboard and logs call the work.
    """

    actor: type
    arguments: tuple[Any, ...]
    bounds: ActorBounds
    in_flight: int
    num_cpus: float
    num_gpus: float = 0.0
    window: int | None = None
    name: str | None = None

    @property
    def window_size(self) -> int:
        """Items a dataset."""
        return self.window or min(max(WINDOW, WINDOW_AN_ACTOR * self.bounds.max), MAX_WINDOW)

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The rounds that an item may go through."""
        return (Round(self.in_flight, 3, PATIENCE_S), *ALONE)

    def count_room(self, nodes: Iterable[NodeSize]) -> int:
        """Return how many of its actors these nodes could hold."""
        return sum(node.count_actors(self.num_cpus, self.num_gpus) for node in nodes)


def unpack_items(batch: dict[str, Any]) -> list[WorkItem]:
    """Return the work items of a batch of rows."""
    plain = [json.loads(text) for text in batch["item"]]
    return [WorkItem(**{**item, "task": Task(**item["task"])}) for item in plain]


def pack_outcomes(outcomes: Iterable[TaskOutcome]) -> dict[str, list[str]]:
    """Return a batch of rows that hold outcomes."""
    return {"outcome": [json.dumps(asdict(outcome)) for outcome in outcomes]}


def order_items(items: Iterable[WorkItem], seed: int) -> list[WorkItem]:
    """Return items by their tars' sizes, the largest first, as ``seed`` has it within a factor 2.

    The largest first, so that none of them is left over for one actor at the end. At random within
    a size, so that two runs on one store seldom do the same task at the same time.
    """
    ordered = list(items)
    random.Random(seed).shuffle(ordered)
    ordered.sort(key=lambda item: item.task.num_bytes.bit_length(), reverse=True)
    return ordered


def run_items(pool: ActorPool, items: Iterable[WorkItem], *, seed: int) -> Iterator[TaskOutcome]:
    """Run items on a pool and yield an outcome of each, as they come.

    Ray must be started. A worker that dies is replaced and its items tried again; what is not
    answered goes through the rounds, and is failed after the last.
    """
    size = pool.window_size
    left = order_items(items, seed)
    for number, round_ in enumerate(pool.rounds):
        unanswered: list[WorkItem] = []
        for start in range(0, len(left), size):
            window = left[start : start + size]
            unanswered += yield from _run_window(pool, window, round_, first=number == 0)
        left = unanswered
    for item in left:
        yield TaskOutcome(task=item.task.id, status="failed", error=_explain(pool))


def _explain(pool: ActorPool) -> str:
    tries = sum(round_.retries + 1 for round_ in pool.rounds)
    return (
        f"WorkerDied: no answer in {tries} tries, the last {len(ALONE) * 2} alone in its worker: "
        "out of memory, a crash, or killed as it hung. See the worker's log in Ray's session "
        "folder (/tmp/ray/session_latest/logs), or set LDZNET_LOG=info; `ldznet encode --actors 0 "
        "--corpus` with this tar alone runs it in one process"
    )


def _run_window(
    pool: ActorPool, items: Sequence[WorkItem], round_: Round, *, first: bool
) -> Generator[TaskOutcome, None, list[WorkItem]]:
    """Yield the outcomes of one window; return what was not answered.

    What patience cut off is run again as it was, for it killed nobody, the last first. While no
    node could hold a worker it waits: nothing was tried.
    """
    waiting = {item.task.id: item for item in items}
    num_fruitless = 0
    while waiting and num_fruitless < MAX_FRUITLESS:
        num_before = len(waiting)
        room = pool.count_room(list_nodes())
        if not room:
            logger.warning(
                "no node of the cluster can hold a worker (%g CPU, %g GPU); waiting for one",
                pool.num_cpus,
                pool.num_gpus,
            )
        # At first as many as are asked for, so that the cluster's autoscaler hears of them all.
        floor = pool.bounds.min if first else max(1, min(pool.bounds.min, room))
        bounds = ActorBounds(floor, pool.bounds.max).cap(len(waiting))
        try:
            for outcome in _run_dataset(pool, list(waiting.values()), round_, bounds):
                if waiting.pop(outcome.task, None) is not None:
                    yield outcome
            break
        except ExecutionTimeoutError:
            logger.warning(
                "no task ended in %.0f min; %d are tried again",
                round_.patience_s / 60,
                len(waiting),
            )
            # What had begun was first: a task that hangs must not keep the same others waiting.
            waiting = dict(reversed(waiting.items()))
            if len(waiting) < num_before:
                num_fruitless = 0
            elif pool.count_room(list_nodes()):
                num_fruitless += 1
    return list(waiting.values())


def _run_dataset(
    pool: ActorPool, items: Sequence[WorkItem], round_: Round, bounds: ActorBounds
) -> Iterator[TaskOutcome]:
    """Run items in one dataset; yield an outcome of each that a worker lived to answer.

    Calls never wait at an actor: one that is free takes the next.
    """
    _set_context(round_)
    rows = [{"item": json.dumps(asdict(item))} for item in items]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # no named parameter replaces these
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            pool.actor,
            fn_constructor_args=pool.arguments,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=bounds.min,
                max_size=bounds.max,
                max_concurrent_calls_per_actor=round_.in_flight,
                max_tasks_in_flight_per_actor=round_.in_flight,
                enable_true_multi_threading=True,
            ),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
            max_restarts=-1,  # a dead worker is always replaced
            max_task_retries=round_.retries,  # Ray Data's own default is for ever
        )
    del rows
    if pool.name is not None:
        dataset.set_name(pool.name)
    # iter_rows holds an outcome back until the next has come, and loses it where that never does.
    for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        for text in batch["outcome"]:
            yield TaskOutcome(**json.loads(text))


def _set_context(round_: Round) -> None:
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = -1
    context.actor_task_retry_on_errors = False  # the stage turns a task's faults into outcomes
    context.max_consecutive_actor_init_deaths = MAX_INIT_DEATHS
    context.execution_no_progress_timeout_s = round_.patience_s
    context.autoscaling_config = AUTOSCALING
    context.enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        # Its console alone: its log file keeps everything, and whoever put another handler there
        # (pytest gives its own to each logger that does not propagate) hears us by it too.
        if isinstance(handler, PlainRayHandler):
            handler.setLevel(logging.ERROR)
