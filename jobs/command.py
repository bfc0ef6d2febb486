"""Exit statuses, and the command line that a message tells the user to run."""

import shlex
from collections.abc import Sequence

from pipeline.base.secrets import hide_secrets

EXIT_FAILED = 1  # of verify also: damage was found
EXIT_USAGE = 2  # bad arguments or a bad spec
EXIT_INCOMPLETE = 3  # done, but tasks or trials failed, or too much was rejected
EXIT_INTERRUPTED = 130  # the shell's convention: 128 + SIGINT


def format_command(arguments: Sequence[str]) -> str:
    """Return ``ldznet`` with its arguments, quoted for a shell, without secrets."""
    return hide_secrets(shlex.join(["ldznet", *arguments]))
