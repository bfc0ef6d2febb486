"""RefCOCO, RefCOCO+ and RefCOCOg, from refer's own files or from parquet files made of them.

``refs(unc).p`` names the references and ``instances.json`` their outlines; the images are COCO's
train2014, or train2017's, which has the same ones under shorter names. Every sentence is a pair;
equal ones stay.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from pipeline.ingest.pickle_data import load_plain_pickle
from pipeline.ingest.refs import Text, find_folder, list_refs, load_json
from pipeline.ingest.sample import Listing

Dataset = Literal["refcoco", "refcoco+", "refcocog"]
SplitBy = Literal["unc", "umd", "google"]

SPLIT_BY = {"refcoco": ("unc", "google"), "refcoco+": ("unc",), "refcocog": ("umd", "google")}
PUBLISHED: dict[tuple[str, str, str], tuple[int, ...]] = {  # refs, images, sentences
    ("refcoco", "unc", "train"): (42_404, 16_994, 120_624),
    ("refcoco", "unc", "val"): (3_811, 1_500, 10_834),
    ("refcoco", "unc", "testA"): (1_975, 750, 5_657),
    ("refcoco", "unc", "testB"): (1_810, 750, 5_095),
    ("refcoco+", "unc", "train"): (42_278, 16_992, 120_191),
    ("refcoco+", "unc", "val"): (3_805, 1_500, 10_758),
    ("refcoco+", "unc", "testA"): (1_975, 750, 5_726),
    ("refcoco+", "unc", "testB"): (1_798, 750, 4_889),
    ("refcocog", "umd", "train"): (42_226, 21_899, 80_512),
    ("refcocog", "umd", "val"): (2_573, 1_300, 4_896),
    ("refcocog", "umd", "test"): (5_023, 2_600, 9_602),
    ("refcocog", "google", "train"): (44_822, 24_698),
    ("refcocog", "google", "val"): (5_000, 4_650),
}
_COLUMNS = ["ref_id", "ann_id", "image_id", "split", "sentences", "raw_anns", "raw_image_info"]


def list_refer(
    sources: Sequence[Path],
    *,
    dataset: Dataset,
    split_by: SplitBy,
    split: str,
    images: Path,
    text: Text = "sent",
) -> Listing:
    """List one split: a recipe an image, by image id.

    Args:
        sources: refer's folder, with ``refs(SPLIT_BY).p`` and ``instances.json`` in it or in its
            folder of the dataset's name; or parquet files (jxu124's on the Hugging Face hub).
        split: "test" of RefCOCO and RefCOCO+ is testA and testB.
        images: The folder of COCO's images.
        text: "sent" is lower case without punctuation, "raw" as it was typed.

    Raises:
        ValueError: no such split, a file of another form, or a pickle of more than plain data.
        OSError: a file cannot be read.
    """
    if split_by not in SPLIT_BY[dataset]:
        known = " or ".join(SPLIT_BY[dataset])
        raise ValueError(f"--split-by {split_by}: {dataset} is split by {known}")
    if all(source.suffix == ".parquet" for source in sources):
        if split_by == "google":
            raise ValueError("--split-by google: such parquet files are split by unc and umd")
        where = sources[0]
        entries, instances = _read_parquet(sources, dataset)
        max_sentences = sum(len(entry["sentences"]) for entry in entries)
    elif len(sources) == 1:
        name = f"refs({split_by}).p"
        where = find_folder(sources[0], dataset, name) / name
        max_sentences = where.stat().st_size
        entries, instances = load_plain_pickle(where), load_json(where.parent / "instances.json")
    else:
        raise ValueError(
            f"expected one folder, or parquet files alone, got {', '.join(map(str, sources))}"
        )
    return list_refs(
        entries,
        instances,
        where=where,
        images=images,
        split=split,
        text=text,
        max_sentences=max_sentences,
        published=_sum_published(dataset, split_by, split),
    )


def _sum_published(dataset: Dataset, split_by: SplitBy, split: str) -> dict[str, int]:
    parts = ("test", "testA", "testB") if split == "test" else (split,)
    counts = [PUBLISHED[k] for part in parts if (k := (dataset, split_by, part)) in PUBLISHED]
    sums = map(sum, zip(*counts, strict=True))
    return dict(zip(("refs", "images", "pairs"), sums, strict=False))  # not all have pairs


def _read_parquet(
    files: Sequence[Path], dataset: Dataset
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return refer's entries and COCO's instances, of which each row has its own as JSON.

    The hub calls val "validation", and testA "test".
    """
    names = {"validation": "val"} | ({"test": "testA"} if dataset != "refcocog" else {})
    entries, images, annotations = [], {}, []
    for file in files:
        for number, row in enumerate(_list_rows(file)):
            try:
                annotation, image = json.loads(row["raw_anns"]), json.loads(row["raw_image_info"])
                annotations.append({**annotation, "id": row["ann_id"]})
                images[row["image_id"]] = {**image, "id": row["image_id"]}
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"{file}: row {number}: {type(error).__name__}: {error}"
                ) from error
            entries.append({**row, "split": names.get(row["split"], row["split"])})
    return entries, {"images": list(images.values()), "annotations": annotations}


def _list_rows(file: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(file) as table:
        names = table.schema_arrow.names
        missing = [name for name in _COLUMNS if name not in names]
        if missing and "question_id" in names and "segmentation" in names:
            raise ValueError(
                f"{file}: its column segmentation is one flat list (lmms-lab's files), so that the "
                "polygons of an object cannot be told apart. Take refer's files, or jxu124's."
            )
        if missing:
            raise ValueError(
                f"{file}: expected jxu124's columns, got none named {', '.join(missing)}"
            )
        for batch in table.iter_batches(batch_size=1024, columns=_COLUMNS):
            yield from batch.to_pylist()
