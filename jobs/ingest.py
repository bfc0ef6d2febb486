"""``ldznet ingest KIND``: a dataset's own files into tars that ``encode`` reads.

A kind is a function that returns its listing; its options become the arguments that the tars depend
on. Another kind is one more function here, in ``KINDS``, and one file in pipeline/ingest.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jobs.command import EXIT_FAILED, EXIT_INCOMPLETE
from jobs.outputs import check_outlives_job

if TYPE_CHECKING:
    from pipeline.ingest.sample import Listing


CocoImages = Annotated[
    Path, typer.Option(help="The folder of COCO's train2014 images, or of train2017's.")
]
SentenceText = Annotated[
    Literal["sent", "raw"],
    typer.Option(help="sent: lower case without punctuation; raw: as it was typed."),
]


def folder(
    directory: Annotated[Path, typer.Argument(help="Images are sought in it and below.")],
    captions: Annotated[
        Literal["txt", "json", "filename", "none"],
        typer.Option(
            help="Phrases: in NAME.txt beside NAME.jpg, in NAME.json's phrases or caption, in the "
            "file's name with spaces for underscores, or none."
        ),
    ] = "none",
    masks: Annotated[
        str | None,
        typer.Option(
            help="Masks' PNGs, seen from the folder: 'masks/{stem}_{i}.png', i from 0 or 1, one a "
            "phrase; without {i} one for all phrases. {stem} is the image's name without its "
            "extension, {dir} its folder."
        ),
    ] = None,
) -> "Listing":
    """Images in a folder, with captions and masks beside them."""
    from pipeline.ingest.folder import list_folder

    return list_folder(directory, captions=captions, masks=masks)


def phrasecut(
    root: Annotated[Path, typer.Argument(help="The folder VGPhraseCut_v0.")],
    split: Annotated[
        Literal["train", "val", "miniv", "test"], typer.Option(help="Which refer_<split>.json.")
    ],
    raster: Annotated[
        Literal["centre", "official"],
        typer.Option(
            help="centre: pixels whose centre is in the outline, as CLIPSeg and LD-ZNet draw; "
            "official: as PhraseCut's evaluator does."
        ),
    ] = "centre",
) -> "Listing":
    """PhraseCut's phrases and outlines on Visual Genome's images."""
    from pipeline.ingest.phrasecut import list_phrasecut

    return list_phrasecut(root, split=split, raster=raster)


def refer(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="The folder with refs(SPLIT_BY).p and instances.json, or parquet files with their "
            "rows (jxu124/refcoco and so on)."
        ),
    ],
    dataset: Annotated[
        Literal["refcoco", "refcoco+", "refcocog"], typer.Option(help="Which one it is.")
    ],
    split_by: Annotated[
        Literal["unc", "umd", "google"],
        typer.Option(help="Whose splits: unc; of refcocog umd or google."),
    ],
    split: Annotated[
        Literal["train", "val", "testA", "testB", "test"],
        typer.Option(help="test of refcoco and refcoco+ is testA and testB."),
    ],
    images: CocoImages,
    text: SentenceText = "sent",
) -> "Listing":
    """RefCOCO, RefCOCO+ and RefCOCOg: each sentence a pair, on COCO's images."""
    from pipeline.ingest.refer import list_refer

    return list_refer(
        sources, dataset=dataset, split_by=split_by, split=split, images=images, text=text
    )


def grefcoco(
    root: Annotated[Path, typer.Argument(help="With grefs(unc).json and instances.json.")],
    split: Annotated[Literal["train", "val", "testA", "testB"], typer.Option(help="Which one.")],
    images: CocoImages,
    text: SentenceText = "sent",
) -> "Listing":
    """gRefCOCO: sentences of several objects, and as negatives those of none."""
    from pipeline.ingest.grefcoco import list_grefcoco

    return list_grefcoco(root, split=split, images=images, text=text)


def reasonseg(
    root: Annotated[Path, typer.Argument(help="With the folders train, val and test.")],
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Which folder.")],
) -> "Listing":
    """ReasonSeg: questions whose answer is a region, with regions to ignore."""
    from pipeline.ingest.reasonseg import list_reasonseg

    return list_reasonseg(root, split=split)


def coco(
    instances: Annotated[Path, typer.Argument(help="The file instances_*.json.")],
    images: Annotated[Path, typer.Option(help="The folder that file_name is seen from.")],
    lvis: Annotated[
        bool,
        typer.Option(
            "--lvis",
            help="The file is LVIS's: --images holds train2017 and val2017, names lose _(remarks), "
            "classes not exhaustively marked are left out.",
        ),
    ] = False,
) -> "Listing":
    """COCO's classes as phrases, with the union of their outlines; LVIS's too."""
    from pipeline.ingest.coco import list_coco

    return list_coco(instances, images, lvis=lvis)


def labels(
    images: Annotated[str, typer.Option(help="Glob of the images, in quotes.")],
    labels: Annotated[
        str, typer.Option(help="Glob of their maps of class ids, PNG, with as many *.")
    ],
    names: Annotated[
        Path,
        typer.Option(help="Names of classes: lines 'id name', a name a line from 0 on, or JSON."),
    ],
    ignore: Annotated[
        list[int] | None, typer.Option(help="An id that neither loss nor metrics count; repeat it.")
    ] = None,
    only: Annotated[
        Path | None, typer.Option(help="A list of the images to take, a name a line, as VOC has.")
    ] = None,
) -> "Listing":
    """Maps of class ids: VOC, ADE20K, Cityscapes, CamVid, and one's own."""
    from pipeline.ingest.labels import list_labels

    return list_labels(images, labels, names, ignore=ignore or (), only=only)


def parquet(
    files: Annotated[list[str], typer.Argument(help="Paths or fsspec URLs, globs in quotes.")],
    image: Annotated[str, typer.Option(help="The column with images: {bytes, path} or binary.")],
    text: Annotated[
        str | None, typer.Option(help="The column with phrases: text, or lists of it.")
    ] = None,
) -> "Listing":
    """Images inside Parquet files: Hugging Face's and img2dataset's."""
    from pipeline.ingest.parquet import list_parquet

    return list_parquet(files, image=image, text=text)


KINDS: tuple[Callable[..., "Listing"], ...] = (
    *(folder, phrasecut, refer, grefcoco, reasonseg),
    *(coco, labels, parquet),
)


def _run(
    list_images: Callable[[], "Listing"],
    arguments: dict[str, Any],
    *,
    out: Annotated[str, typer.Option(help="Folder or fsspec URL for the tars.")],
    split: Annotated[
        str | None,
        typer.Option(
            help="What the tars are called: train makes train-00000.tar, which data.train of a "
            "training finds. Default: by the kind, images, labels or the file's name."
        ),
    ] = None,
    shard_mb: Annotated[float, typer.Option(min=0.001, help="MB after which a tar ends.")] = 1000.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell the counts and three samples; write nothing.")
    ] = False,
    expect_images: Annotated[
        int | None, typer.Option(min=0, help="End with status 1 if there are not so many.")
    ] = None,
    expect_pairs: Annotated[
        int | None, typer.Option(min=0, help="The same, of images with a phrase.")
    ] = None,
) -> int:
    """List a kind's images and write them; its keyword arguments are options of every kind."""
    from pipeline.ingest.report import describe_listing, describe_run, find_unexpected
    from pipeline.ingest.run import run_ingest

    check_outlives_job("--out", out)
    typer.echo("ingest: reading the annotations", err=True)
    listing = list_images()
    if split is not None:
        listing = dataclasses.replace(listing, split=split)
    if dry_run:
        for line in describe_listing(listing, limit):
            typer.echo(line)
        counted = listing.listed
        if limit is not None:
            counted = {"images": min(limit, listing.listed["images"])}
    else:
        shard_bytes = round(shard_mb * 1e6)
        done = run_ingest(listing, out, arguments=arguments, shard_bytes=shard_bytes, limit=limit)
        typer.echo(describe_run(listing, done, out, limit))
        if done.images == 0:
            return EXIT_INCOMPLETE
        counted = {"images": done.images, "pairs": done.pairs}
    unexpected = find_unexpected(counted, {"images": expect_images, "pairs": expect_pairs})
    for sentence in unexpected:
        typer.echo(sentence, err=True)
    return EXIT_FAILED if unexpected else 0


def _build_command(kind: Callable[..., "Listing"]) -> Callable[..., int]:
    """Return a kind's command: its own options, and those of every kind."""
    own = inspect.signature(kind).parameters
    shared = {
        name: one
        for name, one in inspect.signature(_run).parameters.items()
        if one.kind is inspect.Parameter.KEYWORD_ONLY and name not in own
    }

    def command(**options: Any) -> int:
        chosen = {name: options.pop(name) for name in own}
        arguments = {name: _plain(value) for name, value in chosen.items()}
        for name in _PATHS & arguments.keys():
            arguments[name] = _make_absolute(arguments[name])
        return _run(lambda: kind(**chosen), {"kind": kind.__name__, **arguments}, **options)

    command.__name__, command.__doc__ = kind.__name__, kind.__doc__
    as_keywords = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own.values()]
    signature = inspect.Signature([*as_keywords, *shared.values()], return_annotation=int)
    command.__signature__ = signature  # type: ignore[attr-defined]  # typer reads it
    command.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
    return command


_PATHS = {"files", "images", "labels"}
"""Options that are paths, globs or URLs."""


def _make_absolute(value: Any) -> Any:
    """Return paths and globs as they are seen from anywhere; URLs as they are."""
    if isinstance(value, list):
        return [_make_absolute(one) for one in value]
    return value if "://" in value else os.path.abspath(value)


def _plain(value: Any) -> Any:
    """Return an option as JSON has it; a path whole, since it depends on where the user stands."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value.absolute()) if isinstance(value, Path) else value


def build_app(wrap: Callable[[Callable[..., int]], Callable[..., None]]) -> typer.Typer:
    """Build the commands under ``ingest``; ``wrap`` turns a returned status into an exit."""
    app = typer.Typer(
        help="Turn a dataset's own files into tars that encode reads.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    for kind in KINDS:
        app.command(kind.__name__)(wrap(_build_command(kind)))
    return app
