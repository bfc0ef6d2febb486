"""Outages: servers of a store or a corpus that do not answer for a while."""


class OutageError(OSError):
    """A server that did not answer, or said that it cannot now, for longer than was waited.

    The same request may pass later: it says nothing about what was asked for.
    """
