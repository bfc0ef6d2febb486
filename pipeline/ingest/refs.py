"""References to COCO's objects, as refer's files have them: who says what of which annotation.

Joined by image and annotation ids alone: a reference's own ``file_name`` has a suffix that no file
has. A mask is the union of the annotations' outlines.
"""

import errno
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, PositiveInt, StrictInt, ValidationError

from pipeline.ingest.masks import draw_segmentation
from pipeline.ingest.sample import IngestError, Listing, Phrase, Sample, read_image_file

Text = Literal["sent", "raw"]
Model = TypeVar("Model", bound=BaseModel)

MAX_PIXELS = 2**28  # of an image as its annotations give it: 256 MB a mask


class Sentence(BaseModel):
    """What someone said of an object, as typed and tidied."""

    sent_id: StrictInt
    sent: str = ""
    raw: str = ""


class Ref(BaseModel):
    """Sentences of the same object of an image; in gRefCOCO of several, or of none ([-1])."""

    ref_id: StrictInt
    ann_id: StrictInt | list[StrictInt]
    image_id: StrictInt
    split: str
    sentences: list[Sentence]

    @property
    def ann_ids(self) -> list[int]:
        """The annotations that are meant."""
        return self.ann_id if isinstance(self.ann_id, list) else [self.ann_id]


class CocoImage(BaseModel):
    """COCO's entry of an image."""

    file_name: str
    height: PositiveInt
    width: PositiveInt


class CocoAnnotation(BaseModel):
    """COCO's entry of an object, whose outline is checked as it is drawn."""

    image_id: StrictInt
    iscrowd: bool = False
    segmentation: Any


@dataclass(frozen=True, slots=True)
class RefImage:
    """One image with its references, and COCO's entries by id, which all images share.

    ``grouped``: gRefCOCO's rules. Crowds are left out, and [-1] makes negatives.
    """

    key: str
    folder: Path
    refs: tuple[Ref, ...]
    text: Text
    images: Mapping[int, object]
    annotations: Mapping[int, object]
    grouped: bool

    def build(self) -> Sample:
        """Read the image and draw each reference's mask, which its sentences share."""
        image_id = self.refs[0].image_id
        image = _parse_entry(CocoImage, self.images, image_id)
        if image.height * image.width > MAX_PIXELS:
            raise IngestError("size", f"instances.json: {image.width} x {image.height} px")
        phrases: list[Phrase] = []
        negatives: list[str] = []
        rejects: list[tuple[str, str, str]] = []
        for ref in self.refs:
            said = [(sentence.sent_id, getattr(sentence, self.text)) for sentence in ref.sentences]
            if self.grouped and ref.ann_ids == [-1]:
                negatives += [text for _, text in said]
                continue
            ids: dict[str, str | int] = {
                "ref_id": ref.ref_id,
                "ann_id": " ".join(map(str, ref.ann_ids)),
            }
            try:
                mask = self._draw(ref, image)
                phrases += [Phrase(text, mask, {**ids, "sent_id": i}) for i, text in said]
            except IngestError as error:
                rejects += [(text, error.reason, error.detail) for _, text in said]
        return Sample(
            self._read(Path(image.file_name).name, f"{image_id:012d}.jpg"),
            tuple(phrases),
            tuple(negatives),
            ids={"image_id": image_id},
            rejects=tuple(rejects),
        )

    def _read(self, *names: str) -> bytes:
        """Read the image under its name of 2014, or that of 2017."""
        for name in names:
            if (self.folder / name).is_file():
                return read_image_file(self.folder / name)
        detail = f"it is not there, and {names[1]} neither"
        raise FileNotFoundError(errno.ENOENT, detail, str(self.folder / names[0]))

    def _draw(self, ref: Ref, image: CocoImage) -> np.ndarray:
        """Return the union (H, W) of a reference's objects."""
        mask = np.zeros((image.height, image.width), bool)
        for ann_id in ref.ann_ids:
            annotation = _parse_entry(CocoAnnotation, self.annotations, ann_id)
            if annotation.image_id != ref.image_id:
                detail = f"annotation {ann_id} is of image {annotation.image_id}"
                raise IngestError("other_image", detail)
            parts = [] if self.grouped and annotation.iscrowd else annotation.segmentation
            if not (isinstance(parts, list) and parts and isinstance(parts[0], Mapping)):
                parts = [parts]  # refer's files may have a list of run lengths
            for part in parts:
                mask |= draw_segmentation(part, height=image.height, width=image.width)
        return mask


def list_refs(
    entries: object,
    instances: object,
    *,
    where: Path,
    images: Path,
    split: str,
    text: Text,
    max_sentences: int,
    published: Mapping[str, int],
    grouped: bool = False,
) -> Listing:
    """List one split: a recipe an image, by image id; its sentences in the order of the entries.

    Args:
        entries: The list in refer's files. instances: COCO's, as in ``instances.json``.
        where: Names the files in errors.
        images: The folder of images.
        split: "test" is testA and testB, too.
        max_sentences: In all: a pickle may have one list in many places.

    Raises:
        ValueError: no such split or folder, or entries of another form.
    """
    if not images.is_dir():
        raise ValueError(f"--images: expected a folder, got {images}")
    refs = _parse_refs(entries, where, max_sentences)
    wanted = {split, "testA", "testB"} if split == "test" else {split}
    by_image: dict[int, list[Ref]] = {}
    counts = Counter(refs=0, images=0, pairs=0)
    for ref in refs:
        if ref.split in wanted:
            by_image.setdefault(ref.image_id, []).append(ref)
            counts["refs"] += 1
            is_negative = grouped and ref.ann_ids == [-1]
            counts["negatives" if is_negative else "pairs"] += len(ref.sentences)
    if not by_image:
        found = ", ".join(sorted({ref.split for ref in refs})) or "none"
        raise ValueError(f"--split {split}: no reference is of it; splits in {where}: {found}")
    counts["images"] = len(by_image)
    ann_ids = {i for image_refs in by_image.values() for ref in image_refs for i in ref.ann_ids}
    try:
        image_by_id = {i["id"]: i for i in instances["images"] if i["id"] in by_image}  # type: ignore[index]
        by_id = {a["id"]: a for a in instances["annotations"] if a["id"] in ann_ids}  # type: ignore[index]
    except (KeyError, TypeError) as error:
        expected = "instances.json: expected COCO's images and annotations, each with id"
        raise ValueError(f"{where.parent}: {expected}, got {error!r}") from error
    recipes = (
        RefImage(f"{i:012d}", images, tuple(by_image[i]), text, image_by_id, by_id, grouped)
        for i in sorted(by_image)
    )
    others = {ref.image_id for ref in refs if ref.split not in wanted} & by_image.keys()
    notes = [f"{len(others)} of the {len(by_image)} images are in other splits, too"] * bool(others)
    if split == "test" and any(ref.split == "testA" for ref in refs):
        notes.append("test is testA and testB, as in refer's own code; elsewhere it is testA alone")
    return Listing(recipes, split, published, counts, tuple(notes))


def _parse_refs(entries: object, where: Path, max_sentences: int) -> list[Ref]:
    if not isinstance(entries, list):
        raise ValueError(f"{where}: expected a list of references, got {type(entries).__name__}")
    refs: list[Ref] = []
    for number, entry in enumerate(entries):
        try:
            refs.append(Ref.model_validate(entry))
        except ValidationError as error:
            raise ValueError(f"{where}: reference {number}: {_tell(error)}") from error
        if (max_sentences := max_sentences - len(refs[-1].sentences)) < 0:
            raise ValueError(f"{where}: has more sentences than its bytes can hold")
    return refs


def _parse_entry(kind: type[Model], entries: Mapping[int, object], number: int) -> Model:
    """Return an entry of COCO's; an error's reason is ``no_annotation`` or ``bad_annotation``."""
    where = f"instances.json: {kind.__name__.removeprefix('Coco').lower()} {number}"
    if number not in entries:
        raise IngestError("no_annotation", f"{where}: is not there")
    try:
        return kind.model_validate(entries[number])
    except ValidationError as error:
        raise IngestError("bad_annotation", f"{where}: {_tell(error)}") from error


def _tell(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r:.60}"


def find_folder(root: Path, dataset: str, name: str) -> Path:
    """Return the folder of a dataset's files: the root, or the one of its name in it.

    Raises:
        FileNotFoundError: neither has the file ``name``.
    """
    for folder in (root, root / dataset):
        if (folder / name).is_file():
            return folder
    raise FileNotFoundError(f"{root}: expected {name} and instances.json there or in {dataset}/")


def load_json(path: Path) -> Any:
    """Read a JSON file whole: COCO's of 100 MB takes about 1 GB.

    Raises:
        ValueError: it is no JSON.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON: {type(error).__name__}: {error}") from error
