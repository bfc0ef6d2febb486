"""``ldznet plan``: forecast what encoding a corpus will store, take and cost."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs import options

if TYPE_CHECKING:
    from pipeline.runs.config import TrainConfig

RECIPE = Path(__file__).parent / "recipes" / "ldznet.yaml"


def plan(
    corpus: options.OptionalCorpus = None,
    spec: Annotated[Path | None, typer.Option(help="YAML: what would be encoded.")] = None,
    store: Annotated[
        str | None,
        typer.Option(help="The store that encode would write: writing is timed beside it."),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(help="YAML of a head to train; repeatable. Default: every head."),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars an hour of one GPU.")] = None,
    heads: Annotated[
        bool, typer.Option("--heads/--no-heads", help="Whether to time the training of heads.")
    ] = True,
    actors: options.Actors = None,
    batch: options.Batch = 16,
    threads: options.Threads = None,
    decoders: options.Decoders = None,
    gpus: options.Gpus = None,
    split_gb: options.SplitGb = None,
    channels_last: options.ChannelsLast = False,
    compile_blocks: options.CompileBlocks = False,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Images to encode for it; default: 64, or four batches."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of a head; default: as its config says.")
    ] = None,
    root: options.Root = None,
    seed: Annotated[int, typer.Option(help="Seed that chooses the tars and images.")] = 0,
    compare: Annotated[
        Path | None,
        typer.Option(help="The metrics.jsonl of a run: compare --forecast with it and --store."),
    ] = None,
    forecast: Annotated[
        Path | None, typer.Option(help="What an earlier plan printed with --json.")
    ] = None,
    as_json: options.AsJson = False,
) -> int:
    """Forecast bytes, hours and dollars from a sample, and whether a cache saves time."""
    if compare is not None or forecast is not None:
        return _compare(compare, forecast, store, as_json)
    if not corpus or spec is None:
        raise ValueError("plan: expected --corpus and --spec, or --compare with --forecast")
    if config and not heads:
        raise ValueError("plan: expected --config or --no-heads, got both")
    from pipeline.base.yaml import load_yaml
    from pipeline.spec.fields import DEFAULT_SPLIT_BYTES, Spec

    parsed, timed = load_yaml(spec, Spec), tuple(_load_heads(config)) if heads else ()
    from models.ldm.tuning import Tuning
    from pipeline.encode.actor_pool import ActorBounds
    from pipeline.plan.report import format_forecast
    from pipeline.plan.run import PlanOptions, make_plan

    asked = PlanOptions(
        corpus=tuple(corpus),
        spec=parsed,
        heads=timed,
        spec_name=str(spec),
        required=bool(config),
        store=store,
        root=root,
        price=price,
        actors=None if actors is None else ActorBounds.parse(actors),
        num_threads=threads,
        num_decoders=decoders,
        num_gpus=gpus,
        split_bytes=DEFAULT_SPLIT_BYTES if split_gb is None else round(split_gb * 2**30),
        batch=batch,
        num_samples=samples,
        epochs=epochs,
        seed=seed,
        tuning=Tuning(channels_last=channels_last, compile=compile_blocks),
    )
    found = make_plan(asked, say=lambda line: typer.echo(f"plan: {line}", err=True))
    typer.echo(found.to_json() if as_json else format_forecast(found))
    return 0


def _load_heads(configs: list[Path] | None) -> list["TrainConfig"]:
    """Return the heads to time: those of the configs, or the recipe's with each head's name."""
    from models.heads.registry import HEADS
    from pipeline.base.yaml import load_yaml
    from pipeline.runs.config import TrainConfig

    if configs:
        from pipeline.runs.start import look_up_starts

        return [load_yaml(path, TrainConfig, prepare=look_up_starts) for path in configs]
    recipe = load_yaml(RECIPE, TrainConfig)
    return [
        recipe.model_copy(update={"head": recipe.head.model_copy(update={"name": name})})
        for name in HEADS
    ]


def _compare(metrics: Path | None, forecast: Path | None, store: str | None, as_json: bool) -> int:
    from pipeline.plan.compare import compare, format_comparison
    from pipeline.plan.forecast import read_forecast

    if metrics is None or forecast is None or store is None:
        raise ValueError(
            "plan: a comparison takes --compare METRICS, --forecast FILE and --store URL together"
        )
    rows = compare(read_forecast(forecast), store, metrics)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        typer.echo(format_comparison(rows))
    return 0
