"""Errors that a machine caused are told from all others, with a test that it is sound again."""

import errno
import os
from pathlib import Path

import pytest

from pipeline.base.node_fault import NodeError, blaming_node, check_folder


def fail_in(folder, error, **more):
    with blaming_node(folder, **more):
        raise error


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENOMEM]
)
def test_what_a_machine_is_short_of_is_its_fault(tmp_path, code):
    with pytest.raises(NodeError, match=rf"{os.strerror(code)}: in {tmp_path}") as caught:
        fail_in(tmp_path, OSError(code, os.strerror(code)))
    assert caught.value.errno == code
    caught.value.check()  # the folder takes a file


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOENT, errno.EIO])
def test_what_is_wrong_with_a_file_in_its_folder_is_its_fault(tmp_path, code):
    with pytest.raises(NodeError):
        fail_in(tmp_path, OSError(code, "no", str(tmp_path / "a")))
    with pytest.raises(OSError, match="no") as caught:
        fail_in(tmp_path, OSError(code, "no", str(tmp_path.parent / "a")))
    assert not isinstance(caught.value, NodeError)


def test_other_errors_stay_as_they_are(tmp_path):
    for error in (PermissionError("HTTP 403"), OSError("reset"), ValueError("x")):
        with pytest.raises(type(error)) as caught:
            fail_in(tmp_path, error)
        assert caught.value is error


def test_a_folder_without_room_or_that_is_gone_is_not_sound(tmp_path):
    with pytest.raises(NodeError) as caught:
        fail_in(tmp_path, OSError(errno.ENOSPC, "full"), num_bytes=2**62)
    with pytest.raises(OSError, match=rf"expected room for {2**62} bytes in {tmp_path}, got"):
        caught.value.check()
    with pytest.raises(FileNotFoundError):
        check_folder(tmp_path / "gone", 1)
    check_folder(tmp_path, 2**20)
    assert list(Path(tmp_path).iterdir()) == []
