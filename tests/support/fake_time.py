"""A clock that all but stands still between sleeps, so that minutes of patience take no time."""

from pipeline.base.outages import Patience


class FakeTime:
    """``clock`` and ``sleep`` of a ``Patience``; ``slept`` are the sleeps in seconds."""

    def __init__(self):
        self.now_s = 1000.0
        self.slept = []

    def clock(self):
        """Seconds, no two the same."""
        self.now_s += 1e-6
        return self.now_s

    def sleep(self, duration_s):
        """Move the clock."""
        self.slept.append(duration_s)
        self.now_s += duration_s


def make_patience(total_s, time=None):
    """A patience that waits in no time."""
    time = time or FakeTime()
    return Patience(total_s, clock=time.clock, sleep=time.sleep)
