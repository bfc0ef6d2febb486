"""The command's own look at store and corpus while workers work: ``outages.watching`` says why."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from pipeline.base.outages import watching
from pipeline.base.remote_copy import as_oserror, open_filesystem, retry
from pipeline.stage.work import EncodeConfig, WorkItem
from pipeline.storage.open import list_asks, open_storage


def watching_run(config: EncodeConfig, items: Sequence[WorkItem]) -> AbstractContextManager[None]:
    """In the block, ask for the store where it is on S3, and for a tar where it is remote."""
    asks: list[Callable[[], object]] = list_asks(open_storage(config.store_url))
    urls = (item.task.url for item in items if item.latents is None)  # those that are read
    url = next((url for url in urls if "://" in url and not url.startswith("file://")), None)
    return watching([*asks, partial(_read_byte, url)] if url else asks)


def _read_byte(url: str) -> None:
    filesystem, path = open_filesystem(url)

    def read() -> None:
        with as_oserror(url):
            filesystem.cat_file(path, start=0, end=1)

    retry(read, what=url)
