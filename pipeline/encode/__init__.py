"""A run of encode over many tasks.

prepare (spec, corpus and store -> layers; missing lists what is to do) -> run (the start: here, or
on actor_pool's Ray Data actors, each an encode stage) -> totals (sums for progress and the
summary), empty_tars, failures (failed.jsonl) and metrics (Prometheus).

Imports stage, upkeep and below; never the reader or the training side.
"""
