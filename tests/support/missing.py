"""The work that a store lacks, as an encode run lists it."""

from pipeline.encode.missing import CorpusWork


def list_missing(store, latents_layer, features_layer, tars, **options):
    """The work items of a run over these tars; no tar may have to be hashed for it."""
    work = CorpusWork(store, latents_layer, features_layer, tars, **options).list_missing()
    assert not work.suspects
    return list(work.items)
