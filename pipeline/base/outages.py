"""Outages: waits for servers of stores and corpora that do not answer for a while.

A request that fails with ``OutageError`` is made again, with capped, random pauses, until patience
ends. The waiting is done here, in short sleeps and not in a library's call, so that a signal ends
it at once. One ``Patience`` serves a process: an outage is one, however many requests meet it.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from pipeline.base.forks import renew_in_child
from pipeline.base.progress_text import format_duration

logger = logging.getLogger(__name__)
T = TypeVar("T")

TOTAL_S = 600.0
"""Amazon S3 answers 503 for minutes while it splits a prefix that is busy."""
FIRST_S = 10.0
"""Before the first answer: an endpoint that is spelt wrong must not wait for minutes."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 10.0
TOLD_AFTER_S = 5.0  # shorter waits are nobody's business
ASK_EVERY_S = 10.0
_TICK_S = 0.5  # how soon a wait sees that it is to end


class OutageError(OSError):
    """A server that did not answer, or said that it cannot now, for longer than was waited.

    The same request may pass later: it says nothing about what was asked for. ``reason`` is the
    failure in a few words, such as "HTTP 503 SlowDown".
    """

    reason = "no answer"

    @classmethod
    def because(cls, reason: str, message: str) -> "OutageError":
        """Return an error with its reason."""
        error = cls(message)
        error.reason = reason
        return error


@dataclass(slots=True)
class _Server:
    """What this process knows of a server; times are the clock's, None before there is one."""

    name: str
    answered_s: float | None = None  # the last answer
    since_s: float = 0.0  # the first failure of those that are waited out
    since: str = ""  # the same for people, as 14:03:10
    reason: str = ""
    limit_s: float = 0.0
    num_waiting: int = 0
    told: bool = False

    @property
    def silent(self) -> bool:
        """Whether nothing was answered since the first failure."""
        return bool(self.since) and (self.answered_s is None or self.answered_s < self.since_s)

    def describe(self) -> str:
        return (
            f"{self.name} has not answered since {self.since} ({self.reason}), waiting up to "
            f"{format_limit(self.limit_s)}"
        )


class Patience:
    """How long a process waits for a server that does not answer; threads share it.

    It is of an outage, not of a request: who comes when patience has ended is told after one try.
    While a server answers others, each request has it for itself.

    Attributes:
        total_s: how long to wait, of a server that has answered this process.
        trusted: whether another process has had an answer, so that ``FIRST_S`` does not hold.
        askers: called every half second of a wait; True ends it.
    """

    def __init__(
        self,
        total_s: float = TOTAL_S,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.total_s, self.trusted = total_s, False
        self.askers: list[Callable[[], bool]] = []
        self._clock, self._sleep = clock, sleep
        self._servers: dict[str, _Server] = {}
        renew_in_child(self)

    def renew(self) -> None:
        """Take another lock and forget who waits: the threads of a forked child's parent do."""
        self._lock = threading.Lock()
        for server in self._servers.values():
            server.num_waiting, server.since, server.told = 0, "", False

    def ride_out(self, action: Callable[[], T], *, url: str) -> T:
        """Return ``action()``, called again while it raises ``OutageError`` and patience lasts.

        ``url`` names the server, by its scheme and host or bucket.

        Raises:
            OutageError: patience ended, or an asker ended the wait; says since when.
        """
        server = self._find_server(url)
        began_s: float | None = None
        num_tries = 0
        try:
            while True:
                try:
                    result = action()
                except OutageError as error:
                    num_tries += 1
                    if began_s is None:
                        began_s = self._begin(server)
                    if not self._pause(server, error, began_s, num_tries):
                        raise self._give_up(server, error, num_tries) from error.__cause__
                except OSError:
                    self._note_answer(server)
                    raise
                else:
                    self._note_answer(server)
                    return result
        finally:
            if began_s is not None:
                self._leave(server)

    @contextmanager
    def asking(self, asker: Callable[[], bool]) -> Iterator[None]:
        """Have an asker among ``askers`` in a block."""
        self.askers.append(asker)
        try:
            yield
        finally:
            self.askers.remove(asker)

    def stop(self) -> None:
        """End all waits of this process, for good: it is to end. A signal handler may call this."""
        self.askers.append(lambda: True)

    def describe(self) -> str:
        """Return which servers are waited for and since when, "" for none: for progress."""
        with self._lock:
            waited = [server for server in self._servers.values() if server.num_waiting]
            return "; ".join(server.describe() for server in waited if server.told)

    def _find_server(self, url: str) -> _Server:
        parts = urlsplit(url)
        name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.scheme else url
        with self._lock:
            return self._servers.setdefault(name, _Server(name))

    def _begin(self, server: _Server) -> float:
        """Note that a request waits; return when it began to."""
        now_s = self._clock()
        with self._lock:
            if not server.since:
                server.since_s, server.since = now_s, time.strftime("%H:%M:%S")
            server.num_waiting += 1
        return now_s

    def _pause(self, server: _Server, error: OutageError, began_s: float, num_tries: int) -> bool:
        """Wait before the next try; False if there is none."""
        with self._lock:
            first = server.answered_s is None and not self.trusted
            server.limit_s = min(self.total_s, FIRST_S) if first else self.total_s
            server.reason = error.reason
            end_s = (server.since_s if server.silent else began_s) + server.limit_s
        pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** min(num_tries - 1, 10))
        pause_s *= random.uniform(0.5, 1)  # not all workers that met an outage at the same moment
        until_s = min(self._clock() + pause_s, end_s)
        if self._clock() >= end_s:
            return False
        while (left_s := until_s - self._clock()) > 0:
            self._sleep(min(left_s, _TICK_S))
            self._tell(server)
            answers = [ask() for ask in list(self.askers)]  # each is called
            if any(answers):
                return False
        return True

    def _tell(self, server: _Server) -> None:
        """Log once that an outage has begun."""
        with self._lock:
            if server.told or self._clock() - server.since_s < TOLD_AFTER_S:
                return
            server.told = True
            text = server.describe()
        logger.warning("%s", text)

    def _note_answer(self, server: _Server) -> None:
        server.answered_s = self._clock()
        if server.since:
            self._end_if_over(server)

    def _leave(self, server: _Server) -> None:
        with self._lock:
            server.num_waiting -= 1
        if not server.silent:
            self._end_if_over(server)

    def _end_if_over(self, server: _Server) -> None:
        """End an outage once nobody waits for it any more; log that if its begin was."""
        with self._lock:
            if server.num_waiting or not server.since:
                return
            lasted_s, told = self._clock() - server.since_s, server.told
            server.since, server.told = "", False
        if told:
            logger.warning("%s answers again, after %s", server.name, format_duration(lasted_s))

    def _give_up(self, server: _Server, error: OutageError, num_tries: int) -> OutageError:
        lasted = format_duration(self._clock() - server.since_s)
        return type(error).because(
            error.reason,
            f"{error}; {server.name} has not answered since {server.since}, for {lasted} (tries: "
            f"{num_tries}). Look at the server and the way to it, then run the same command again",
        )


def format_limit(limit_s: float) -> str:
    """Return how long patience is: ``10 min``, ``10 s``."""
    return f"{limit_s / 60:g} min" if limit_s >= 60 else f"{limit_s:g} s"


PATIENCE = Patience()
"""This process's; a command sets its ``total_s``, and workers take their command's."""


@contextmanager
def watching(asks: Iterable[Callable[[], object]]) -> Iterator[None]:
    """Call ``asks``, small requests, now and then while workers do the work of a block.

    Workers wait for an outage in their own processes, and tell nothing before a task's end. With
    requests of its own the command meets it too, and its progress says what is waited for.
    """
    over = threading.Event()

    def keep_asking(ask: Callable[[], object]) -> None:
        while not over.wait(ASK_EVERY_S):
            try:
                ask()
            except OSError as error:  # a worker that meets it fails and says so
                logger.debug("%s", error)

    for ask in asks:
        threading.Thread(target=keep_asking, args=(ask,), name="watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()
