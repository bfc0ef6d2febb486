"""The field's own files -> tars that ``encode`` reads: ``ldznet ingest KIND``.

Flow: a kind's file (``phrasecut``, ``refer``, ``coco``, ...) reads annotations and lists recipes,
one an image -> a recipe builds its ``sample`` when asked: the image's bytes, phrases and masks ->
``writer`` turns masks upright, drops what is no pair, and writes shards -> each shard is published
whole. A kind imports ``sample``, ``masks`` and libraries, and nothing of the other kinds.
"""
