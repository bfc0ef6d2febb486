"""The work that a store lacks, as an encode run lists it."""

from pipeline.encode.missing import CorpusWork


def list_missing(store, latents_layer, features_layer, tars, **options):
    """Failed tasks and work items of a run over these tars, of which none may have to be hashed."""
    work = CorpusWork(store, latents_layer, features_layer, tars, **options).list_missing()
    assert not work.suspects
    return [*(failed.outcome for failed in work.failed), *work.items]
