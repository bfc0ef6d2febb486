"""The copy of a remote tar: whatever ends the process, nothing of it stays in TMPDIR."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

NUM_BYTES = 10_000_000
OPEN = """
import sys
from pipeline.corpus.source import open_source
from pipeline.corpus.tasks import Task
with open_source(Task("a-00000000", sys.argv[1], int(sys.argv[2]))):
    print("opened")
"""


class HalfATar(BaseHTTPRequestHandler):
    """Answers with half of what it promises, and then with nothing until the test has ended."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(NUM_BYTES))
        self.end_headers()
        self.wfile.write(bytes(NUM_BYTES // 2))
        self.server.ended.wait(60)

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture
def half_a_tar():
    """The URL of a tar of which half comes."""
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), HalfATar)
    server.ended = threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/a.tar"
    server.ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


def wait_for_copy(process, folder):
    """Wait until a process holds an open file of some size that lies in the folder."""
    while process.poll() is None:
        for link in os.scandir(f"/proc/{process.pid}/fd"):
            try:
                if os.readlink(link.path).startswith(f"{folder}/") and os.stat(link.path).st_size:
                    return
            except FileNotFoundError:  # closed meanwhile
                continue
    pytest.fail("the process ended by itself")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc: not Linux")
@pytest.mark.parametrize("unnamed", [True, False], ids=["O_TMPFILE", "unlinked at once"])
def test_a_process_killed_while_it_copies_leaves_nothing(tmp_path, half_a_tar, unnamed):
    """Also on a file system without O_TMPFILE, as NFS is."""
    program = OPEN if unnamed else f"import tempfile\ntempfile._O_TMPFILE_WORKS = False\n{OPEN}"
    process = subprocess.Popen(
        [sys.executable, "-c", program, half_a_tar, str(NUM_BYTES)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        wait_for_copy(process, tmp_path)
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()
        process.wait()
    assert list(tmp_path.iterdir()) == []
