"""What a worker answers is checked: one that was taken over can be wrong, but not hurt the parent.

The workers here are real processes that run our worker with one of its functions replaced.
"""

import dataclasses
import io
import stat
import sys
import time

import numpy as np
import pytest
from PIL import Image

from pipeline.corpus.members import Limits, RejectedError, RejectReason, SampleMembers
from pipeline.corpus.tar import Member
from pipeline.decode.pool import NUM_TRIES
from pipeline.decode.process import MAX_SAMPLE_S, START_LIMIT_S, DecodeFailedError, DecodeProcess
from pipeline.decode.views import Cutting
from pipeline.stage.watchdog import STALL_S

CENTRE = Cutting(64, "center", 1, False, 1, 0)
PHRASE = Cutting(64, "phrase", 1, False, 2, 0)
HOSTILE = """
import struct
from pipeline.decode import worker
from pipeline.decode.worker import HEAD
honest = worker._answer
def answer(request, requests):
    head, cuts, *rest = list(honest(request, requests))
    number, cut, height, width, num_bytes, sha256 = HEAD.unpack(head)
    cuts = list(struct.unpack("<16i", cuts))
    rest = [bytearray(part) for part in rest]
    text = None
    {change}
    if text is not None:
        cut, num_bytes, rest = 0, len(text), [text]
    yield HEAD.pack(number, cut, height, width, num_bytes, sha256)
    yield struct.pack("<16i", *cuts)
    yield from rest
worker._answer = answer
worker.main(1 << 32)
"""


def encode(pixels, image_format="PNG"):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, image_format)
    return out.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
DATA = {
    "a.png": encode(PIXELS),
    "a.json": b"",
    "a.mask0.png": encode(PIXELS[..., 0] > 99),
    "a.mask1.png": encode(PIXELS[..., 1] > 99),
}
MEMBERS = [Member(name, "file", 0, len(data)) for name, data in DATA.items()]
SAMPLE = SampleMembers("a", MEMBERS[0], MEMBERS[1], tuple(MEMBERS[2:]))


def start(monkeypatch, tmp_path, change, **times):
    script, wrapper = tmp_path / "hostile.py", tmp_path / "python"
    script.write_text(HOSTILE.replace("{change}", change))
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("sys.executable", str(wrapper))
    process = DecodeProcess(memory_bytes=1 << 32, **{"base_s": 5, "s_per_mpx": 1, **times})
    process.await_ready()
    return process


def cut(process, cutting=CENTRE):
    return process.cut_sample(
        SAMPLE, lambda member: DATA[member.name], cutting=cutting, limits=Limits()
    )


def test_an_honest_answer_is_taken(monkeypatch, tmp_path):
    process = start(monkeypatch, tmp_path, "pass")
    for _ in range(2):
        found = cut(process)
        source = found.source
        assert (source.width, source.height, len(source.sha256)) == (90, 70, 64)
        ((image, masks, ignore),) = found.pixels
        assert ignore is None
        assert image.shape == (64, 64, 3)
        assert [mask.shape for mask in masks] == [(64, 64)] * 2
    process.end()


@pytest.mark.parametrize(
    ("change", "cutting"),
    [
        ("number += 1", CENTRE),
        ("cut = 2", CENTRE),
        ("height = 0", CENTRE),
        ("height = width = 65536", CENTRE),
        ("height = 71", CENTRE),  # not the centre box any more
        ("cuts[0] -= 1", CENTRE),
        ("cuts[4] = 2", CENTRE),
        ("cuts[6] = 1", CENTRE),  # there is one prompt
        ("rest[2] = bytes(512)", CENTRE),
        ("cuts[2] += 1", PHRASE),
        ("cuts[0] = -1; cuts[2] = 69", PHRASE),
        ("cuts[0] = 21; cuts[2] = 91", PHRASE),
        ("cuts[6] = 2", PHRASE),
        ("cuts[7] = -1", PHRASE),
        ("cuts[5] = 128", CENTRE),  # a larger size for a mask that is shown
        ("cuts[4] = 0; cuts[5] = 64", CENTRE),  # not larger
        ("rest[0] = rest[0].replace(b'1', b'9')", CENTRE),  # of eight orientations
        ("rest[0] = rest[0].replace(b'null', b'[\"\"]')", CENTRE),
        ("rest[0] = b'{}'; num_bytes = 2", CENTRE),
        (
            'rest[0] = b\'{"orientation": 1, "color_profile": "\\\\n"}\'; num_bytes = len(rest[0])',
            CENTRE,
        ),
        ("num_bytes = 70000", CENTRE),
        ("text = b'[]'", CENTRE),
        ("text = b'{'", CENTRE),
        ('text = b\'{"reason": "outside_view", "detail": "a"}\'', CENTRE),
        ('text = b\'{"reason": [], "detail": "a"}\'', CENTRE),
        ('text = b\'{"reason": "bad_mask"}\'', CENTRE),
        ("text = b' ' * 70000", CENTRE),
    ],
)
def test_a_wrong_answer_is_a_crash(monkeypatch, tmp_path, change, cutting):
    process = start(monkeypatch, tmp_path, change)
    with pytest.raises(DecodeFailedError, match="the worker answered") as caught:
        cut(process, cutting)
    assert caught.value.reason == RejectReason.DECODER_CRASHED
    assert not process.alive


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rest.pop()", "not decoded in time"),
        ("raise SystemExit(3)", "exit 3"),
    ],
)
def test_a_short_answer_ends_the_worker(monkeypatch, tmp_path, change, message):
    process = start(monkeypatch, tmp_path, change)
    process._base_s = 0.5
    with pytest.raises(DecodeFailedError, match=message):
        cut(process)
    assert not process.alive


def test_a_time_has_an_end_whatever_the_pixels(monkeypatch, tmp_path):
    """At three megapixels, by the image and its masks, it would be 95 years."""
    change = "import time; time.sleep(600)"
    process = start(monkeypatch, tmp_path, change, base_s=0.2, s_per_mpx=1e9, max_s=0.5)
    monkeypatch.setattr(process, "_read_status", lambda: ("image", 1_000_000))
    start_s = time.monotonic()
    with pytest.raises(DecodeFailedError, match="image: not decoded in time"):
        cut(process)
    assert 0.5 <= time.monotonic() - start_s < 60


def test_a_reject_is_passed_on_and_the_worker_lives(monkeypatch, tmp_path):
    text = 'text = b\'{"reason": "bad_mask", "detail": "a"}\' if number == 1 else None'
    process = start(monkeypatch, tmp_path, text)
    with pytest.raises(RejectedError, match="bad_mask"):
        cut(process)
    assert process.alive
    assert cut(process, dataclasses.replace(CENTRE, size=128)).pixels[0][0].shape == (128, 128, 3)
    process.end()


@pytest.mark.parametrize(("s_per_mpx", "in_time"), [(0, False), (1000, True)])
def test_the_time_grows_with_the_pixels(monkeypatch, tmp_path, s_per_mpx, in_time):
    """A pause of 2.5 s, on any computer, at 0.019 Mpx: image and two masks."""
    change = "import time; time.sleep(2.5)"
    process = start(monkeypatch, tmp_path, change, base_s=1.0, s_per_mpx=s_per_mpx)
    monkeypatch.setattr(process, "_read_status", lambda: ("image", 90 * 70))
    if in_time:
        assert len(cut(process).cuts) == 2
        process.end()
    else:
        with pytest.raises(DecodeFailedError, match="image: not decoded in time"):
            cut(process)


def test_two_tries_of_the_longest_end_before_the_watchdog_acts():
    assert NUM_TRIES * (MAX_SAMPLE_S + START_LIMIT_S) < STALL_S


def test_an_interrupted_start_leaves_no_worker(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    process = DecodeProcess(memory_bytes=1 << 32, base_s=5, s_per_mpx=1)
    monkeypatch.setattr(process, "_read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        process.await_ready()
    assert not process.alive
