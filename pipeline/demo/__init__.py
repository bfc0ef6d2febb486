"""The main job whole, on the embedded corpus.

run is the start: recipe (sizes and layers) -> encode -> sweep -> segment -> report, with savings
(what the cache saved).

May see every room but jobs.
"""
