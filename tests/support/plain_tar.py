"""Writes a tar of named bytes."""

import io
import tarfile


def write_tar(path, members):
    """Write members, (name, bytes) or a mapping, as a ustar tar; return its path."""
    pairs = members.items() if isinstance(members, dict) else members
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
