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

from pipeline.corpus.members import IMAGE_EXTENSIONS
from pipeline.decode.images import BadImageError
from pipeline.decode.masks import decode_mask
from pipeline.ingest.sample import IngestError, Listing, Phrase, Sample, make_key
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
    num_images = sum(1 for _ in _walk(directory, masks, left_out))
    told = ", ".join(f"{kind} {number:,}" for kind, number in left_out.most_common(8))
    recipes = (
        FolderRecipe(
            make_key(os.path.splitext(path)[0], of=path, alone=alone),
            directory / path,
            directory,
            captions,
            masks,
        )
        for path, alone in _walk(directory, masks, Counter())
    )
    notes = (f"files that are no images: {told}",) if told else ()
    return Listing(recipes, "images", listed={"images": num_images}, notes=notes)


@dataclass(frozen=True, slots=True)
class FolderRecipe:
    """One image with what lies beside it."""

    key: str
    path: Path
    directory: Path
    captions: Captions
    masks: str | None

    def build(self) -> Sample:
        """Read the image, its captions and masks.

        Raises:
            IngestError: the text or a mask is no such thing, or there are more masks than phrases.
            FileNotFoundError: the image is gone.
        """
        image = self.path.read_bytes()
        texts, negatives = self._read_texts()
        if self.masks is None:
            return Sample(image, tuple(map(Phrase, texts)), negatives)
        size = read_image_header(image).size
        phrases, rejects = [], []
        for text, path in zip(texts, self._list_masks(len(texts)), strict=True):
            try:
                phrases.append(Phrase(text, _read_mask(path, size)))
            except FileNotFoundError:
                rejects.append((text, "missing_mask", f"expected {path}, got no file"))
        return Sample(image, tuple(phrases), negatives, rejects=tuple(rejects))

    def _read_texts(self) -> tuple[list[str], tuple[str, ...]]:
        """Return the phrases that are not blank, and the negatives; none where no file is."""
        if self.captions == "none":
            return [], ()
        if self.captions == "filename":
            return [self.path.stem.replace("_", " ")], ()
        try:
            text = self.path.with_suffix(f".{self.captions}").read_text("utf-8-sig")
        except FileNotFoundError:
            return [], ()
        except UnicodeDecodeError as error:
            raise IngestError("bad_text", str(error)) from error
        negatives: tuple[str, ...] = ()
        if self.captions == "json":
            texts, negatives = _parse_json(text)
        else:
            by_line = self.masks is not None and "{i" in self.masks
            texts = text.splitlines() if by_line else [text]
        return [one for one in texts if one.strip()], negatives

    def _list_masks(self, num: int) -> list[Path]:
        assert self.masks is not None
        if "{i" not in self.masks:
            return [self._find_mask(0)] * num
        first = 0 if self._find_mask(0).exists() else 1
        if (extra := self._find_mask(first + num)).exists():
            detail = f"expected as many masks as phrases, {num}, got one more, {extra}"
            raise IngestError("mask_count", detail)
        return [self._find_mask(first + number) for number in range(num)]

    def _find_mask(self, number: int) -> Path:
        assert self.masks is not None
        folder = self.path.parent.relative_to(self.directory)
        name = self.masks.format(stem=self.path.stem, dir=folder, i=number)
        return Path(os.path.normpath(self.directory / name))


def _walk(directory: Path, masks: str | None, left_out: Counter[str]) -> Iterator[tuple[str, bool]]:
    """Yield each image's path below a folder, and whether no other differs by extension alone."""

    def fail(error: OSError) -> None:
        raise error

    is_mask = re.compile(r"(?!)" if masks is None else _match_masks(directory, masks)).fullmatch
    for above, folders, names in os.walk(directory, onerror=fail):
        left_out["links to folders"] += sum(os.path.islink(f"{above}/{one}") for one in folders)
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        images = []
        for name in sorted(names):
            kind = Path(name).suffix.lower()
            if name.startswith("."):
                left_out["hidden"] += 1
            elif is_mask(f"{above}/{name}"):
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
    pattern = pattern.replace(r"\{stem\}", "[^/]+").replace(r"\{dir\}/", "(?:.*/)?")
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
    fields = found if isinstance(found, dict) else {}
    caption = fields.get("caption")
    phrases = fields.get("phrases", [] if caption is None else [caption])
    negatives = fields.get("negatives", [])
    for texts in (phrases, negatives):
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            raise IngestError("bad_text", f"expected a list of strings, got {texts!r:.80}")
    return phrases, tuple(negatives)
