"""A child gets no secret, a group of its own, and leaves nothing behind."""

import json
import os
import subprocess

from pipeline.base.child_process import end_child, start_child

TELL = "import json, os; print(json.dumps([dict(os.environ), os.getpgrp()]), flush=True); input()"


def test_a_child_starts_with_little_and_ends_wholly(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = start_child(["-c", TELL], environment={"OURS": "1"}, **pipes)
    environment, group = json.loads(child.stdout.readline())
    assert group == child.pid != os.getpgrp()
    assert {"OURS": "1", "LD_LIBRARY_PATH": "/opt/lib"}.items() <= environment.items()
    assert environment.keys() <= {"OURS", "LD_LIBRARY_PATH", "LC_CTYPE"}  # Python adds the last
    end_child(child)
    assert child.stdin.closed
    assert child.stdout.closed
    assert child.returncode is not None
    end_child(child)
