"""Images in a folder, with captions and masks beside them: AIGI's layout, and one's own.

A key is the image's path below the folder, without its extension, made plain by ``make_key``.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.base.progress_text import make_printable
from pipeline.corpus.members import IMAGE_EXTENSIONS
from pipeline.decode.images import BadImageError
from pipeline.decode.masks import decode_mask
from pipeline.ingest.sample import (
    IngestError,
    Listing,
    Phrase,
    Sample,
    make_key,
    read_image_file,
)
from pipeline.ingest.writer import read_image_header

Captions = Literal["txt", "json", "filename", "none"]


def list_folder(directory: Path, *, captions: Captions, masks: str | None) -> Listing:
    """List the images in a folder and below; a folder's own images first, all sorted by name.

    Raises:
        ValueError: no folder, or masks without captions or of no pattern.
        OSError: a folder cannot be listed.
    """
    if not directory.is_dir():
        raise ValueError(f"ingest folder: expected a folder, got {directory}")
    if masks is not None:
        _check_pattern(masks, captions)
    left_out: Counter[str] = Counter()
    num_images = 0
    first_mask = 1  # of each image: 0 if any has a mask 0
    for path, _ in _walk(directory, masks, left_out):
        num_images += 1
        if masks is not None and first_mask and _name_mask(directory, path, masks, 0).exists():
            first_mask = 0
    told = make_printable(", ".join(f"{kind} {num:,}" for kind, num in left_out.most_common(8)))
    recipes = (
        FolderRecipe(
            make_key(os.path.splitext(path)[0], of=path, alone=alone),
            path,
            directory,
            captions,
            masks,
            first_mask,
        )
        for path, alone in _walk(directory, masks, Counter())
    )
    notes = (f"files that are no images: {told}",) if told else ()
    return Listing(recipes, "images", listed={"images": num_images}, notes=notes)


@dataclass(frozen=True, slots=True)
class FolderRecipe:
    """One image with what lies beside it."""

    key: str
    name: str  # of the image, seen from the folder
    directory: Path
    captions: Captions
    masks: str | None
    first_mask: int  # number of a mask of the first phrase

    def build(self) -> Sample:
        """Read the image, its captions and masks.

        Raises:
            IngestError: the text is no such thing, or there are more masks than phrases.
            FileNotFoundError: the image is gone.
        """
        image = read_image_file(self.directory / self.name)
        texts, negatives = self._read_texts()
        if self.masks is None:
            return Sample(image, tuple(Phrase(text) for text in texts), negatives)
        size = read_image_header(image).size
        phrases, rejects = [], []
        for text, path in zip(texts, self._list_masks(len(texts)), strict=True):
            try:
                phrases.append(Phrase(text, _read_mask(path, size)))
            except FileNotFoundError:
                rejects.append((text, "missing_mask", f"expected {path}, got no file"))
            except IngestError as error:
                rejects.append((text, error.reason, error.detail))
        return Sample(image, tuple(phrases), negatives, rejects=tuple(rejects))

    def _read_texts(self) -> tuple[list[str], tuple[str, ...]]:
        """Return the phrases, of a JSON blank ones too, and the negatives; none without a file."""
        if self.captions == "none":
            return [], ()
        path = self.directory / self.name
        if self.captions == "filename":
            return [path.stem.replace("_", " ")], ()
        try:
            text = path.with_suffix(f".{self.captions}").read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            return [], ()
        except UnicodeDecodeError as error:
            raise IngestError("bad_text", str(error)) from error
        negatives: tuple[str, ...] = ()
        if self.captions == "json":
            texts, negatives = _parse_json(text)
        else:
            by_line = self.masks is not None and "{i" in self.masks
            lines = [line for line in text.split("\n") if line.strip()]  # and at nothing else
            texts = lines if by_line else [text]
        return texts if any(map(str.strip, texts)) else [], negatives

    def _list_masks(self, num: int) -> list[Path]:
        assert self.masks is not None
        if "{i" not in self.masks:
            return [_name_mask(self.directory, self.name, self.masks, 0)] * num
        numbers = range(self.first_mask, self.first_mask + num + 1)
        found = [_name_mask(self.directory, self.name, self.masks, i) for i in numbers]
        if (extra := found.pop()).exists():
            detail = f"expected as many masks as phrases, {num}, got one more, {extra}"
            raise IngestError("mask_count", detail)
        return found


def _name_mask(directory: Path, image: str, masks: str, number: int) -> Path:
    """Return the path of an image's mask with a number; ``image`` is seen from the folder."""
    path = Path(image)
    name = masks.format(stem=path.stem, dir=path.parent, i=number)
    return Path(os.path.normpath(directory / name))


def _walk(directory: Path, masks: str | None, left_out: Counter[str]) -> Iterator[tuple[str, bool]]:
    """Yield each image's path below a folder, and whether no other differs by extension alone."""

    def fail(error: OSError) -> None:
        raise error

    match_mask = re.compile(r"(?!)" if masks is None else _match_masks(directory, masks)).fullmatch
    others: set[str] = set()  # stems of a folder of images and masks: a mask's is another's
    is_shared = masks is not None and "/" not in masks
    for _, _, names in os.walk(directory) if is_shared else ():
        others |= {os.path.splitext(name)[0] for name in names}
    for above, folders, names in os.walk(directory, onerror=fail):
        left_out["links to folders"] += sum(os.path.islink(f"{above}/{one}") for one in folders)
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        images = []
        for name in sorted(names):
            kind = Path(name).suffix.lower()
            if name.startswith("."):
                left_out["hidden"] += 1
            elif (found := match_mask(f"{above}/{name}")) and (
                not is_shared or found["stem"] in others
            ):
                left_out["masks"] += 1
            elif kind.removeprefix(".") in IMAGE_EXTENSIONS:
                images.append(name)
            else:
                left_out[kind or "without an extension"] += 1
        stems = Counter(Path(name).stem for name in images)
        for name in images:
            yield os.path.relpath(f"{above}/{name}", directory), stems[Path(name).stem] == 1
    left_out += Counter()  # without zeros


def _match_masks(directory: Path, masks: str) -> str:
    """Return the regular expression of all paths that a pattern of masks may mean."""
    pattern = re.escape(os.path.normpath(directory / masks))
    pattern = re.sub(r"\\\{i[^}]*\}", "[0-9]+", pattern)
    pattern = pattern.replace(r"\{stem\}", "(?P<stem>[^/]+)", 1)
    pattern = pattern.replace(r"\{stem\}", "(?P=stem)").replace(r"\{dir\}/", "(?:.*/)?")
    return pattern.replace(r"\{dir\}", ".*")


def _check_pattern(masks: str, captions: Captions) -> None:
    expected = "--masks: expected a pattern such as masks/{stem}_{i}.png, got"
    try:
        one, other = (masks.format(stem=stem, dir="d", i=1) for stem in "ab")
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{expected} {masks!r}: {error!r}") from error
    if one == other:
        raise ValueError(f"{expected} {masks!r}, which has no {{stem}}")
    if captions == "none":
        raise ValueError("--masks: expected phrases for the masks, got --captions none")


def _read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read a mask; an empty one is all False."""
    try:
        return decode_mask(path.read_bytes(), size=size).pixels
    except BadImageError as error:
        if error.reason == "empty":
            return np.zeros(size, bool)
        reason = "size" if error.reason == "wrong_size" else "bad_mask"
        raise IngestError(reason, f"{path}: {error.detail}") from error


def _parse_json(text: str) -> tuple[list[str], tuple[str, ...]]:
    """Return ``phrases``, or ``caption``, and ``negatives``."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IngestError("bad_text", f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise IngestError("bad_text", f"expected an object with phrases, got {found!r:.80}")
    caption = found.get("caption")
    phrases = found.get("phrases") or ([] if caption is None else [caption])
    negatives = found.get("negatives") or []
    for texts in (phrases, negatives):
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            raise IngestError("bad_text", f"expected a list of strings, got {texts!r:.80}")
    return phrases, tuple(negatives)
