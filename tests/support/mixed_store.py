"""An encoded store made mixed: pairs with and without masks, negatives, ignore regions."""

import numpy as np
import pyarrow as pa
import zarr

from pipeline.store.attempt import Attempt
from pipeline.store.layout import GROUP, INDEX, REJECTS, digest_pairs, index_schema
from pipeline.store.store import Store

KINDS = ("mask", "none", "negative", "mask", "mask")  # of a task's pairs, again and again


def mix_store(folder, *, maskless=(), kinds=KINDS, ignore=True):
    """Give each latents task of a store a next generation of the same content that is mixed.

    Every second view has an ignore region over part of its masks, and the last view of a task one
    over all of it, unless ``ignore`` is false. Tasks whose name holds one of ``maskless`` lose
    every mask and have no negative. In a layer of ``text: none`` the embeddings go, all but the
    empty prompt's. A ``phraseless`` pair has no phrase. Columns of ``keep_json`` hold the pair's
    number as text.
    """
    store = Store.open(str(folder))
    for layer in store.list_layers():
        if layer.kind == "latents":
            for task, commit in store.newest_commits(layer.folder).items():
                _mix_task(store, layer, commit, () if _holds(task, maskless) else kinds, ignore)


def _holds(task, parts):
    return any(part in task for part in parts)


def _mix_task(store, layer, commit, kinds, ignore):
    index = store.read_index(commit).to_pylist()
    root = store.storage.root / commit.data_folder / GROUP
    values = {name: array[:] for name, array in zarr.open_group(root, mode="r").arrays()}
    views = sorted({row["latent_row"] for row in index})
    ignores = [view for view in views if ignore and kinds and (view % 2 or view == views[-1])]
    masks = []
    for number, row in enumerate(index):
        kind = kinds[number % len(kinds)] if kinds else "none"
        mask, row["mask_row"] = values["mask"][row["mask_row"]], None
        if kind == "mask":
            row["mask_row"] = len(masks)
            masks.append(mask)
        else:
            row |= {"mask_area": None, "negative": kind == "negative"}
        if kind == "phraseless":
            row |= {"phrase": None, "prompt": "", "text_row": 0}
        row |= {name: str(number) for name in layer.latents.keep_json}
        if row["latent_row"] in ignores:
            row["ignore_row"] = ignores.index(row["latent_row"])
        if layer.latents.text == "none" and row["prompt"]:
            row["text_row"] = None
    size = layer.latents.size
    ignore = np.zeros((len(ignores), size, size), np.uint8)
    for number, view in enumerate(ignores):
        ignore[number, : size if view == views[-1] else size // 2, :] = 1
    values |= {"mask": np.array(masks, np.uint8).reshape(-1, size, size), "ignore": ignore}
    rows = commit.rows | {"masks": len(masks), "ignores": len(ignores)}
    if layer.latents.text == "none":
        rows["prompts"] = 1
        values |= {name: values[name][:1] for name in layer.text_arrays}
    table = pa.Table.from_pylist(index, index_schema(layer))
    _write(store, layer, commit, table, rows, values)


def _write(store, layer, commit, index, rows, values):
    attempt = Attempt(store.storage, layer, commit.task, generation=commit.generation + 1)
    with attempt:
        shapes = {name: array.shape[1:] for name, array in values.items()}
        for name, writer in attempt.open_arrays(shapes, rows).items():
            writer.append_rows(values[name])
        attempt.write_table(INDEX, index)
        attempt.write_table(REJECTS, store.read_rejects(commit))
        _, outcome = attempt.commit(
            rows=rows,
            pairs_sha256=digest_pairs(index),
            content_since=commit.content_since,
            source=commit.source,
            accounting=commit.accounting,
            provenance={},
        )
    assert outcome == "won"
