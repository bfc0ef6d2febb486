"""The whole job on an embedded corpus.

run is the start: recipe (sizes and layers) -> encode -> sweep -> segment -> report, with savings
(what reading from the store saved over computing anew).

May see every room but jobs.
"""
