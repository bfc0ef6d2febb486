"""The options of ``encode`` that ``plan`` takes too: with the same words, it forecasts that run."""

from typing import Annotated

import typer

Batch = Annotated[int, typer.Option(min=1, help="Rows a pass through a model.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of the model, a worker.")]
Decoders = Annotated[
    int | None, typer.Option(min=1, help="Processes that decode images, a worker.")
]
ChannelsLast = Annotated[
    bool, typer.Option("--channels-last", help="NHWC convolutions: faster on many GPUs.")
]
CompileBlocks = Annotated[
    bool, typer.Option("--compile", help="torch.compile; a minute or more a worker at first.")
]
Root = Annotated[
    str | None, typer.Option(help="Folder that task ids are relative to; default: deduced.")
]
SplitGb = Annotated[
    float | None,
    typer.Option(
        min=0.001, help="Split tars longer than this, in GiB; default 1. Chosen once a layer."
    ),
]
