"""Encodes a corpus in the test's own process."""

from pipeline.encode.prepare import prepare_encode
from pipeline.stage.encode_stage import EncodeStage


def encode_here(spec, corpus, store):
    """Encode a folder of tars in this process, and return the store's folder."""
    run = prepare_encode(spec, [str(corpus / "*.tar")], str(store), batch=8)
    stage = EncodeStage(run.config)
    for item in run.items:
        outcome = stage.encode(item)
        assert outcome.status == "committed", outcome.error
    return store
