"""Runs work items on a pool of Ray Data actors, with a bounded number of tries.

Items go largest first, in windows of some ten thousand; an item is one row, one block and one call,
and an actor runs several calls at once. Tasks whose worker died are retried last, alone in an
actor, then failed.

Ray carries only tasks and outcomes; actors read tars and write Zarr themselves. A window is a
dataset of its own because Ray Data's driver keeps 5-10 kB of every block until its dataset ends
(ray-project/ray issue 66016): 20,000 are some 0.2 GB, a million would be 8 GB. Actors start anew
between two windows.
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
from pipeline.store.commit import Marks

logger = logging.getLogger(__name__)

WINDOW, WINDOW_AN_ACTOR, MAX_WINDOW = 20_000, 200, 50_000
"""Items a dataset: some hundreds an actor, so that an actor's start costs under 1 % of its time."""
MAX_INIT_DEATHS = 10  # of actors that die as they start, one after another; Ray's default is 0
# A pool grows when its actors have three quarters of their calls. It never shrinks while there is
# work: an actor's start costs more than its idling. Ray's own upscaling threshold of 1.75 would
# need calls that wait at an actor, where no other actor can take them.
AUTOSCALING = AutoscalingConfig(
    actor_pool_util_upscaling_threshold=0.75, actor_pool_util_downscaling_threshold=0.0
)


@dataclass(frozen=True, slots=True)
class ActorBounds:
    """Number of actors: ``min`` are asked for at once, up to ``max`` where there is room.

    0 and 0 mean no actors: encode in this process.
    """

    min: int
    max: int

    @classmethod
    def parse(cls, text: str) -> "ActorBounds":
        """Parse ``N`` or ``MIN:MAX``.

        Raises:
            ValueError: it is neither.
        """
        if match := re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text.strip()):
            low, high = int(match[1]), int(match[2] or match[1])
            if 1 <= low <= high or (low == 0 and match[2] is None):
                return cls(low, high)
        raise ValueError(
            f"actors: expected N, or MIN:MAX with 1 <= MIN <= MAX, such as 16 or 2:16, got {text!r}"
        )

    def cap(self, most: int) -> "ActorBounds":
        """Return these bounds, both at most ``most``, which is at least 1."""
        return ActorBounds(min(self.min, most), min(self.max, most))


@dataclass(frozen=True, slots=True)
class Round:
    """How items are tried.

    If no task ends for ``patience_s`` the dataset is ended, and another one runs the items that are
    not answered: Ray may wait for a node that is gone for good, with the calls that it had.
    """

    in_flight: int  # calls at once in an actor
    retries: int  # tries after the first
    patience_s: float


PATIENCE_S = 4 * 3600.0
"""All actors start with the largest tars, and the first may end after an hour on a slow GPU. Not
for a process that hangs: pipeline/stage/watchdog.py kills it after minutes."""
MAX_FRUITLESS = 2
"""Datasets that patience may end one after another without any outcome, before the next round."""
ALONE = (Round(1, 1, PATIENCE_S), Round(1, 1, 2 * PATIENCE_S))
"""The rounds after the first: a task that kills its worker is alone in it.

Two rounds, because tries on a lost node fail at once until Ray knows that it is lost.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPool:
    """A pool of actors that run work items."""

    actor: type  # called with a row for ``unpack_item``, returns ``pack_outcome``'s
    arguments: tuple[Any, ...]  # of its constructor
    bounds: ActorBounds
    in_flight: int  # calls at once in an actor, each in a thread
    num_cpus: float  # that an actor asks of its node
    num_gpus: float = 0.0
    window: int | None = None  # items a dataset; None: chosen by the number of actors
    name: str | None = None  # in Ray's dashboard and logs
    avoided: tuple[str, ...] = ()  # ids of nodes that get no actor

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The rounds that an unanswered item goes through."""
        return (Round(self.in_flight, 3, PATIENCE_S), *ALONE)

    def count_room(self, nodes: Iterable[NodeSize]) -> int:
        """Return how many of its actors these nodes can hold."""
        return sum(node.count_actors(self.num_cpus, self.num_gpus) for node in nodes)

    @property
    def label_selector(self) -> dict[str, str]:
        """The labels of nodes that may hold an actor, as Ray takes them."""
        return {"ray.io/node-id": f"!in({','.join(self.avoided)})"} if self.avoided else {}


def pack_item(item: WorkItem) -> dict[str, str]:
    """Return a row that holds a work item."""
    return {"item": json.dumps(asdict(item), default=dict)}  # marks are no dataclass


def unpack_item(batch: dict[str, Any]) -> WorkItem:
    """Return the work item of a batch of one row."""
    (text,) = batch["item"]
    item = json.loads(text)
    task = Task(**item["task"] | {"marks": Marks(**item["task"]["marks"])})
    return WorkItem(**item | {"task": task})


def pack_outcome(outcome: TaskOutcome) -> dict[str, list[str]]:
    """Return a batch of one row that holds an outcome."""
    return {"outcome": [json.dumps(asdict(outcome))]}


def order_items(items: Iterable[WorkItem], seed: int) -> list[WorkItem]:
    """Order items by their tars' sizes, the largest first, at random within a factor of 2.

    So no large tar is left for one actor at the end, and two runs on one store seldom encode the
    same task at the same time.
    """
    ordered = list(items)
    random.Random(seed).shuffle(ordered)
    ordered.sort(key=lambda item: item.task.num_bytes.bit_length(), reverse=True)
    return ordered


def run_items(
    pool: ActorPool, items: Iterable[WorkItem], *, seed: int
) -> Generator[TaskOutcome, None, None]:
    """Run items on a pool and yield an outcome of each, as they end; Ray must be started.

    A worker that dies is replaced and its items are tried again. An item without an answer goes
    through the rounds, and is failed after the last.
    """
    size = pool.window or min(max(WINDOW, WINDOW_AN_ACTOR * pool.bounds.max), MAX_WINDOW)
    left = order_items(items, seed)
    for number, round_ in enumerate(pool.rounds):
        unanswered: list[WorkItem] = []
        for start in range(0, len(left), size):
            window = left[start : start + size]
            unanswered += yield from _run_window(pool, window, round_, first=number == 0)
        left = unanswered
    tries = sum(round_.retries + 1 for round_ in pool.rounds)
    reason = (
        f"WorkerDied: no answer in {tries} tries, the last {len(ALONE) * 2} alone in its worker: "
        "out of memory, a crash, or killed as it hung. See the worker's log in Ray's session "
        "folder (/tmp/ray/session_latest/logs), or set LDZNET_LOG=info; `ldznet encode --actors 0 "
        "--corpus` with this tar alone runs it in one process"
    )
    for item in left:
        yield TaskOutcome(task=item.task.id, status="failed", error=reason)


def _run_window(
    pool: ActorPool, items: Sequence[WorkItem], round_: Round, *, first: bool
) -> Generator[TaskOutcome, None, list[WorkItem]]:
    """Yield the outcomes of one window; return the items without an answer.

    Items that patience cut off are run again as they were, the last first. A dataset does not count
    as fruitless while no node can hold a worker: nothing was tried.
    """
    waiting = {item.task.id: item for item in items}
    num_fruitless = 0
    while waiting and num_fruitless < MAX_FRUITLESS:
        num_before = len(waiting)
        room = pool.count_room(list_nodes(pool.avoided))
        if not room:
            logger.warning(
                "no node of the cluster can hold a worker (%g CPU, %g GPU); waiting for one",
                pool.num_cpus,
                pool.num_gpus,
            )
        # At first ask for all, so that the cluster's autoscaler starts nodes for them.
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
            # Those that had begun were first: a task that hangs must not delay the others again.
            waiting = dict(reversed(waiting.items()))
            if len(waiting) < num_before:
                num_fruitless = 0
            elif pool.count_room(list_nodes(pool.avoided)):
                num_fruitless += 1
    return list(waiting.values())


def _run_dataset(
    pool: ActorPool, items: Sequence[WorkItem], round_: Round, bounds: ActorBounds
) -> Iterator[TaskOutcome]:
    """Run items in one dataset; yield the outcome of each that a worker answered.

    Calls never wait at an actor: a free one takes the next.
    """
    _set_context(round_)
    rows = [pack_item(item) for item in items]
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
            label_selector=pool.label_selector,
            max_restarts=-1,  # a dead worker is always replaced
            max_task_retries=round_.retries,  # Ray Data's own default is for ever
        )
    del rows
    if pool.name is not None:
        dataset.set_name(pool.name)
    # iter_rows holds each outcome back until the next comes, and loses it if none does.
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            for text in batch["outcome"]:
                yield TaskOutcome(**json.loads(text))
    finally:  # else its thread goes on, and says on the terminal that Ray is gone
        dataset._synchronize_progress_bar()  # which is to end the executor


def _set_context(round_: Round) -> None:
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = -1
    context.actor_task_retry_on_errors = False  # the stage turns a task's faults into outcomes
    context.max_consecutive_actor_init_deaths = MAX_INIT_DEATHS
    context.execution_no_progress_timeout_s = round_.patience_s
    context.autoscaling_config = AUTOSCALING
    context.enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        # The console alone: Ray's log file keeps everything, and handlers of others (pytest's own)
        # keep their level.
        if isinstance(handler, PlainRayHandler):
            handler.setLevel(logging.ERROR)
