"""Which arrays a layer holds, and how each is stored."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from models.ldm.unet_config import LATENT_DOWNSCALE
from pipeline.spec.fields import FeaturesSpec, LatentsSpec
from pipeline.spec.layer import LayerSpec
from pipeline.store.array_writer import ArraySchema

# index.parquet: a row a pair, in the order of the pair arrays.
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("view", pa.int32()),  # number of the view among its image's
        ("flipped", pa.bool_()),
        ("phrase", pa.string()),
        ("prompt", pa.string()),
        ("latent_row", pa.int64()),  # in latent_mean, latent_logvar, image
        ("text_row", pa.int64()),  # in text; null where its prompt's embedding is not stored
        ("box_left", pa.int32()),  # the view's crop in source pixels
        ("box_top", pa.int32()),
        ("box_right", pa.int32()),
        ("box_bottom", pa.int32()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("mask_area", pa.float32()),  # share of the view, (0, 1]; null without a mask
        ("image_sha256", pa.string()),  # of the source image's bytes
        ("mask_row", pa.int64()),  # in mask; null without a mask
        ("negative", pa.bool_()),  # the phrase is not in the image: an empty mask that is meant
        ("ignore_row", pa.int64()),  # in ignore; null where no region is ignored
        ("instance", pa.int32()),  # number of the phrase among its sample's equal ones
        ("prompt_cut", pa.bool_()),  # the tokenizer cut the prompt at its length
        ("orientation", pa.int8()),  # EXIF's, 1 to 8; 1 where the image has none
        ("scale", pa.float32()),  # pixels of the view a pixel of the source; above 1 it is enlarged
        ("color_profile", pa.string()),  # name of the embedded one; null where there is none
    ]
)
# Columns of index.parquet in records of version 1, and what the later ones are read as there.
FIRST_COLUMNS = INDEX_SCHEMA.names[: INDEX_SCHEMA.get_field_index("mask_row")]
REJECTS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),  # of the sample or member; for a pair "key: phrase"
        ("level", pa.string()),  # sample, member or pair
        ("reason", pa.string()),
        ("detail", pa.string()),  # what was expected and what was found
        ("key", pa.string()),  # of the sample, also of a pair's; of a member its name
        ("phrase", pa.string()),  # of a pair; null else
    ]
)
FIRST_REJECTS = REJECTS_SCHEMA.names[: REJECTS_SCHEMA.get_field_index("key")]
GROUP = "arrays.zarr"
INDEX = "index.parquet"
REJECTS = "rejects.parquet"
EMPTY_PROMPT = ""  # row 0 of every task's text array: what condition: empty reads


@dataclass(frozen=True, slots=True)
class ArrayKind:
    """An array's form whatever its size."""

    dtype: str
    dimensions: tuple[str, ...]
    split_rows: bool = False
    compressed: bool = False

    def schema(self, name: str, row_shape: tuple[int, ...]) -> ArraySchema:
        """Return the schema of an array of this kind with rows of this shape."""
        return ArraySchema(
            name, row_shape, self.dtype, self.dimensions, self.split_rows, self.compressed
        )

    def as_first(self) -> "ArrayKind":
        """Return the kind as tasks of record version 1 have it: with other names of dimensions."""
        names = (_FIRST_DIMENSIONS.get(d, d.rsplit("_", 1)[-1]) for d in self.dimensions)
        return replace(self, dimensions=tuple(names))


# Dimensions of one name have one length in a task, so that xarray opens its arrays together.
_FIRST_DIMENSIONS = {"mask": "pair"}
_LATENT = ArrayKind("float16", ("view", "latent_channel", "latent_y", "latent_x"))
_LATENTS_ARRAYS = {
    "latent_mean": _LATENT,
    "latent_logvar": _LATENT,
    "text": ArrayKind("float16", ("prompt", "token", "width")),
    "mask": ArrayKind("uint8", ("mask", "y", "x"), compressed=True),
}
_TEXT_POOLED = ArrayKind("float16", ("prompt", "pooled_width"))  # SDXL's, beside text
_IMAGE = ArrayKind("uint8", ("view", "y", "x", "rgb"))
_IGNORE = ArrayKind("uint8", ("ignore", "y", "x"), compressed=True)  # 1: neither loss nor metrics
ROWS_OF_DIMENSION = {
    "view": "views",
    "pair": "pairs",
    "prompt": "prompts",
    "mask": "masks",
    "ignore": "ignores",
}
"""The name of an array's first dimension to the commit's count of it."""


def block_name(number: int) -> str:
    """Return the array name of a block's feature: ``block06``."""
    return f"block{number:02d}"


def list_arrays(layer: LayerSpec, rows: Mapping[str, int] | None = None) -> dict[str, ArrayKind]:
    """Return name → kind of every array that all tasks of a layer have.

    With a commit's ``rows`` also of those that this task has and others need not: ``ignore``.
    """
    if layer.kind == "latents":
        image = {"image": _IMAGE} if layer.latents.keep_image else {}
        pooled = {} if layer.pooled_width is None else {"text_pooled": _TEXT_POOLED}
        ignore = {"ignore": _IGNORE} if rows and rows["ignores"] else {}
        return _LATENTS_ARRAYS | pooled | image | ignore
    features = layer.features
    row = "pair" if features.condition == "phrase" else "view"
    arrays = {"timestep": ArrayKind("int16", (row, "draw"))}
    for number in features.blocks:
        name = block_name(number)
        dimensions = (row, "draw", f"{name}_channel", f"{name}_y", f"{name}_x")
        arrays[name] = ArrayKind(features.storage, dimensions, split_rows=True)
        if features.storage == "int8":
            arrays[f"{name}_scale"] = ArrayKind("float32", dimensions[:3], split_rows=True)
    return arrays


def latents_row_shapes(
    spec: LatentsSpec,
    *,
    num_channels: int,
    text_shape: tuple[int, int],
    pooled_width: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return array name → row shape of a latents layer."""
    side = spec.size // LATENT_DOWNSCALE
    latent = (num_channels, side, side)
    pooled = {} if pooled_width is None else {"text_pooled": (pooled_width,)}
    return pooled | {
        "latent_mean": latent,
        "latent_logvar": latent,
        "text": text_shape,
        "mask": (spec.size, spec.size),
        "ignore": (spec.size, spec.size),
        "image": (spec.size, spec.size, 3),
    }


def features_row_shapes(
    spec: FeaturesSpec, shapes: Mapping[int, tuple[int, int, int]]
) -> dict[str, tuple[int, ...]]:
    """Return array name → row shape of a features layer; ``shapes`` are (C, h, w) a block."""
    rows: dict[str, tuple[int, ...]] = {"timestep": (spec.num_draws,)}
    for number in spec.blocks:
        rows[block_name(number)] = (spec.num_draws, *shapes[number])
        rows[f"{block_name(number)}_scale"] = (spec.num_draws, shapes[number][0])
    return rows


def index_schema(layer: LayerSpec) -> pa.Schema:
    """Return the columns of a latents layer's index: those of ``keep_json`` come last."""
    kept = [pa.field(name, pa.string()) for name in layer.latents.keep_json]
    return pa.schema([*INDEX_SCHEMA, *kept])


def complete_index(index: pa.Table) -> pa.Table:
    """Return an index of record version 1 with the later columns: each pair has its own mask."""
    known = {
        "mask_row": pa.array(range(index.num_rows), pa.int64()),
        "negative": pa.repeat(False, index.num_rows),
        "instance": pa.repeat(pa.scalar(0, pa.int32()), index.num_rows),
    }
    for field in list(INDEX_SCHEMA)[len(FIRST_COLUMNS) :]:
        column = known.get(field.name, pa.nulls(index.num_rows, field.type))
        index = index.append_column(field, column)
    return index


def complete_rejects(rejects: pa.Table) -> pa.Table:
    """Return rejects of record version 1 with the later columns, told from the names."""
    rows = rejects.to_pylist()
    for row in rows:
        key, _, phrase = row["name"].partition(": ")
        is_pair = row["level"] == "pair"
        row |= {"key": key, "phrase": phrase} if is_pair else {"key": row["name"]}
    return pa.Table.from_pylist(rows, schema=REJECTS_SCHEMA)


def digest_pairs(index: pa.Table) -> str:
    """Return SHA-256 (hex) over what the pairs are, in order: two layers' rows agree or not."""
    columns = index.select(["key", "view", "flipped", "phrase", "prompt"]).to_pydict()
    digest = hashlib.sha256()
    for row in zip(*columns.values(), strict=True):
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
