"""gRefCOCO: RefCOCO's images with phrases of several objects at once, or of none.

Source of its rules: the loader that its authors publish (ReLA). A mask is the union of the named
objects, crowds left out; ``ann_id`` [-1] makes the sentences negatives of the image.
"""

from pathlib import Path

from pipeline.ingest.refs import Text, find_folder, list_refs, load_json
from pipeline.ingest.sample import Listing

PUBLISHED_IMAGES = {"train": 16_994, "val": 1_500, "testA": 750, "testB": 750}  # RefCOCO's, by unc


def list_grefcoco(root: Path, *, split: str, images: Path, text: Text = "sent") -> Listing:
    """List one split of ``grefs(unc).json`` and ``instances.json``, a recipe an image, by id.

    Raises:
        ValueError: no such split, or a file of another form.
        OSError: a file cannot be read.
    """
    name = "grefs(unc).json"
    where = find_folder(root, "grefcoco", name) / name
    return list_refs(
        load_json(where),
        load_json(where.parent / "instances.json"),
        where=where,
        images=images,
        split=split,
        text=text,
        max_sentences=where.stat().st_size,
        published={"images": PUBLISHED_IMAGES[split]} if split in PUBLISHED_IMAGES else {},
        grouped=True,
    )
