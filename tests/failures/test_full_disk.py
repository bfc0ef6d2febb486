"""Fault 12: a real full file system. No commit, an error that says so, and the rest after space."""

import subprocess
from contextlib import closing

import pytest

from pipeline.encode.prepare import prepare_encode
from pipeline.stage.encode_stage import EncodeStage
from pipeline.store.store import Store
from pipeline.upkeep.verify import verify_store


@pytest.fixture
def small_disk(tmp_path):
    """A function: a tmpfs of so many bytes, mounted, or mounted anew with another size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(num_bytes):
        options = f"size={num_bytes},mode=755" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no right to mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_commits_nothing_and_space_mends_it(small_disk, corpus_folder, spec):
    folder = small_disk(1 << 20)

    def encode():
        run = prepare_encode(spec, [str(corpus_folder / "*.tar")], str(folder), batch=8)
        with closing(EncodeStage(run.config)) as stage:
            return [stage.encode(item) for item in run.items]

    failed = [outcome for outcome in encode() if outcome.status == "failed"]
    assert failed
    assert all("No space left on device" in outcome.error for outcome in failed)
    store = Store.open(str(folder))
    assert [d for check in verify_store(store) for d in check.damage] == []
    small_disk(64 << 20)
    assert {outcome.status for outcome in encode()} == {"committed"}
    assert [len(store.newest_commits(x.folder)) for x in store.list_layers()] == [3, 3]
    assert [d for check in verify_store(store) for d in check.damage] == []
