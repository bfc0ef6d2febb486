"""Maps of class ids beside their images: VOC, ADE20K, Cityscapes, CamVid, and one's own.

An image and its map are those for whose names the ``*`` of the two patterns stand for the same. A
map is a PNG whose grey values, or palette indices, are the ids; colours are never read as ids. A
class with a name is a phrase, in the order of the ids. Pixels of a class without one are left out,
which is a line of the rejects; pixels of an ignored id are neither.
"""

import csv
import glob
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.corpus.members import MAX_METADATA_BYTES
from pipeline.decode.images import (
    BadImageError,
    load_pixels,
    open_picture,
    read_values,
    refusing_damage,
)
from pipeline.ingest.sample import IngestError, Listing, Phrase, Sample, make_key, read_image_file
from pipeline.ingest.writer import read_image_header

_WILD = re.compile(r"(\*\*/|\*+|\?|\[[^]]+\])")
_ID_AND_NAME = re.compile(r"(-?\d+)[\s:,]+(\S.*)")
_ENDS_IN_ID = re.compile(r"[,;\t]\s*-?\d+$")
_COLOUR = re.compile(r"\d+[\s,]+\d+[\s,]+\d+")


def list_labels(
    images: str, labels: str, names: Path, *, ignore: Collection[int] = (), only: Path | None = None
) -> Listing:
    """List the images that have a map of class ids.

    Args:
        images: Pattern of the images, as Python's ``glob`` has it, with ``**`` for any folders.
        labels: Pattern of the maps, with as many ``*``.
        names: The classes' names, as ``read_names`` reads them.
        ignore: Ids that neither loss nor metrics count.
        only: A list of images, one a line: the first word is what the last ``*`` stands for, or
            the name of either file, with or without folders. Others are left out.

    Raises:
        ValueError: a pattern matches nothing or does not fit the other, or ``names`` is no such
            file.
        OSError: a file cannot be read.
    """
    classes = read_names(names)
    pictures, maps = _find("--images", images), _find("--labels", labels)
    if len(next(iter(pictures))) != len(next(iter(maps))):
        raise ValueError(
            f"expected as many * in --labels as in --images, got {labels} and {images}"
        )
    if only is None:
        notes = {"images without a map of classes: left out": len(pictures.keys() - maps.keys())}
    else:
        maps, notes = _choose(only, pictures, maps)
    names_as_paths = ((parts, "/".join(parts)) for parts in sorted(maps))
    recipes = (
        _Labelled(make_key(path, of=path), pictures.get(parts), maps[parts], classes, ignore)
        for parts, path in names_as_paths
    )
    told = tuple(f"{number:,} {what}" for what, number in notes.items() if number)
    return Listing(recipes, "labels", listed={"images": len(maps)}, notes=told)


def read_names(file: Path) -> dict[int, str]:
    """Read the names of classes by their ids; of synonyms (``wall, bricks``) the first is taken.

    The file has lines ``id name``, or two columns ``id,name`` or ``name,id`` with a header or
    without, or a name a line from 0 on, or ADE20K's table (a header
    of ``Idx`` to ``Name``, then columns of which the first is the id and the last the names), or is
    JSON, ``{"id": "name"}`` or a list.

    Raises:
        ValueError: it has neither, or an id twice.
        OSError: it cannot be read.
    """
    text = file.read_text(encoding="utf-8-sig")
    try:
        pairs = _parse_json(text) if text.lstrip()[:1] in ("{", "[") else _parse_lines(text)
        names = {int(id): re.split("[,;]", name)[0].strip() for id, name in pairs}
    except (ValueError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{file}: expected names of classes, got {error}") from error
    if not names or len(names) < len(pairs) or not all(names.values()):
        raise ValueError(
            f"{file}: expected ids of their own, each with a name, got {str(pairs)[:200]}"
        )
    return names


def _parse_json(text: str) -> list[tuple[str | int, str]]:
    found = json.loads(text, object_pairs_hook=tuple)
    return list(found) if isinstance(found, tuple) else list(enumerate(found))


def _parse_lines(text: str) -> list[tuple[str | int, str]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("#")]
    header = "".join(lines[:1]).lower()
    if header.startswith("idx") and header.endswith("name"):
        rows = csv.reader(lines[1:], delimiter="\t" if "\t" in header else ",")
        return [(row[0], row[-1]) for row in rows]
    if colour := next((line for line in lines if _COLOUR.search(line)), None):
        raise ValueError(f"{colour!r}: colours are no ids")
    if (pairs := _parse_table([line.split(",") for line in lines])) is not None:
        return pairs
    matches = [_ID_AND_NAME.fullmatch(line) for line in lines]
    if not any(matches):
        if ended := next((line for line in lines if _ENDS_IN_ID.search(line)), None):
            raise ValueError(f"{ended!r}: an id after the name; write 'id name'")
        return list(enumerate(lines))
    if not all(matches):
        raise ValueError(f"{lines[matches.index(None)]!r} among lines of 'id name'")
    return [(match[1], match[2]) for match in matches if match]


def _parse_table(rows: list[list[str]]) -> list[tuple[str | int, str]] | None:
    """Read rows of two columns, of which one has the ids, with a header or without; else None."""
    if any(len(row) != 2 for row in rows):
        return None
    for ids, names in ((0, 1), (1, 0)):
        is_id = [row[ids].strip().isdecimal() for row in rows]
        if rows and (all(is_id) or (len(rows) > 1 and all(is_id[1:]))):
            return [(row[ids], row[names]) for row, fits in zip(rows, is_id, strict=True) if fits]
    return None


def _find(option: str, pattern: str) -> dict[tuple[str, ...], Path]:
    """Return the files that a pattern matches, by what its wildcards stand for."""
    pattern = os.path.normpath(os.path.expanduser(pattern))
    groups = {"**/": "(?:(.*)/)?", "?": "([^/])"}
    pieces = _WILD.split(pattern)  # what is literal, and between it what is not
    for number, piece in enumerate(pieces):
        wild = f"({piece.replace('[!', '[^')})" if piece[:1] == "[" else "([^/]*)"
        pieces[number] = groups.get(piece, wild) if number % 2 else re.escape(piece)
    found = {}
    for path in glob.iglob(pattern, recursive=True):
        match = re.fullmatch("".join(pieces), path, re.DOTALL)
        if match is None or not match.groups():
            raise ValueError(f"{option}: expected a pattern such as images/*.jpg, got {pattern}")
        found[tuple(part or "" for part in match.groups())] = Path(path)
    if not found:
        raise ValueError(f"{option}: expected a pattern that files match, got {pattern}")
    return found


def _choose(
    only: Path, pictures: Mapping[tuple[str, ...], Path], maps: Mapping[tuple[str, ...], Path]
) -> tuple[dict[tuple[str, ...], Path], dict[str, int]]:
    """Return the maps that a list names, and what to say of the others."""
    lines = [line.split() for line in only.read_text(encoding="utf-8-sig").splitlines()]
    wanted = {os.path.basename(words[0]) for words in lines if words}
    chosen, met = {}, set()
    for parts, path in maps.items():
        names = {parts[-1], path.name, pictures.get(parts, path).name} & wanted
        met |= names
        if names:
            chosen[parts] = path
    if not chosen:
        raise ValueError(f"{only}: expected names of images, got {sorted(wanted)[:3]}")
    return chosen, {
        f"maps of classes that {only.name} does not name: left out": len(maps) - len(chosen),
        f"names in {only.name} without a map of classes": len(wanted - met),
    }


@dataclass(frozen=True, slots=True)
class _Labelled:
    """An image and its map of class ids."""

    key: str
    image: Path | None
    labels: Path
    names: Mapping[int, str]
    ignore: Collection[int]

    def build(self) -> Sample:
        """Read both; a class is a phrase with the pixels of its id."""
        if self.image is None:
            raise IngestError("missing_file", f"{self.labels}: no image of --images belongs to it")
        image = read_image_file(self.image)
        height, width = read_image_header(image).size
        try:
            ids = decode_labels(self.labels.read_bytes(), height=height, width=width)
        except IngestError as error:
            raise IngestError(error.reason, f"{self.labels}: {error.detail}") from error
        phrases, rejects = [], []
        for id in sorted(set(np.unique(ids).tolist()) - set(self.ignore)):
            if id in self.names:
                phrases.append(Phrase(self.names[id], ids == id, {"class_id": id}))
            else:
                detail = f"{np.count_nonzero(ids == id)} pixels of a class that --names lacks"
                rejects.append((f"class {id}", "no_name", detail))
        if not phrases:
            raise IngestError("no_phrase", f"{self.labels}: no pixel of a class with a name")
        ignored = np.isin(ids, list(self.ignore))
        return Sample(image, tuple(phrases), ignore=ignored, rejects=tuple(rejects))


def decode_labels(data: bytes, *, height: int, width: int) -> np.ndarray:
    """Decode a map of class ids, a PNG, to (H, W) uint8 or uint16: grey values, palette indices.

    Raises:
        IngestError: "size", "colours" where pixels are no ids, "bad_labels" for other damage.
    """
    try:
        with refusing_damage():
            image = open_picture(data, ["PNG"], MAX_METADATA_BYTES)
        if image.size != (width, height):
            got = "x".join(map(str, image.size))
            raise IngestError("size", f"expected {width}x{height} as the image is, got {got}")
        if image.mode not in ("1", "L", "I;16", "P"):
            detail = f"expected class ids as grey values or palette indices, got {image.mode}"
            raise IngestError("colours", f"{detail}: give each colour its class's id first")
        with refusing_damage():
            load_pixels(image, data)
            return read_values(image, data)
    except BadImageError as error:
        raise IngestError("bad_labels", error.detail) from error
