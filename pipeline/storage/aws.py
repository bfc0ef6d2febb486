"""Region, endpoint and credentials of S3, from the environment, profile files and roles.

botocore, which s3fs brings (extra ``s3``), walks the chain of credentials that all AWS tools share.
Without it obstore's own chain serves, which reads no profile files. ``obstore.auth.boto3`` is not
used: it needs boto3 beside botocore, asks for credentials (perhaps a metadata server) as soon as it
is made, finds no endpoint, and lets errors through that quote a credential process.
"""

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

try:
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session
except ImportError:  # without the s3 extra
    Session = None

if TYPE_CHECKING:  # names that obstore has in its stubs alone
    from obstore.store import S3Config, S3Credential

# botocore renews credentials that end within 10 minutes, so what it gives is good for this long.
_VALID_FOR = timedelta(minutes=10)


class NoCredentialsError(PermissionError):
    """No credentials were found."""


class AmbientCredentials:
    """obstore's credential provider over botocore's chain, which is asked when first needed."""

    def __init__(self) -> None:
        self._credentials: Any = None

    def __call__(self) -> "S3Credential":
        """Return the current credentials; raises NoCredentialsError."""
        try:
            if self._credentials is None:
                self._credentials = Session().get_credentials()
            frozen = self._credentials and self._credentials.get_frozen_credentials()
        except BotoCoreError as error:  # its text may quote a credential process
            raise NoCredentialsError(type(error).__name__) from None
        if frozen is None or not frozen.access_key or not frozen.secret_key:
            raise NoCredentialsError("none found")
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _VALID_FOR,
        }


@dataclass(frozen=True, slots=True)
class AwsSettings:
    """Where S3 is, and whose credentials to use (None: those of obstore's own chain)."""

    config: "S3Config"
    allow_http: bool
    credentials: AmbientCredentials | None


def read_aws_settings() -> AwsSettings:
    """Return the settings of the environment and the profile; reads files, asks no server.

    The endpoint is that of ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL`` or the profile, in boto3's
    order, else Amazon's; plain HTTP is allowed only if the endpoint says so.

    Raises:
        ValueError: a profile that does not exist or needs botocore, or an endpoint that is no URL.
    """
    profile = _read_profile()
    endpoint = _find_endpoint(profile)
    config: S3Config = {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region := region or profile.get("region"):
        config["region"] = region
    if endpoint:
        config["aws_endpoint_url_s3"] = endpoint
    credentials = AmbientCredentials() if Session is not None else None
    return AwsSettings(config, endpoint.startswith("http://"), credentials)


def open_client() -> Any:
    """Return botocore's client of S3, for the few requests that obstore does not make.

    Raises:
        ValueError: botocore is not installed, or as ``read_aws_settings``.
        BotoCoreError: the credentials cannot be read; its text may quote a credential process.
    """
    if Session is None:
        raise ValueError("unfinished uploads are listed by botocore: install ldznet[s3]")
    found = read_aws_settings().config
    return Session().create_client(
        "s3",
        region_name=found.get("region", "us-east-1"),  # botocore reads no AWS_REGION
        endpoint_url=found.get("aws_endpoint_url_s3"),
        config=Config(connect_timeout=5, s3={"addressing_style": "path"}),  # as obstore's
    )


def _read_profile() -> dict[str, Any]:
    """Return the profile's entries; ``s3`` holds those of the services section that it names."""
    if Session is None:
        if os.environ.get("AWS_PROFILE"):
            raise ValueError(
                "store: AWS_PROFILE is set, but botocore, which reads profiles, is not installed; "
                "install ldznet[s3]"
            )
        return {}
    try:
        session = Session()
        profile = dict(session.get_scoped_config())
        services = session.full_config.get("services", {}).get(profile.get("services"), {})
    except BotoCoreError as error:
        raise ValueError(f"store: the AWS profile cannot be read: {error}") from None
    return {**profile, "s3": services.get("s3", {})}


def _find_endpoint(profile: dict[str, Any]) -> str:
    """Return the endpoint's URL, "" for Amazon's."""
    ignored = os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true"
    if ignored or str(profile.get("ignore_configured_endpoint_urls", "")).lower() == "true":
        return ""
    places = (
        *(os.environ.get("AWS_ENDPOINT_URL_S3"), os.environ.get("AWS_ENDPOINT_URL")),
        *(profile.get("s3", {}).get("endpoint_url"), profile.get("endpoint_url")),
    )
    endpoint = next((str(url) for url in places if url), "")
    parts = urlsplit(endpoint)
    plain = parts.scheme in ("http", "https") and parts.hostname
    if endpoint and (not plain or "@" in parts.netloc or parts.query or parts.fragment):
        raise ValueError(
            "store: AWS_ENDPOINT_URL (or a profile's endpoint_url): expected http[s]://host[:port] "
            "without a password or a query"
        )
    return endpoint.rstrip("/")
