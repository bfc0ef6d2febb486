"""A run of encode over many tasks.

run is the start: prepare (spec and corpus against the store) -> missing (what is to do) ->
actor_pool (Ray Data actors, each a stage) -> totals (sums for progress), failures
(failed.jsonl) and metrics (Prometheus).

Imports stage, upkeep and below; never the reader or the training side.
"""
