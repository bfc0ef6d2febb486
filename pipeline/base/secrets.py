"""Hides credentials in URLs and texts before they are shown or stored."""

import re

# A URL with a password, or with a query, which may be that of a presigned URL.
_SECRET = re.compile(r"[a-z0-9+.-]+://[^/]*:[^/]*@|https?://[^?]*\?", re.IGNORECASE)

# Repeats are bounded: the text may quote a hostile tar, and these search from every character.
URL_SCHEME = r"\b[A-Za-z][A-Za-z0-9+.-]{0,19}://"
_USER = re.compile(rf"(?P<scheme>{URL_SCHEME})[^/\s@'\"]+@")
_QUERY = re.compile(rf"(?P<url>{URL_SCHEME}[^\s?'\"]*)\?[^\s'\"]+")

# Settings and headers that a server or a library may quote from a request or its configuration.
_NAMED = re.compile(
    r"(?P<name>(?:authorization|x-amz-[a-z-]{0,40}|aws_[a-z_]{1,40}|[a-z_-]{0,40}"
    r"(?:password|secret|token|api[_-]?key)[a-z_-]{0,40})['\"]?\s?[:=]\s?['\"]?)"
    r"(?:(?:bearer|basic|aws4-hmac-sha256)\s+)?[^\s,;'\"]+",
    re.IGNORECASE,
)
_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")


def find_url_fault(url: str) -> str | None:
    """Return why a path or URL is refused, or None; the reason shows no secret.

    Refused are chained URLs, command URLs, and those that hold a password or a query.
    """
    scheme = url.split(":")[0]
    if "::" in url or url.startswith("pipe:"):
        return f"expected a plain path or URL, got {scheme}:…; chained and command URLs are refused"
    if _SECRET.match(url):
        return (
            f"expected a URL without a password or a query, got {scheme}:…; a store names what it "
            "was made from by URL, so give credentials by the environment or by fsspec's "
            "configuration"
        )
    return None


def strip_url(url: str) -> str:
    """Return a URL without its user, password, query and fragment."""
    if "://" not in url:
        return url
    return re.sub(r"://[^/?#]*@", "://", re.split(r"[?#]", url)[0])


def hide_secrets(text: str) -> str:
    """Return a text with ``…`` for users and queries of URLs, keys, tokens and passwords."""
    text = _USER.sub(r"\g<scheme>…@", text)
    text = _QUERY.sub(r"\g<url>?…", text)
    text = _NAMED.sub(r"\g<name>…", text)
    return _KEY_ID.sub("…", text)
