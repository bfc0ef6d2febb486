"""Credentials kept out of messages: in URLs, in query strings, in named settings."""

import re

# A password, or the query of a presigned URL: a commit record would keep it, and errors show it.
_SECRET = re.compile(r"[a-z0-9+.-]+://[^/]*:[^/]*@|https?://[^?]*\?", re.IGNORECASE)

# Bounded, for a reason may quote a long word of a hostile tar and these look for names everywhere.
_SCHEME = r"\b[A-Za-z][A-Za-z0-9+.-]{0,19}://"
_USER = re.compile(rf"(?P<scheme>{_SCHEME})[^/\s@'\"]+@")
_QUERY = re.compile(rf"(?P<url>{_SCHEME}[^\s?'\"]*)\?[^\s'\"]+")

# What a server or a library may quote of a signed request, or of its own configuration.
_NAMED = re.compile(
    r"(?P<name>(?:authorization|x-amz-[a-z-]{0,40}|aws_[a-z_]{1,40}|[a-z_-]{0,40}"
    r"(?:password|secret|token|api[_-]?key)[a-z_-]{0,40})['\"]?\s?[:=]\s?['\"]?)"
    r"(?:(?:bearer|basic|aws4-hmac-sha256)\s+)?[^\s,;'\"]+",
    re.IGNORECASE,
)
_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")


def find_url_fault(url: str) -> str | None:
    """Return why a path or URL is refused, without what may be secret in it; None where it is not.

    Refused are chained and command URLs, and those that hold a password or a query.
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


def _hide(url: str) -> str:
    """A URL without what may be secret in it: its user, password, query and fragment."""
    if "://" not in url:
        return url
    return re.sub(r"://[^/?#]*@", "://", re.split(r"[?#]", url)[0])


def hide_secrets(text: str) -> str:
    """Replace what may be a secret by ``…``: users of URLs, their queries, keys, tokens."""
    text = _USER.sub(r"\g<scheme>…@", text)
    text = _QUERY.sub(r"\g<url>?…", text)
    text = _NAMED.sub(r"\g<name>…", text)
    return _KEY_ID.sub("…", text)
