"""Runs a function in a forked child, which is ended where it hangs."""

import os
import signal
import traceback

LIMIT_S = 60


def run_forked(act):
    """Call ``act`` in a fork of this process; fail where it raises, or hangs for ``LIMIT_S``."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends it; pytest-timeout has its own
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        try:
            act()
        except BaseException:  # noqa: BLE001  told to the parent by the status
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the forked child ended with {status}; signal {signal.SIGALRM}: it hung"
