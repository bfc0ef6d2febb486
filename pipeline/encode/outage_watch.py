"""The command's own look at store and corpus while workers work.

Workers wait for an outage in their own processes, and tell nothing before a task's end. So the
command asks both for something small now and then: its progress then says what is waited for.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from pipeline.base.outages import PATIENCE
from pipeline.base.remote_copy import as_oserror, open_filesystem, retry
from pipeline.stage.work import EncodeConfig, WorkItem
from pipeline.storage.open import open_storage

logger = logging.getLogger(__name__)
ASK_EVERY_S = 10.0


@contextmanager
def watching(config: EncodeConfig, items: Sequence[WorkItem]) -> Iterator[None]:
    """In the block, ask the store where it is on S3, and a tar where it is remote."""
    over = threading.Event()
    asks: list[Callable[[], object]] = []
    if config.store_url.startswith("s3://"):
        storage = open_storage(config.store_url)
        asks.append(partial(storage.exists, f"{config.latents.folder}/spec.json"))
    urls = (item.task.url for item in items)
    url = next((url for url in urls if "://" in url and not url.startswith("file://")), None)
    if url is not None:
        asks.append(partial(_read_byte, url))
    for ask in asks:
        threading.Thread(target=_keep_asking, args=(ask, over), daemon=True).start()
    try:
        with PATIENCE.asking(over.is_set):
            yield
    finally:
        over.set()


def _keep_asking(ask: Callable[[], object], over: threading.Event) -> None:
    while not over.wait(ASK_EVERY_S):
        try:
            ask()
        except OSError as error:  # a worker that meets it fails its task and says so
            logger.debug("%s", error)


def _read_byte(url: str) -> None:
    filesystem, path = open_filesystem(url)

    def read() -> None:
        with as_oserror(url):
            filesystem.cat_file(path, start=0, end=1)

    retry(read, what=url)
