"""The command that a message tells the user to run, quoted for a shell."""

import shlex
from collections.abc import Sequence

from pipeline.base.secrets import hide_secrets


def format_command(arguments: Sequence[str]) -> str:
    """Return the command line that was given, ``arguments`` after the program, for a shell."""
    return hide_secrets(shlex.join(["ldznet", *arguments]))
