"""A file system that is soon full."""

import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """A function: a tmpfs of so many bytes, mounted, or mounted anew with other values."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(num_bytes, access="rw"):
        options = f"size={num_bytes},mode=755,{access}" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no right to mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:  # lazily, for a storage keeps files open
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
