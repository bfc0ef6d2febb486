"""Files of an HTTP server: their sizes, and the spellings of their URLs."""

import re
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from fsspec import AbstractFileSystem


async def read_head(filesystem: AbstractFileSystem, url: str) -> dict[str, Any]:
    """Ask an HTTP server for a file's size and marks: by HEAD, else by a GET of its first byte.

    fsspec's ``info`` takes every error for "not found", and its GET is of the whole file.
    """
    session = await filesystem.set_session()
    options = dict(filesystem.kwargs)
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    asked = filesystem.encode_url(url)
    info: dict[str, Any] = {"name": url, "type": "file", "size": None}
    for method, more in (("HEAD", {}), ("GET", {"Range": "bytes=0-0"})):
        async with session.request(method, asked, headers=headers | more, **options) as answer:
            size = _read_size(answer.status, answer.headers)
            if method == "GET" and size is None:
                if answer.status in (404, 410):
                    raise FileNotFoundError(url)
                answer.raise_for_status()
            if answer.status < 300:
                if answer.url.path == asked.path.rstrip("/") + "/":  # where servers have folders
                    return info | {"type": "directory"}
                info.update((name, answer.headers.get(name)) for name in ("ETag", "Last-Modified"))
            if size or method == "GET":  # a HEAD that tells 0 may not know
                return info | {"size": size}
    raise AssertionError("unreachable")


def _read_size(status: int, headers: Any) -> int | None:
    """Return the whole file's size that an answer tells."""
    total = headers.get("Content-Range", "").rpartition("/")[2]
    if status in (206, 416) and total.isdigit():
        return int(total)
    length = headers.get("Content-Length", "")
    packed = headers.get("Content-Encoding", "identity") not in ("", "identity")
    return int(length) if status == 200 and length.isdigit() and not packed else None


def resolve_dots(url: str) -> str:
    """Return a URL with ``.`` and ``..`` resolved, as every client does before it asks."""
    if not re.search(r"/\.{1,2}(/|$)", url):
        return url
    return urljoin(url, urlsplit(url).path)


def identify_url(url: str, size: int) -> tuple[str, int]:
    """Return what is the same for two spellings of a URL that a server takes for one."""
    parts = urlsplit(url)
    path = re.sub("//+", "/", unquote(parts.path))
    return f"{parts.scheme}://{parts.netloc.lower()}{path}", size
