"""``ldznet plan``: what encoding a corpus will store, take and cost, before it is spent."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.encode_options import Batch, ChannelsLast, CompileBlocks, Decoders, Root, SplitGb, Threads

DEFAULT_HEADS = ("znet", "ldznet", "rgbnet", "probe")
RECIPE = Path(__file__).parent / "recipes" / "ldznet.yaml"


def plan(
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Tars, as encode's --corpus; repeatable."),
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="YAML: what would be encoded.")] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Where it would be stored: times that storage, beside the store."),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(help="YAML of a head to train; repeatable. Default: every head there is."),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars a GPU and hour.")] = None,
    heads: Annotated[
        bool, typer.Option("--heads/--no-heads", help="Time the heads; without: encoding alone.")
    ] = True,
    actors: Annotated[
        str | None,
        typer.Option(
            help="Workers, N or MIN:MAX as encode's, MAX is planned; default what this machine "
            "has room for; 0: without Ray."
        ),
    ] = None,
    batch: Batch = 16,
    threads: Threads = None,
    decoders: Decoders = None,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs a worker; default 1 where this machine has any."),
    ] = None,
    split_gb: SplitGb = None,
    channels_last: ChannelsLast = False,
    compile_blocks: CompileBlocks = False,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Images encoded to measure; default 64, or four batches."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="That a head is trained; default its config's.")
    ] = None,
    root: Root = None,
    seed: Annotated[int, typer.Option(help="Of which tars and images are looked at.")] = 0,
    compare: Annotated[
        Path | None,
        typer.Option(help="metrics.jsonl of a run: hold --forecast against it and --store."),
    ] = None,
    forecast: Annotated[
        Path | None, typer.Option(help="What an earlier plan printed with --json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Forecast bytes, hours and cost from a sample, and whether caching pays."""
    if compare is not None or forecast is not None:
        return _compare(compare, forecast, store, as_json)
    if not corpus or spec is None:
        raise ValueError("plan: expected --corpus and --spec, or --compare with --forecast")
    if config and not heads:
        raise ValueError("plan: expected --config or --no-heads, got both")
    from models.ldm.tuning import Tuning
    from pipeline.base.yaml import load_yaml
    from pipeline.encode.actor_pool import ActorBounds
    from pipeline.plan.report import format_forecast
    from pipeline.plan.run import PlanOptions, make_plan
    from pipeline.spec.fields import DEFAULT_SPLIT_BYTES, Spec

    options = PlanOptions(
        corpus=tuple(corpus),
        spec=load_yaml(spec, Spec),
        heads=tuple(_load_heads(config)) if heads else (),
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
    found = make_plan(options, say=lambda line: typer.echo(f"plan: {line}", err=True))
    typer.echo(found.to_json() if as_json else format_forecast(found))
    return 0


def _load_heads(configs: list[Path] | None) -> list[Any]:
    """The heads to time: those of the configs, or the recipe's with each head's name."""
    from pipeline.base.yaml import load_yaml
    from pipeline.runs.config import TrainConfig

    if configs:
        return [load_yaml(path, TrainConfig) for path in configs]
    recipe = load_yaml(RECIPE, TrainConfig)
    return [
        recipe.model_copy(update={"head": recipe.head.model_copy(update={"name": name})})
        for name in DEFAULT_HEADS
    ]


def _compare(metrics: Path | None, forecast: Path | None, store: str | None, as_json: bool) -> int:
    from pipeline.plan.compare import compare, format_comparison
    from pipeline.plan.forecast import read_forecast

    if metrics is None or forecast is None or store is None:
        raise ValueError(
            "plan: a comparison takes --compare METRICS, --forecast FILE and --store URL together"
        )
    rows = compare(read_forecast(forecast), store, metrics)
    plain = [asdict(row) for row in rows]
    typer.echo(json.dumps(plain, indent=1) if as_json else format_comparison(rows))
    return 0
