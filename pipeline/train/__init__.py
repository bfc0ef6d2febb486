"""Training one head from a store.

run is the start: checks and lock -> workers (Ray Train, or this process) -> fit (the loop) ->
data (batches read ahead) -> step (one optimizer step) -> validation -> outputs (checkpoints,
log, overlays).

Imports evaluate, runs and below; never the encoding side.
"""
