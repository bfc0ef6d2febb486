"""``ldznet VERB``, the same as ``python -m jobs VERB``.

The verbs' modules are light; each imports what it runs when it runs, so that ``--help`` and a
mistyped option answer at once instead of after the seconds that torch and Ray take to import.
"""

import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import typer

from jobs import (
    bench,
    blocks,
    convert,
    demo,
    encode,
    evaluate,
    gc,
    inspect,
    plan,
    pretrain,
    segment,
    snapshot,
    sweep,
    train,
    verify,
)

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # the shell's convention: 128 + SIGINT
GO_ON = {  # what stays of a verb that is interrupted
    "demo": "What is done stays",
    "encode": "What is committed stays",
    "pretrain": "The last checkpoint stays",
    "sweep": "Finished trials and last checkpoints stay",
    "train": "The last checkpoint stays",
    "convert": "A folder appears only when it is whole",
    "gc": "What is removed is removed",
}
# Ray's own switch for machines whose firewall asks about open ports: a cluster of this host alone,
# every process of it on loopback. Ray reads it when it is imported.
LOOPBACK_ONLY = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

app = typer.Typer(
    name="ldznet",
    help="Encode a corpus with a latent diffusion model once; train segmentation heads from it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def exits(verb: Callable[..., int]) -> Callable[..., None]:
    """Wrap a verb so that it ends the process with its exit status, errors said in a line."""

    @functools.wraps(verb)
    def run(*arguments: Any, **options: Any) -> None:
        raise SystemExit(_run(lambda: verb(*arguments, **options)))

    return run


def _run(verb: Callable[[], int]) -> int:
    try:
        return verb()
    except KeyboardInterrupt:
        typer.echo(_say_interrupted(sys.argv[1:]), err=True)
        return EXIT_INTERRUPTED
    except ValueError as error:  # specs, corpora, model files and heads raise its family for input
        typer.echo(f"error: {error}", err=True)
        return EXIT_USAGE
    except (OSError, RuntimeError, ArithmeticError) as error:
        typer.echo(f"failed: {type(error).__name__}: {error}", err=True)
        return EXIT_FAILED


def _say_interrupted(arguments: list[str]) -> str:
    """What stays, and the command that goes on from there."""
    from jobs.command import format_command

    verb = arguments[0] if arguments else ""
    if verb not in GO_ON:
        return "interrupted."
    if verb in ("pretrain", "train") and "--resume" not in arguments:
        arguments = [*arguments, "--resume"]
    return f"interrupted. {GO_ON[verb]}; to go on:\n  {format_command(arguments)}"


for _verb in (
    demo.demo,
    plan.plan,
    encode.encode,
    train.train,
    evaluate.evaluate,
    sweep.sweep,
    segment.segment,
    inspect.inspect,
    verify.verify,
    snapshot.snapshot,
    gc.gc,
    blocks.blocks,
    convert.convert,
    pretrain.pretrain,
):
    app.command(_verb.__name__)(exits(_verb))
app.add_typer(bench.build_app(exits), name="bench")


def main() -> None:
    """Run the command line; exit with 0 done, 1 failed, 2 bad arguments or spec, 3 incomplete."""
    logging.basicConfig(
        level=os.environ.get("LDZNET_LOG", "WARNING").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault(*LOOPBACK_ONLY)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except SystemExit as left:
        if left.code == EXIT_INTERRUPTED:
            # All is unwound. A thread that is still in a model's C++ would abort the interpreter's
            # own end, and the status would be that of a crash.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_INTERRUPTED)
        raise


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
