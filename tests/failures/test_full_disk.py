"""Fault 12: a real full file system. No commit, an error that says so, and the rest after space."""

from contextlib import closing

from pipeline.encode.prepare import prepare_encode
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.store import Store
from pipeline.upkeep.verify import verify_store


def test_a_full_disk_commits_nothing_and_space_mends_it(small_disk, corpus_folder, spec):
    folder = small_disk(1 << 20)

    def encode():
        run = prepare_encode(spec, [str(corpus_folder / "*.tar")], str(folder), batch=8)
        with closing(EncodeStage(run.config)) as stage:
            return [stage.encode(item) for item in run.items]

    failed = [outcome for outcome in encode() if outcome.status == "failed"]
    assert {outcome.cause for outcome in failed} == {"task"}, "the store's disk, not the node's"
    assert all("No space left on device" in outcome.error for outcome in failed)
    assert all(str(folder) in outcome.error for outcome in failed), "which disk"
    store = Store.open(str(folder))
    assert [d for check in verify_store(store) for d in check.damage] == []
    small_disk(64 << 20)
    assert {outcome.status for outcome in encode()} == {"committed"}
    assert [len(store.newest_commits(x.folder)) for x in store.list_layers()] == [3, 3]
    assert [d for check in verify_store(store) for d in check.damage] == []
