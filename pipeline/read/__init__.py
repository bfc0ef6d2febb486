"""From a snapshot to batches: fast random reads of pairs.

source (store, layers, snapshot) -> pair_index (numbers to tasks and rows) with choice (filters
and splits) and view_samples -> order and steps (what a worker reads when) -> reader (rows of
arrays) -> batch (tensors on a device). dataset offers it as a torch Dataset.

Imports store and below; never corpus, decode or anything that encodes.
"""
