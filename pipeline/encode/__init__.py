"""A run of encode over many tasks.

prepare (spec, corpus and store -> layers; missing lists what is to do, hash_tars reads the tars of
which only that needs to be known whether they changed) -> run (the start: here, or on actor_pool's
Ray Data actors, each an encode stage; task_queue has what is to be tried again) -> totals (sums for
progress and the summary), empty_tars, failures (failed.jsonl) and metrics (Prometheus).

Imports stage, upkeep and below; never the reader or the training side.
"""
