"""``ldznet demo``: every step once, on drawn scenes and the tiny model."""

import sys
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from jobs.command import format_command
from jobs.outputs import check_folder


def demo(
    out: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("demo-out"),
    size: Annotated[str, typer.Option(help="default, or smallest for a quick check.")] = "default",
) -> int:
    """Draw a corpus, encode it, train and score heads, segment images, and write a report."""
    from pipeline.base.yaml import parse_yaml
    from pipeline.demo.recipe import SIZES, DemoRecipe
    from pipeline.demo.run import Demo, run_demo

    if size not in SIZES:
        raise ValueError(f"--size: expected one of {', '.join(SIZES)}, got {size!r}")
    check_folder("--out", out, own={"demo.json"})
    text = (files("jobs") / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    recipe = parse_yaml(text, DemoRecipe, where="demo.yaml")
    command = format_command(sys.argv[1:])
    found = Demo(out.absolute(), SIZES[size], recipe, command)
    typer.echo(f"report: {run_demo(found, say=partial(typer.echo, err=True))}")
    return 0
