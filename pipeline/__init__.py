"""From a corpus of tars to a store of latents and features, and from the store to trained heads.

Encoding: corpus -> decode -> stage -> encode, into the store. Training: read -> runs -> evaluate
-> train -> sweep, out of the store. ``pipeline/VERB/run.py`` is the start of each command.
Below both lie base, spec, storage and store; above both segment, plan, pretrain, bench and demo.

The two sides never import each other, and imports go one way: tests/test_imports.py has the order.
Ray is named only in base/ray_cluster, encode/actor_pool, encode/metrics, train/workers,
evaluate/workers and sweep/run.
"""
