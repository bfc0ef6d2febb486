"""``ldznet demo``: the main job whole, on an embedded default."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("demo-out"),
    size: Annotated[str, typer.Option(help="default, or smallest for a quick check.")] = "default",
) -> int:
    """Draw a corpus, encode it, train three heads, evaluate, segment, and report."""
    from pipeline.demo import SIZES, Demo, run_demo
    from pipeline.spec import Spec, parse_yaml
    from pipeline.train_config import TrainConfig

    if size not in SIZES:
        raise ValueError(f"--size: expected one of {', '.join(SIZES)}, got {size!r}")
    recipes = files("jobs") / "recipes"
    spec = parse_yaml((recipes / "demo-spec.yaml").read_text(), Spec, where="demo-spec.yaml")
    train = parse_yaml(
        (recipes / "demo-train.yaml").read_text(), TrainConfig, where="demo-train.yaml"
    )
    report = run_demo(Demo(out.absolute(), SIZES[size], spec, train), say=_say)
    typer.echo(f"report: {report}")
    return 0


def _say(text: str) -> None:
    typer.echo(text, err=True)
