"""Steps at which a test can stop, delay or kill a writer. Off unless LDZNET_FAILPOINTS is set.

``LDZNET_FAILPOINTS="files.verified=kill,shard.closed@3=raise"`` acts at these steps, the second
at its third time in a process. ``shard.opened[*/data/scenes-00007-*]=kill`` acts where the path in
the store, that the step is about, matches: one task is poison, wherever it runs. Actions: ``kill``
(SIGKILL to this process), ``stop`` (SIGSTOP, as a worker that hangs), ``raise`` (an OSError),
``full`` (no space left), ``sleep:SECONDS``.

``record.written`` and ``record.created`` are passed by whatever is created create-only: the probe
at the start, a layer's spec, a long tar's pin and the inventory too. ``count_steps`` tells how
often, for ``@N``.
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
    "record.created",  # committed; the writer has not heard of it
    "commit.acknowledged",  # the writer knows; its caller does not
    "gc.listed",  # what is to go is chosen
    "gc.removed",  # one attempt is gone
)

# In the order in which the thread that writes a checkpoint passes them.
CHECKPOINT_STEPS = (
    "checkpoint.opened",  # its folder is there, under another name, empty
    "checkpoint.written",  # every file flushed, and the folder
    "checkpoint.replaced",  # the one of its step has given up the name; passed where there is one
    "checkpoint.renamed",  # it has its name
    "checkpoint.linked",  # OUT/best links to it; passed where it is the best
    "checkpoint.pruned",  # older ones are gone
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
    path: str  # a glob; * matches / too
    at: int  # which time the step is passed there, from 1


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
_matched: Counter[str] = Counter()  # of them, where the rule's path was
_counting = threading.Lock()  # the start-up probe creates from several threads


def set_failpoints(text: str) -> None:
    """Set this process's rules from text, and count from the start; "" turns all off."""
    global _rules
    _rules = parse_failpoints(text)
    _passed.clear()
    _matched.clear()


def count_steps() -> dict[str, int]:
    """Return step → how often it was passed since the rules were set; none where all are off."""
    return dict(_passed)


def pass_step(name: str, path: str = "") -> None:
    """Do what the rules say of a step; nothing where there is none.

    ``path`` is what it is about: a file or folder relative to the store.
    """
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
