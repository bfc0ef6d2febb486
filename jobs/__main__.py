"""``ldznet VERB``, the same as ``python -m jobs VERB``.

A verb's module imports what it runs only when it runs. So ``--help`` and a wrong option answer at
once, not after the seconds that torch and Ray take to import.
"""

import functools
import importlib
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from jobs import bench, ingest
from jobs.command import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, format_command
from pipeline.base.outages import PATIENCE

VERBS = (
    *("demo", "plan", "encode", "train", "evaluate", "sweep", "segment", "inspect", "verify"),
    *("snapshot", "rm", "gc", "blocks", "convert", "pretrain"),
)
"""A verb's function and its module in this folder have its name."""
KEPT = {  # what stays when a verb is interrupted; with the others nothing can be continued
    "demo": "What is done stays",
    "encode": "What is committed stays",
    "ingest": "Finished tars stay",
    "pretrain": "The last checkpoint stays",
    "sweep": "Finished trials and last checkpoints stay",
    "train": "The last checkpoint stays",
    "convert": "A folder appears only when it is whole",
    "gc": "What is removed is removed",
    "rm": "What is done stays",
}
# Ray's own switch, made for hosts whose firewall asks about open ports: a cluster of this host
# alone, with every process on loopback. Ray reads it when it is imported.
LOOPBACK_ONLY = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# No command draws on a screen, and a notebook sets a backend that only its own environment has.
WITHOUT_SCREEN = ("MPLBACKEND", "agg")

app = typer.Typer(
    name="ldznet",
    help="Encode a corpus with a latent diffusion model once; train segmentation heads from it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def exits(verb: Callable[..., int]) -> Callable[..., None]:
    """Wrap a verb so that it ends the process with its status; an error is one line on stderr."""

    @functools.wraps(verb)
    def run(*arguments: Any, **options: Any) -> None:
        options = {name: _expand_home(value) for name, value in options.items()}
        raise SystemExit(_run(lambda: _check_finite(options) or verb(*arguments, **options)))

    return run


def _expand_home(value: Any) -> Any:
    """Return a path that starts with ``~`` as the shell would have given it without quotes."""
    if isinstance(value, list):
        return [_expand_home(one) for one in value]
    return value.expanduser() if isinstance(value, Path) else value


def _check_finite(options: dict[str, Any]) -> int:
    """Refuse ``inf`` and ``nan``, which any option of a number takes. Returns 0."""
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: expected a finite number, got {value}")
    return 0


def _run(verb: Callable[[], int]) -> int:
    try:
        return verb()
    except KeyboardInterrupt:
        typer.echo(_describe_interrupt(sys.argv[1:]), err=True)
        return EXIT_INTERRUPTED
    except ValueError as error:  # specs, corpora, model files and heads raise its family for input
        typer.echo(f"error: {error}", err=True)
        return EXIT_USAGE
    except (OSError, RuntimeError, ArithmeticError) as error:
        typer.echo(f"failed: {type(error).__name__}: {error}", err=True)
        return EXIT_FAILED


def _describe_interrupt(arguments: list[str]) -> str:
    """Say what stays, and the command that continues from there."""
    verb = arguments[0] if arguments else ""
    if verb not in KEPT:
        return "interrupted."
    if verb in ("pretrain", "train") and "--resume" not in arguments:
        arguments = [*arguments, "--resume"]
    return f"interrupted. {KEPT[verb]}; to go on:\n  {format_command(arguments)}"


for _verb in VERBS:
    app.command(_verb)(exits(getattr(importlib.import_module(f"jobs.{_verb}"), _verb)))
app.add_typer(ingest.build_app(exits), name="ingest")
app.add_typer(bench.build_app(exits), name="bench")


def main() -> None:
    """Run the command line; exit with 0 done, 1 failed, 2 bad arguments or spec, 3 incomplete."""
    logging.basicConfig(
        level=os.environ.get("LDZNET_LOG", "WARNING").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        os.getcwd()
    except FileNotFoundError as error:  # where torch and Ray end without a word
        typer.echo("error: the current folder was removed; cd to one that is there", err=True)
        raise SystemExit(EXIT_USAGE) from error
    os.environ.update([WITHOUT_SCREEN])
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault(*LOOPBACK_ONLY)
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except SystemExit as left:
        PATIENCE.stop()  # threads of pools are joined
        if left.code == EXIT_INTERRUPTED:
            # Everything is closed by now. A thread that is still in a model's C++ code would abort
            # the interpreter's own exit, and the status would be that of a crash.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_INTERRUPTED)
        raise


def _interrupt(number: int, frame: FrameType | None) -> None:
    PATIENCE.stop()
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
