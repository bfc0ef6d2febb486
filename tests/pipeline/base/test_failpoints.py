"""Failpoints: the text's grammar, counting, and each action."""

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.base.failpoints import (
    CHECKPOINT_STEPS,
    FAILPOINTS,
    VARIABLE,
    InjectedError,
    count_steps,
    parse_failpoints,
    pass_step,
    set_failpoints,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _off_after():
    yield
    set_failpoints("")


def test_nothing_happens_and_nothing_is_counted_where_there_is_no_rule():
    set_failpoints("")
    for name in FAILPOINTS:
        pass_step(name)
    pass_step("no such step")  # so cheap that it is not even looked up
    assert count_steps() == {}


def test_a_step_acts_at_its_time_alone():
    set_failpoints("shard.closed@3=raise,gc.removed=full")
    for _ in range(2):
        pass_step("shard.closed")
    with pytest.raises(InjectedError, match=r"failpoint shard\.closed"):
        pass_step("shard.closed")
    pass_step("shard.closed")
    pass_step("arrays.closed")
    assert count_steps() == {"shard.closed": 4, "arrays.closed": 1}
    with pytest.raises(OSError, match="No space left on device") as caught:
        pass_step("gc.removed")
    assert caught.value.errno == errno.ENOSPC
    set_failpoints("shard.closed=raise")
    assert count_steps() == {}


def test_a_rule_with_a_path_acts_there_alone():
    set_failpoints("shard.closed[*/data/tar-1-*]@2=raise,arrays.closed[*/tar-1-*]=raise")
    for task in ("tar-1-aa", "tar-2-bb", "tar-11-cc"):
        pass_step("shard.closed", f"latents-0/data/{task}/attempt/arrays.zarr/text/c/0")
        pass_step("shard.closed")
    with pytest.raises(InjectedError, match=r"failpoint shard\.closed"):
        pass_step("shard.closed", "features-0/data/tar-1-aa/attempt/arrays.zarr/block06/c/0")
    assert count_steps() == {"shard.closed": 7}
    assert str(parse_failpoints("gc.listed=kill")) == str(parse_failpoints("gc.listed[*]=kill"))


def test_steps_of_several_threads_are_counted_once_each():
    set_failpoints("record.written@500=raise")

    def pass_many(_):
        errors = 0
        for _ in range(125):
            try:
                pass_step("record.written")
            except InjectedError:
                errors += 1
        return errors

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(pass_many, range(8))) == 1
    assert count_steps() == {"record.written": 1000}


@pytest.mark.parametrize(
    "entry",
    [
        "files.verified", "files.verified=", "no.step=kill", "files.verified=explode",
        "files.verified@=kill", "files.verified@0=kill", "files.verified@-1=kill",
        "files.verified@²=kill", "files.verified=sleep:", "files.verified=sleep:soon",
        "files.verified=sleep:-1", "files.verified=sleep:nan", " files.verified=kill",
        "files.verified=kill,files.verified@2=kill", "files.verified[]=kill",
        "files.verified[a=kill", "files.verifieda]=kill", "files.verified[[a]]=kill",
        "files.verified@2[a]=kill", "files.verified[a]=kill,files.verified[b]=kill",
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused(entry):
    with pytest.raises(ValueError, match=r"LDZNET_FAILPOINTS: expected STEP\[GLOB\]\[@N\]="):
        parse_failpoints(entry)


def test_every_step_and_action_parses():
    text = ",".join(f"{step}@2=sleep:0.5" for step in FAILPOINTS)
    assert list(parse_failpoints(text)) == list(FAILPOINTS)
    assert parse_failpoints("") == {}
    for action in ("kill", "stop", "raise", "full", "sleep:3"):
        assert parse_failpoints(f"gc.listed={action}")["gc.listed"].action == action


SCRIPT = """
from pipeline.base.failpoints import pass_step
for name in ("shard.closed", "shard.closed", "arrays.closed"):
    pass_step(name)
    print(name, flush=True)
"""


def start(rules):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, VARIABLE: rules},
    )  # fmt: skip


def test_kill_ends_a_process_and_stop_halts_it_until_it_is_continued():
    killed, stopped = start("shard.closed@2=kill"), start("arrays.closed=stop")
    assert killed.communicate(timeout=60)[0] == "shard.closed\n"
    assert killed.returncode == -signal.SIGKILL
    _, status = os.waitpid(stopped.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    stopped.send_signal(signal.SIGCONT)
    assert stopped.communicate(timeout=60)[0].splitlines()[-1] == "arrays.closed"
    assert stopped.returncode == 0


def test_every_step_is_passed_somewhere_and_every_passed_step_is_known():
    """A step that nobody passes would make its tests pass without a fault."""
    sources = [path.read_text() for path in (ROOT / "pipeline").rglob("*.py")]
    for name in (*FAILPOINTS, *CHECKPOINT_STEPS):
        assert any(f'pass_step("{name}"' in text for text in sources), name
    passed = sum(text.count('pass_step("') for text in sources)
    # And the two of a record in both storages.
    assert passed == len(FAILPOINTS) + 2 + len(CHECKPOINT_STEPS)
