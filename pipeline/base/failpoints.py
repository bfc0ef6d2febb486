"""Failpoints: steps at which a test stops, delays or kills a writer, if LDZNET_FAILPOINTS is set.

``LDZNET_FAILPOINTS="files.verified=kill,shard.closed@3=raise"`` acts at these steps, at the second
one when a process passes it for the third time. ``shard.opened[*/data/scenes-00007-*]=kill`` acts
only if the step's path in the store matches. Actions: ``kill`` (SIGKILL to this process), ``stop``
(SIGSTOP, as a worker that hangs), ``raise`` (an OSError), ``full`` (no space left) and
``sleep:SECONDS``.

Every file that is created create-only passes ``record.written`` and ``record.created``: not only
commits, but the probe at the start, a layer's spec and a long tar's pin too.
"""

import errno
import os
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase

VARIABLE = "LDZNET_FAILPOINTS"

# In the order in which a writer passes them.
FAILPOINTS = (
    "attempt.opened",  # before the first byte
    "shard.opened",  # a shard's file is there, empty
    "shard.closed",  # flushed, with its index
    "arrays.closed",  # every shard and zarr.json
    "folders.synced",  # flushed; nothing read back yet
    "files.verified",  # read back; no record yet
    "record.written",  # POSIX: the record's temporary file is flushed, its name not taken
    "record.created",  # committed, but the writer has no answer yet
    "commit.acknowledged",  # the writer has its answer, its caller not
    "gc.listed",  # what to remove is chosen
    "gc.removed",  # one attempt is gone
)

# In the order in which the thread that writes a checkpoint passes them.
CHECKPOINT_STEPS = (
    "checkpoint.opened",  # its folder is there, under a temporary name, empty
    "checkpoint.written",  # every file and the folder are flushed
    "checkpoint.replaced",  # an earlier one of its step is renamed; passed only if there is one
    "checkpoint.renamed",  # it has its name
    "checkpoint.linked",  # OUT/best links to it; passed only if it is the best
    "checkpoint.pruned",  # older ones are removed
)
_STEPS = (*FAILPOINTS, *CHECKPOINT_STEPS)

_ENTRY = re.compile(
    r"(?P<step>[a-z.]+)(?:\[(?P<path>[^\[\]=,]+)\])?(?:@(?P<at>[1-9][0-9]*))?"
    r"=(?P<action>kill|stop|raise|full|sleep:[0-9]+(?:\.[0-9]+)?)",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class _Rule:
    action: str
    path: str  # a glob, whose * matches / too
    at: int  # acts when the step is passed there for this time, from 1


class InjectedError(OSError):
    """The error of ``raise``."""


def parse_failpoints(text: str) -> dict[str, _Rule]:
    """Return step → rule of the variable's text.

    Raises:
        ValueError: an unknown step or action, or two rules for one step.
    """
    rules: dict[str, _Rule] = {}
    for entry in filter(None, text.split(",")):
        match = _ENTRY.fullmatch(entry)
        if match is None or match["step"] not in _STEPS or match["step"] in rules:
            raise ValueError(
                f"{VARIABLE}: expected STEP[GLOB][@N]=kill|stop|raise|full|sleep:SECONDS, GLOB in "
                f"brackets of a path in the store, N from 1, once for a step of "
                f"{', '.join(_STEPS)}, got {entry!r}"
            )
        rules[match["step"]] = _Rule(match["action"], match["path"] or "*", int(match["at"] or 1))
    return rules


_rules = parse_failpoints(os.environ.get(VARIABLE, ""))
_passed: Counter[str] = Counter()
_matched: Counter[str] = Counter()  # of them, those with the rule's path
_counting = threading.Lock()


def set_failpoints(text: str) -> None:
    """Set this process's rules from text, and count from the start; "" turns all off."""
    global _rules
    _rules = parse_failpoints(text)
    _passed.clear()
    _matched.clear()


def count_steps() -> dict[str, int]:
    """Return step → how often it was passed since rules were set; empty while there are none."""
    return dict(_passed)


def pass_step(name: str, path: str = "") -> None:
    """Do what a rule says of this step; ``path``, relative to the store, is what it is about."""
    if not _rules:
        return
    assert name in _STEPS, name
    rule = _rules.get(name)
    with _counting:
        _passed[name] += 1
        if rule is None or not fnmatchcase(path, rule.path):
            return
        _matched[name] += 1
        matched = _matched[name]
    if matched == rule.at:
        _act(name, rule.action)


def _act(name: str, action: str) -> None:
    if action == "raise":
        raise InjectedError(f"failpoint {name}")
    if action == "full":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (failpoint {name})")
    if action.startswith("sleep:"):
        time.sleep(float(action.removeprefix("sleep:")))
        return
    # To this thread: one sent to the process may take effect after the thread has gone on.
    number = signal.SIGKILL if action == "kill" else signal.SIGSTOP
    signal.pthread_kill(threading.get_ident(), number)
