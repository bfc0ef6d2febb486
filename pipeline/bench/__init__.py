"""The project's benchmarks, each a command and a ratio against a limit or a peer.

encode, tasks, store, write, reader (with reader_store), train, models, tuning, profile: a file a
benchmark. meter times the parts of a network.

May see both sides, encoding and training; the product never imports it.
"""
