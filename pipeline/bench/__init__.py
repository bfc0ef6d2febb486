"""The project's own benchmarks: each compares with a limit or a peer in the same run.

``ldznet bench NAME`` runs the file NAME (flops: spec/blocks). inputs makes random models and scenes
where the user gives none, reader_store a store to read from, recompute a head's inputs without a
store; fresh_process and meter measure.

May import both sides, encoding and training; only demo and jobs import it, and tests.
"""
