"""An HTTP proxy that spoils chosen requests on their way to an S3 server.

A rule names a fault and the requests that it meets, by method and path; the first rule that
matches and has uses left applies. The ``Host`` header is passed on, so signatures stay valid.
"""

import http.client
import io
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal[
    "throttled",  # 503 SlowDown with Retry-After, not forwarded
    "denied",  # 403 AccessDenied, not forwarded
    "conflict",  # 409 ConditionalRequestConflict, not forwarded
    "forgotten",  # 404 NoSuchUpload, not forwarded
    "reset",  # the connection is reset, nothing is forwarded
    "lost",  # forwarded, then the connection is reset before a byte of the answer
    "failed",  # forwarded, then 500 InternalError though the server did it
    "cut",  # all headers and half of the answer's body
    "short",  # half of the body with headers that say it is whole
    "held",  # waits for ``release`` before it forwards
    "unconditional",  # forwarded without its condition (and its signature, which covers it)
]
_ANSWERS = {
    "throttled": (503, "SlowDown"),
    "denied": (403, "AccessDenied"),
    "conflict": (409, "ConditionalRequestConflict"),
    "forgotten": (404, "NoSuchUpload"),
    "failed": (500, "InternalError"),
}
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
_UPSTREAM_TIMEOUT_S = 60


@dataclass
class Rule:
    """Spoils ``times`` requests whose method and path (with query) match."""

    fault: Fault
    method: str = ".*"
    path: str = ".*"
    times: int = 1_000_000
    hits: int = field(default=0, init=False)
    release: threading.Event = field(default_factory=threading.Event, init=False)

    def matches(self, method: str, path: str) -> bool:
        """Whether the rule has a use left for this request."""
        wanted = re.fullmatch(self.method, method) and re.search(self.path, path)
        return bool(wanted) and self.hits < self.times


class FaultProxy:
    """A proxy on loopback before ``upstream_port``; a context manager."""

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        self.rules: list[Rule] = []
        self.requests: list[tuple[str, str]] = []  # method, path with query
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            upstream = upstream_port
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, fault: Fault, method: str = ".*", path: str = ".*", times: int = 10**6) -> Rule:
        """Add a rule and return it, for its count of hits."""
        rule = Rule(fault, method, path, times)
        self.rules.append(rule)
        return rule

    def take_rule(self, method: str, path: str) -> Rule | None:
        """Note a request and use up the rule that meets it."""
        with self._lock:
            self.requests.append((method, path))
            for rule in self.rules:
                if rule.matches(method, path):
                    rule.hits += 1
                    return rule
        return None

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for rule in self.rules:
            rule.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: else each answer waits for a delayed ACK
    disable_nagle_algorithm = True
    upstream: int
    owner: FaultProxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        rule = self.owner.take_rule(self.command, self.path)
        fault = rule.fault if rule else None
        if fault == "reset":
            return self._reset()
        if fault in ("throttled", "denied", "conflict", "forgotten"):
            return self._answer(*_ANSWERS[fault])
        if fault == "held":
            rule.release.wait(_UPSTREAM_TIMEOUT_S)
        status, headers, answer = self._forward(body, drop=fault == "unconditional")
        if fault == "lost":
            return self._reset()
        if fault == "failed":
            return self._answer(*_ANSWERS[fault])
        return self._send(status, headers, answer, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def handle_expect_100(self):
        """Answer at once: botocore keeps a body back until it is asked for it."""
        go_on = super().handle_expect_100()
        self.wfile.flush()
        return go_on

    def _forward(self, body, *, drop):
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.upstream, timeout=_UPSTREAM_TIMEOUT_S
        )
        dropped = {"authorization", "if-none-match"} if drop else set()
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in dropped:
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _send(self, status, headers, body, fault):
        named = {name.lower(): value for name, value in headers}
        length = named.get("content-length", str(len(body)))
        sent = body[: len(body) // 2] if fault in ("cut", "short") else body
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(sent)) if fault == "short" else length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        if fault == "cut":
            self.close_connection = True

    def _answer(self, status, code):
        body = f"<Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()  # it holds the socket
        self.connection.close()
        self.rfile = self.wfile = io.BytesIO()  # which the server flushes and closes

    def log_message(self, *args):
        """Say nothing."""
