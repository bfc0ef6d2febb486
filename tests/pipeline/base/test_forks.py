"""A forked child takes no lock that a thread of its parent held, and can itself be forked."""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from models.ldm import text_encoder
from pipeline.base.lru_cache import LruCache
from pipeline.base.outages import Patience
from pipeline.read.batch import BatchMemory
from pipeline.read.gather import RowGatherer
from pipeline.read.prompt_embedder import PromptEmbedder
from tests.support.forked import run_forked


@contextmanager
def held(lock):
    """Have another thread hold a lock in the block."""
    taken, over = threading.Event(), threading.Event()

    def hold():
        with lock:
            taken.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Embedder(PromptEmbedder):
    def _encode(self, prompt):
        return {"text": np.full((1, 2), len(prompt), np.float16)}


USES = {
    "cache": (LruCache(10), lambda cache: cache.get_or_make("key", lambda: 1)),
    "patience": (Patience(), lambda patience: patience.ride_out(lambda: 1, url="s3://bucket")),
    "memory": (BatchMemory(pinned=False), lambda memory: memory.allocate((3,), "uint8")),
    "embedder": (_Embedder(None, device=None, model=None), lambda one: one.embed(["a cat"])),
}


@pytest.mark.parametrize("name", USES)
def test_a_lock_that_is_held_at_the_fork_is_not_waited_for(name):
    thing, use = USES[name]
    with held(thing._lock):
        run_forked(lambda: use(thing))
        run_forked(lambda: run_forked(lambda: use(thing)))
    use(thing)


def test_a_cache_is_empty_in_a_child_and_stays_in_the_parent():
    cache = LruCache(10)
    cache.put("key", 1)

    def look():
        assert (len(cache), cache.cost) == (0, 0)
        assert cache.get_or_make("key", lambda: 2) == 2

    run_forked(look)
    assert cache.get("key") == 1


def test_threads_that_read_are_started_anew():
    gatherer = RowGatherer(None, pinned=False, num_threads=2)

    def read():
        done = []
        gatherer.run([lambda: done.append(time.sleep(0.001))] * 20)
        assert len(done) == 20

    for _ in range(3):  # so that its thread is there, and idle
        read()
    run_forked(read)
    read()


def test_an_outage_that_the_parent_waits_for_is_not_the_childs():
    patience = Patience()
    server = patience._find_server("s3://bucket")
    patience._begin(server)
    server.told = True
    assert patience.describe()

    def look():
        assert not patience.describe()

    run_forked(look)


def test_a_fork_waits_for_the_end_of_a_call_of_the_tokenizer():
    taken = threading.Event()

    def tokenize():
        with text_encoder._TOKENIZING:
            taken.set()
            time.sleep(0.1)

    thread = threading.Thread(target=tokenize)
    thread.start()
    taken.wait()

    def look():
        assert text_encoder._TOKENIZING.acquire(timeout=10)

    run_forked(look)
    thread.join()
