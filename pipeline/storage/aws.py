"""Region, endpoint and credentials of S3 as the machine gives them, never as a URL or a spec does.

botocore, which comes with s3fs (the ``s3`` extra), walks the whole chain that the AWS tools share:
environment, web identity, single sign-on, profile files, a credential process, container and
instance metadata. Without it obstore's own chain serves, which has no profile files.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

try:
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session
except ImportError:  # without the s3 extra
    Session = None

if TYPE_CHECKING:  # names that obstore has in its stubs alone
    from obstore.store import S3Config, S3Credential

# botocore renews credentials that end within 10 minutes; what it gives is good for this long.
_KEEP = timedelta(minutes=10)


class NoCredentialsError(PermissionError):
    """The ambient chain gave no credentials."""


class AmbientCredentials:
    """Credentials from botocore's chain, looked up when first needed and renewed by it."""

    def __init__(self) -> None:
        self._credentials: Any = None

    def __call__(self) -> "S3Credential":
        """Return the credentials of now; raises NoCredentialsError."""
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
            "expires_at": datetime.now(UTC) + _KEEP,
        }


@dataclass(frozen=True, slots=True)
class AwsSettings:
    """How to reach S3: where, and with whose credentials (None: obstore's own chain)."""

    config: "S3Config"
    allow_http: bool
    credentials: AmbientCredentials | None


def read_aws_settings() -> AwsSettings:
    """Return the settings of the environment and the profile; reads files, asks no server.

    The endpoint is that of ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL`` or the profile, in boto3's
    order, and Amazon's where there is none; plain HTTP only where it says so.

    Raises:
        ValueError: a profile that is not there or needs botocore, or an endpoint that is no URL.
    """
    files = _read_profile()
    endpoint = _find_endpoint(os.environ, files)
    config: S3Config = {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region or files.get("region"):
        config["region"] = region or files["region"]
    if endpoint:
        config["aws_endpoint_url_s3"] = endpoint
    credentials = AmbientCredentials() if Session is not None else None
    return AwsSettings(config, (endpoint or "").startswith("http://"), credentials)


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


def _find_endpoint(environ: Mapping[str, str], profile: Mapping[str, Any]) -> str | None:
    ignored = environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true"
    if ignored or str(profile.get("ignore_configured_endpoint_urls", "")).lower() == "true":
        return None
    endpoint = (
        environ.get("AWS_ENDPOINT_URL_S3")
        or environ.get("AWS_ENDPOINT_URL")
        or profile.get("s3", {}).get("endpoint_url")
        or profile.get("endpoint_url")
    )
    if not endpoint:
        return None
    parts = urlsplit(endpoint)
    plain = parts.scheme in ("http", "https") and parts.hostname
    if not plain or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "store: AWS_ENDPOINT_URL (or a profile's endpoint_url): expected http[s]://host[:port] "
            "without a password or a query"
        )
    return str(endpoint).rstrip("/")
