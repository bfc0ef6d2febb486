"""Scores of heads on a store's pairs.

run is the start: a checkpoint and a snapshot -> workers (Ray, or this process) -> pair_scorer
(what a process needs) -> scoring (batches to sums of metrics), with baselines beside the head.

Imports runs and below; never the encoding side.
"""
