"""From a snapshot to batches: fast random reads of pairs.

source (store, layers, snapshot) -> commits (a layer's records by task number) -> pair_index (pair
numbers to tasks and rows) with choice (filters and splits) and view_samples -> order and steps
(what a worker reads when) -> reader -> gather (rows of arrays into tensors), with prompt_embedder
for prompts that are stored without embeddings -> batch (to a device).
dataset offers it as a torch Dataset.

Imports store and below; never corpus, decode or anything that encodes.
"""
