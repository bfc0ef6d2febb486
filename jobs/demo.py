"""``ldznet demo``: the main job whole, on an embedded default."""

import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("demo-out"),
    size: Annotated[str, typer.Option(help="default, or smallest for a quick check.")] = "default",
) -> int:
    """Draw a corpus, encode it, train heads and probes, score and segment, and report."""
    from jobs.command import format_command
    from pipeline.base.yaml import parse_yaml
    from pipeline.demo.recipe import SIZES, DemoRecipe
    from pipeline.demo.run import Demo, run_demo

    if size not in SIZES:
        raise ValueError(f"--size: expected one of {', '.join(SIZES)}, got {size!r}")
    text = (files("jobs") / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    recipe = parse_yaml(text, DemoRecipe, where="demo.yaml")
    command = format_command(sys.argv[1:])
    report = run_demo(Demo(out.absolute(), SIZES[size], recipe, command), say=_say)
    typer.echo(f"report: {report}")
    return 0


def _say(text: str) -> None:
    typer.echo(text, err=True)
