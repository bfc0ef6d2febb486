"""The worker by itself: what it imports, and that it ends when its parent does."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.decode.views import Cutting
from pipeline.decode.worker import drop_bytes, pack_frame

ROOT = Path(__file__).parents[3]
PARENT = """
import os, signal, sys
from pipeline.decode.process import DecodeProcess
process = DecodeProcess(memory_bytes=1 << 32, base_s=9, s_per_mpx=1)
process.await_ready()
print(process._process.pid, flush=True)
sys.stdin.read()
"""


def start(*command, stderr=subprocess.PIPE):
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def test_a_frame_says_its_length():
    frame = pack_frame({"a": "é\ud800"})
    assert int.from_bytes(frame[:4], "little") == len(frame) - 4


def test_what_was_written_is_dropped():
    parts = [memoryview(part) for part in (b"abc", b"", b"de")]
    left = [b"".join(drop_bytes(parts, num_bytes)) for num_bytes in range(6)]
    assert left == [b"abcde", b"bcde", b"cde", b"de", b"e", b""]
    assert drop_bytes(parts, 5) == []


def test_it_imports_numpy_and_pillow_alone():
    code = "import pipeline.decode.worker, sys; print(*sorted(sys.modules))"
    process = start("-c", code)
    output, _ = process.communicate(timeout=60)
    modules = output.decode().split()
    assert {"numpy", "PIL.Image", "pipeline.decode.images"} <= set(modules)
    heavy = {"torch", "ray", "diffusers", "transformers", "zarr", "pyarrow", "fsspec", "pydantic"}
    assert not heavy & {module.split(".")[0] for module in modules}
    files = {module for module in modules if module.count(".") == 2 and module[:9] == "pipeline."}
    assert files == {
        *(
            f"pipeline.decode.{name}"
            for name in ("worker", "images", "masks", "color", "jpeg", "sample", "views")
        ),
        "pipeline.base.orientation",
        *(f"pipeline.corpus.{name}" for name in ("members", "other_files", "text", "tar")),
    }


def wait_until_gone(pid):
    deadline = time.monotonic() + 60
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # dead; nobody here is its parent to reap it
            return
        assert time.monotonic() < deadline, f"{pid} is left"
        time.sleep(0.01)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None])
def test_it_ends_with_its_parent(number):
    process = start("-c", PARENT)
    pid = int(process.stdout.readline())
    os.kill(pid, 0)
    if number is None:
        process.stdin.close()
    else:
        process.send_signal(number)
    process.wait(timeout=60)
    wait_until_gone(pid)


HANGING = """
import time
from pipeline.decode import worker
worker.decode_named_image = lambda *_, on_size, **more: (on_size(3000, 3000), time.sleep(600))
worker.main(1 << 32)
"""


def test_an_alarm_ends_a_decode_that_is_too_long(tmp_path):
    """What is left of a hang once its parent is dead; sleeping is C, as a decoder is."""
    errors = (tmp_path / "errors").open("wb")  # a file, where the worker notes what it is at
    process = start("-c", HANGING, stderr=errors)
    request = {
        "number": 1,
        "key": "a",
        "members": [["a.jpg", 4], ["a.mask0.png", 0]],
        "ignores": False,
        "limits": {},
        "cutting": dataclasses.asdict(Cutting(64, "center", 1, False, 1, 0)),
        "alarm_s": 1,
    }
    process.stdin.write(pack_frame(request) + b"JPEG")
    process.stdin.flush()
    process.wait(timeout=60)
    assert process.returncode == -signal.SIGALRM
    assert (tmp_path / "errors").read_text().split() == ["1", "3000", "3000", "image"]
    errors.close()
    process.communicate()


def test_core_files_are_off_and_ctrl_c_is_the_parent_s():
    code = (
        "import os, resource, signal, sys; from pipeline.decode import worker as w\n"
        "r, f = os.pipe(); os.dup2(r, 0); os.close(f); w.main(1 << 32)\n"
        "sys.stderr.write(f'{resource.getrlimit(resource.RLIMIT_CORE)[0]} ')\n"
        "sys.stderr.write(f'{signal.getsignal(signal.SIGINT) == signal.SIG_IGN}')\n"
    )
    process = start("-c", code)
    _, errors = process.communicate(timeout=60)
    assert errors == b"0 True"
