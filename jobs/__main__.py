"""``ldznet VERB``, the same as ``python -m jobs VERB``.

The verbs' modules are light; each imports what it runs when it runs, so that ``--help`` and a
mistyped option answer at once instead of after the seconds that torch and Ray take to import.
"""

import logging
import os
import signal
import sys
from types import FrameType

import click
import typer

from jobs import demo, encode, evaluate, inspect, segment, train

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # the shell's convention: 128 + SIGINT
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
app.command("demo")(demo.demo)
app.command("encode")(encode.encode)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("segment")(segment.segment)
app.command("inspect")(inspect.inspect)


def main() -> None:
    """Run the command line; exit with 0 done, 1 failed, 2 bad arguments or spec, 3 incomplete."""
    logging.basicConfig(
        level=os.environ.get("LDZNET_LOG", "WARNING").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault(*LOOPBACK_ONLY)
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(_run())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run() -> int:
    command = typer.main.get_command(app)
    try:
        return command.main(prog_name="ldznet", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return EXIT_USAGE
    except (click.exceptions.Abort, KeyboardInterrupt):
        typer.echo(
            "interrupted. What is committed stays; run the same command again to go on.", err=True
        )
        return EXIT_INTERRUPTED
    except ValueError as error:  # specs, corpora, model files and heads raise its family for input
        typer.echo(f"error: {error}", err=True)
        return EXIT_USAGE
    except (OSError, RuntimeError) as error:
        typer.echo(f"failed: {type(error).__name__}: {error}", err=True)
        return EXIT_FAILED


if __name__ == "__main__":
    main()
