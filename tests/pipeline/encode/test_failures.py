"""Failed tasks are listed as they fail, in whole lines, and summed up by kind; no secret is."""

import itertools
import json
import logging
import os
import signal
import time
from contextlib import closing

import pytest

from jobs.command import format_command
from pipeline.base.secrets import hide_secrets
from pipeline.encode.failures import MAX_LISTED, FailureLog, describe_failures
from pipeline.stage.work import TaskOutcome


def failed(task, error="OSError: gone", status="failed", **more):
    return TaskOutcome(task=task, status=status, error=error, **more)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_failed_is_there_before_the_run_ends(tmp_path):
    path = tmp_path / "run" / "failed.jsonl"
    with closing(FailureLog(path, urls={"a": "s3://bucket/a.tar"})) as log:
        log.add(TaskOutcome(task="b", status="committed"))
        assert not path.exists()
        assert log.path is None
        log.add(failed("a", status="again"))
        assert not path.exists()
        log.add(failed("a", cause="node", node="host", ray_node="01ab"))
        (line,) = read_lines(path)
        assert log.path == str(path)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "task": "a", "url": "s3://bucket/a.tar", "cause": "node", "node": "host",
        "ray_node": "01ab", "reason": "OSError: gone",
    }  # fmt: skip


def test_without_a_path_nothing_is_listed():
    with closing(FailureLog(None, urls={})) as log:
        log.add(failed("a"))
    assert log.path is None


def test_a_kill_leaves_whole_lines(tmp_path):
    path = tmp_path / "failed.jsonl"
    child = os.fork()
    if child == 0:
        with closing(FailureLog(path, urls={})) as log:
            for number in itertools.count():
                log.add(failed(str(number), "x" * 3000))
    while not path.exists() or path.stat().st_size < 2**17:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_bytes().endswith(b"\n")
    lines = read_lines(path)
    assert [line["task"] for line in lines] == [str(number) for number in range(len(lines))]


def test_a_disk_that_is_full_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        with closing(FailureLog(tmp_path / "file" / "failed.jsonl", urls={})) as log:
            log.add(failed("a"))
            log.add(failed("b"))
    assert len(caplog.records) == 1
    assert "failed tasks cannot be listed any more" in caplog.text
    assert log.path is None


def test_the_same_failure_of_many_tasks_is_one_line():
    failures = {f"t{i:03d}": f"OSError: /data/t{i:03d}.tar: 12{i} bytes short" for i in range(300)}
    failures["z"] = "ValueError: other"
    assert describe_failures(failures, urls={}) == [
        "failed t000 and 299 more alike: OSError: /data/t000.tar: 120 bytes short",
        "failed z: ValueError: other",
    ]


def test_where_the_tar_is_is_said_once():
    failures = {"a": "OSError: gone", "b": "ValueError: s3://bucket/b.tar is no tar"}
    urls = {task: f"s3://bucket/{task}.tar" for task in failures}
    assert describe_failures(failures, urls=urls) == [
        "failed a: OSError: gone",
        "  s3://bucket/a.tar",
        "failed b: ValueError: s3://bucket/b.tar is no tar",
    ]


def test_the_kinds_that_are_named_are_bounded_and_reasons_cut():
    words = [f"Error{chr(97 + i // 26)}{chr(97 + i % 26)}: " + "y" * 999 for i in range(50)]
    lines = describe_failures({str(number): word for number, word in enumerate(words)}, urls={})
    assert len(lines) == MAX_LISTED + 1
    assert lines[-1] == "failed 30 more, of 30 other kinds"
    assert all(len(line) < 400 for line in lines)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET s3://me:hunter2@host/a.tar: 403", "GET s3://…@host/a.tar: 403"),
        (
            "https://b.s3/a.tar?X-Amz-Signature=hunter2&y=1 failed",
            "https://b.s3/a.tar?… failed",
        ),
        ("aws_secret_access_key = hunter2, x", "aws_secret_access_key = …, x"),
        ("{'x-amz-security-token': 'hunter2'}", "{'x-amz-security-token': '…'}"),
        ("Authorization: Bearer hunter2", "Authorization: …"),
        ("HF_TOKEN=hunter2", "HF_TOKEN=…"),
        ("key AKIAABCDEFGHIJKLMNOP there", "key … there"),
        ("DamagedTarError: a.tar: 3 tokens of text", "DamagedTarError: a.tar: 3 tokens of text"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(tmp_path, text, shown):
    assert hide_secrets(text) == shown
    with closing(FailureLog(tmp_path / "failed.jsonl", urls={"a": text})) as log:
        log.add(failed("a", text))
    assert "hunter2" not in (tmp_path / "failed.jsonl").read_text()
    assert "hunter2" not in "".join(describe_failures({"a": text}, urls={}))


def test_the_command_is_the_one_given():
    arguments = ["encode", "--corpus", "data/{a,b}-*.tar", "--store", "my store"]
    assert format_command(arguments) == (
        "ldznet encode --corpus 'data/{a,b}-*.tar' --store 'my store'"
    )
