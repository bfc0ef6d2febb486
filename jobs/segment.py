"""``ldznet segment``: the mask of one image from a phrase."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.outputs import check_picture


def segment(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, or a training's --out.")],
    image: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="JPEG, PNG or WebP.")],
    text: Annotated[str, typer.Option(help="The phrase that says what to segment.")],
    out: Annotated[Path, typer.Option(help="The mask to write, a PNG of the image's size.")] = Path(
        "mask.png"
    ),
    overlay: Annotated[
        Path | None, typer.Option(help="A PNG to write: the image with the mask over it.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Foreground is where the probability is above it; default: the threshold of the "
            "checkpoint's best validation mIoU, or 0.5 where it has none.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The latent diffusion model, if it is not where the run found it."),
    ] = None,
) -> int:
    """Segment one image from a phrase; needs no store."""
    from pipeline.decode.images import BadImageError
    from pipeline.segment import Segmenter, describe_mask, write_pictures

    check_picture("--out", out, image)
    if overlay is not None:
        check_picture("--overlay", overlay, image, out)
    data = image.read_bytes()  # before the seconds that a model takes to load
    segmenter = Segmenter(checkpoint, model=model)
    try:
        pixels = segmenter.decode_image(data)
    except BadImageError as error:
        raise ValueError(f"{image}: {error}") from error
    probability = segmenter.segment(pixels, text)
    over = segmenter.threshold if threshold is None else threshold
    share = write_pictures(pixels, probability, threshold=over, out=out, overlay=overlay)
    said = describe_mask(segmenter, probability, threshold)
    typer.echo(f"{out}: {share:.1%} of the image is {segmenter.shorten(text.strip())!r}, {said}")
    if overlay is not None:
        typer.echo(str(overlay))
    return 0
