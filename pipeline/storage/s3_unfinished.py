"""Multipart uploads that were begun and not ended: listed and aborted.

No listing of objects shows them, and Amazon bills their parts. obstore does not list them, so
botocore does, which the extra ``s3`` brings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from pipeline.storage.aws import open_client
from pipeline.storage.interface import StorageError, Upload

try:
    from botocore.exceptions import BotoCoreError, ClientError
except ImportError:  # without the s3 extra, where ``open_client`` says so
    BotoCoreError = ClientError = OSError


def list_unfinished(url: str, folder: str) -> Iterator[Upload]:
    """Yield the uploads below a folder of ``s3://bucket/prefix``, sorted by path.

    Raises:
        ValueError: botocore is not installed.
        PermissionError: the policy does not allow it; says which action it needs.
        StorageError: the server failed.
    """
    parts = urlsplit(url)
    bucket, prefix = parts.netloc, f"{parts.path.strip('/')}/".lstrip("/")
    with _errors(url, "s3:ListBucketMultipartUploads"):
        client = open_client()
        pages = client.get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=bucket, Prefix=f"{prefix}{folder}/"):
            for found in page.get("Uploads", ()):
                name = {"Bucket": bucket, "Key": found["Key"], "UploadId": found["UploadId"]}
                num_bytes = _count_bytes(client, url, name)
                path = found["Key"].removeprefix(prefix)
                yield Upload(path, num_bytes, abort=partial(_abort, client, url, name))


def _count_bytes(client: Any, url: str, name: dict[str, str]) -> int:
    num_bytes = 0
    with _errors(url, "s3:ListMultipartUploadParts"):
        for page in client.get_paginator("list_parts").paginate(**name):
            num_bytes += sum(part["Size"] for part in page.get("Parts", ()))
    return num_bytes


def _abort(client: Any, url: str, name: dict[str, str]) -> None:
    with _errors(url, "s3:AbortMultipartUpload"):
        client.abort_multipart_upload(**name)


@contextmanager
def _errors(url: str, action: str) -> Iterator[None]:
    """Raise botocore's errors as the OSError family, without a server's or a profile's text.

    An upload that has ended meanwhile, by its writer or another gc, is none.
    """
    try:
        yield
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        code = str(error.response["Error"]["Code"])[:80]
        if code == "NoSuchUpload":
            return
        what = f"{url}: unfinished uploads: HTTP {status} {code}"
        if status in (401, 403):
            raise PermissionError(f"{what}. The policy must allow {action}") from None
        raise StorageError(f"{what}. Look at the server") from None
    except BotoCoreError as error:
        raise StorageError(f"{url}: unfinished uploads: {type(error).__name__}") from None
