"""From corpus to shards to heads.

``corpus`` lists tars as tasks; ``tar`` and ``samples`` read one task's samples and reject what is
broken; ``encode`` turns them into arrays and commits them to the ``store``; ``reader`` hands
committed pairs to ``train`` and ``evaluate``. Ray appears only in ``actor_pool``,
``encode_metrics``, ``ray_start`` and ``train_job``.
"""
