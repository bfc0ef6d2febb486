"""Layers, commits and arrays on a storage.

Writing: attempt opens array_writer's arrays by layout, writes the tables, and makes the record
(commit). Reading: store lists layers and records, snapshot freezes them, array_reader reads
chunks found by shard_index into row_memory. records keeps a table (kept_table) of what records say,
so that read_many reads each of them once; current says by it which of them are read. prompt_cache
keeps embeddings as they are stored, for who writes and who reads.

Imports models, base, spec and storage; knows no tar, no image and no head.
"""
