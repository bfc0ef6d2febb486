"""The worker by itself: what it imports, and that it ends when its parent does."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from pipeline.decode_worker import pack_frame, unpack_length

ROOT = Path(__file__).parents[2]
PARENT = """
import os, signal, sys
from pipeline.decode_process import DecodeProcess
process = DecodeProcess(memory_bytes=1 << 32, base_s=9, s_per_mpx=1)
print(process.pid, flush=True)
sys.stdin.read()
"""


def start(*command):
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_frame_says_its_length():
    frame = pack_frame({"a": "é\ud800"})
    assert unpack_length(frame[:4]) == len(frame) - 4


def test_it_imports_numpy_and_pillow_alone():
    code = "import pipeline.decode_worker, sys; print(*sorted(sys.modules))"
    process = start("-c", code)
    output, _ = process.communicate(timeout=60)
    modules = output.decode().split()
    assert {"numpy", "PIL.Image", "pipeline.images"} <= set(modules)
    heavy = {"torch", "ray", "diffusers", "transformers", "zarr", "pyarrow", "fsspec", "pydantic"}
    assert not heavy & {module.split(".")[0] for module in modules}
    assert {module for module in modules if module.startswith("pipeline.")} == {
        "pipeline.decode_worker",
        "pipeline.images",
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


def test_an_alarm_ends_a_decode_that_is_too_long():
    """What is left of a hang once its parent is dead: 80 scans over 9 Mpx take seconds, in C."""
    out = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(out, "JPEG", progressive=True)
    start_of_last = out.getvalue().rindex(b"\xff\xda")
    slow = out.getvalue()[:-2] + out.getvalue()[start_of_last:-2] * 80 + b"\xff\xd9"
    process = start("-m", "pipeline.decode_worker", str(1 << 32))
    request = {"kind": "image", "num_bytes": len(slow), "alarm_s": 1}
    process.stdin.write(pack_frame(request | {"options": {"max_pixels": 10**7}}) + slow)
    process.stdin.flush()
    process.wait(timeout=60)
    assert process.returncode == -signal.SIGALRM
    process.communicate()


def test_core_files_are_off_and_ctrl_c_is_the_parent_s():
    code = (
        "import os, resource, signal, sys; from pipeline import decode_worker as w\n"
        "r, f = os.pipe(); os.dup2(r, 0); os.close(f); w.main(1 << 32)\n"
        "sys.stderr.write(f'{resource.getrlimit(resource.RLIMIT_CORE)[0]} ')\n"
        "sys.stderr.write(f'{signal.getsignal(signal.SIGINT) == signal.SIG_IGN}')\n"
    )
    process = start("-c", code)
    _, errors = process.communicate(timeout=60)
    assert errors == b"0 True"
