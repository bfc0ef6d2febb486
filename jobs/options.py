"""Options that several commands take, each declared once: the same name, meaning and help."""

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StoreUrl = Annotated[str, typer.Argument(help="The store: a folder or an s3:// URL.")]
_STORE = typer.Option("--store", help="The store: a folder or an s3:// URL.")
StoreOption = Annotated[str, _STORE]
OptionalStore = Annotated[str | None, _STORE]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")]
Metrics = Annotated[
    Path | None,
    typer.Option(help="Where to write metrics.jsonl; default: a new folder below ldznet-runs/."),
]
Patience = Annotated[
    float, typer.Option(min=0, help="Minutes to wait for a store on S3 that does not answer.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:1; default: cuda where there is a GPU.")
]

# A corpus, and the encoding of it: plan forecasts the run that encode would make.
_TARS = "Tars, as a path or an fsspec URL with globs and braces; repeatable."
Corpus = Annotated[list[str], typer.Option(help=_TARS)]
OptionalCorpus = Annotated[list[str] | None, typer.Option(help=_TARS)]
Root = Annotated[
    str | None,
    typer.Option(help="Task ids are paths below this folder; default: found from the tars."),
]
Actors = Annotated[
    str | None,
    typer.Option(
        help="Workers: N, or MIN:MAX while nodes come and go; default: as many as there is room "
        "for; 0: in this process, without Ray."
    ),
]
Gpus = Annotated[
    float | None, typer.Option(min=0, help="GPUs a worker; default: 1 where there are GPUs.")
]
Batch = Annotated[int, typer.Option(min=1, help="Rows in one pass through a model.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of a worker's model.")]
Decoders = Annotated[
    int | None, typer.Option(min=1, help="Processes of a worker that decode images.")
]
ChannelsLast = Annotated[
    bool, typer.Option("--channels-last", help="NHWC convolutions: faster on many GPUs.")
]
CompileBlocks = Annotated[
    bool,
    typer.Option("--compile", help="torch.compile; costs each worker a minute or more at first."),
]
SplitGb = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        help="Split tars longer than so many GiB; default: 1. Fixed by a layer's first run.",
    ),
]

# Models and views.
UNetModel = Annotated[
    str, typer.Option("--model", help="A diffusers folder or hub id; sd14: SD 1.4's config.")
]
RandomModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A diffusers folder or hub id; sd14: SD 1.4's size, random weights; default: a tiny "
        "model, random weights.",
    ),
]
SizePx = Annotated[int, typer.Option("--size", help="Side of a view in px, a multiple of 64.")]

# Benchmarks.
Images = Annotated[
    list[str] | None,
    typer.Option(help="Tars, as encode's --corpus; repeatable. Default: scenes drawn here."),
]
Turns = Annotated[int, typer.Option(min=1, help="How often the two sides take turns.")]
ScratchParent = Annotated[
    Path | None,
    typer.Option("--dir", help="Folder on the disk to measure; default: a temporary one."),
]


def check_store(url: str) -> None:
    """Refuse a URL without a store; this takes no torch, which a verb imports after it.

    Raises:
        ValueError: there is none; says what is there.
    """
    from pipeline.store.store import Store

    Store.open(url).list_layers(required=True)
