"""Decoding in a worker: the same answers; a crash or a hang costs that sample alone."""

import io
import json
import os
import re
import shutil
import signal
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from pipeline.decode_process import DecodeProcess
from pipeline.sample_decoder import NUM_TRIES, SampleDecoder, bound_memory
from pipeline.samples import Limits, Reject, RejectReason, Sample, decode_sample, group_members
from pipeline.tar import DamagedTarError, list_members

HEIGHT, WIDTH = 48, 61  # an odd width: a mask's bits do not end on a byte
RNG = np.random.default_rng(0)


def encode(pixels, image_format="PNG", **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, image_format, **options)
    return out.getvalue()


def make_sample(key, number=0, **changes):
    """The members of a sample of two phrases, by name."""
    image = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    masks = [image[:, :, channel] > 100 for channel in (0, 1)]
    parts = {"jpg": encode(image, "JPEG"), "json": json.dumps({"phrases": ["a", "b"]}).encode()}
    parts |= {f"mask{i}.png": encode(mask) for i, mask in enumerate(masks)}
    parts |= {extension.replace("_", "."): data for extension, data in changes.items()}
    return {f"{key}.{extension}": data for extension, data in parts.items()}


def open_tar(members, file_class=io.BytesIO):
    """The tar as a file, and its samples by their names."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    file = file_class(out.getvalue())
    groups, rejects = group_members(list_members(file, num_bytes=len(out.getvalue())))
    assert rejects == []
    return file, groups


class Disturbed(io.BytesIO):
    """A tar whose member at ``offset``, when it is read, sends the worker a signal first.

    So the worker is hit between the image's answer and the mask's request, or, where the image is
    the member, as soon as it runs; ``times`` bounds how often.
    """

    offset = -1
    number = signal.SIGKILL
    times = NUM_TRIES
    decoder: SampleDecoder

    def read(self, size=-1):
        if self.tell() == self.offset and self.times and self.decoder.pid:
            self.times -= 1
            os.kill(self.decoder.pid, self.number)
        return super().read(size)


@pytest.fixture(scope="module")
def decoder():
    with SampleDecoder() as running:
        yield running


@pytest.fixture
def disturbed(decoder):
    """Three samples, the second of which loses its worker at its first mask."""
    members = {}
    for number, key in enumerate("abc"):
        members |= make_sample(key, number)
    file, groups = open_tar(members, Disturbed)
    file.decoder = decoder
    file.offset = groups[1].masks[0].offset
    return file, groups


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(theirs, Reject):
        assert ours == theirs
        return
    assert (ours.key, ours.phrases, ours.image_sha256) == (
        theirs.key,
        theirs.phrases,
        theirs.image_sha256,
    )
    np.testing.assert_array_equal(ours.image, theirs.image)
    assert ours.image.dtype == np.uint8
    assert ours.image.flags.writeable
    for mask, expected in zip(ours.masks, theirs.masks, strict=True):
        np.testing.assert_array_equal(mask, expected)
        assert mask.dtype == np.bool_


def orient(pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(pixels, "JPEG", exif=exif)


PIXELS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
WHOLE = make_sample("x")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"jpg": orient(PIXELS.swapaxes(0, 1), 6)},
        {"jpg": orient(PIXELS, 6)},
        {"jpg": WHOLE["x.jpg"][:-9]},
        {"jpg": encode(PIXELS)},
        {"jpg": b""},
        {"jpg": encode(np.zeros((9000, 9000), np.uint8), "JPEG")},
        {"json": b"{"},
        {"mask1_png": b"\x89PNG\r\n\x1a\n"},
        {"mask1_png": WHOLE["x.jpg"]},
        {"mask0_png": encode(np.zeros((HEIGHT, WIDTH), bool))},
        {"mask0_png": encode(np.ones((WIDTH, HEIGHT), bool))},
        {"mask2_png": encode(np.ones((HEIGHT, WIDTH), bool))},
    ],
)
def test_the_answer_is_that_of_decode_sample(decoder, changes):
    file, (group,) = open_tar(make_sample("x", **changes))
    assert_same(decoder.decode(file, group), decode_sample(file, group))


def test_one_worker_serves_samples_and_is_ended():
    file, groups = open_tar(make_sample("a") | make_sample("b", 1))
    with SampleDecoder() as decoder:
        assert decoder.pid is None
        found = []
        for group in groups:
            assert isinstance(decoder.decode(file, group), Sample)
            found.append(decoder.pid)
        assert found[0] == found[1]
    assert decoder.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], 0)
    decoder.close()
    assert isinstance(decoder.decode(file, groups[0]), Sample)  # it starts another
    decoder.close()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_a_worker_that_dies_costs_that_sample_alone(decoder, disturbed, name):
    file, groups = disturbed
    file.number = getattr(signal, name)
    before, reject, after = [decoder.decode(file, group) for group in groups]
    assert isinstance(before, Sample)
    assert isinstance(after, Sample)
    assert reject == Reject(
        name="b",
        level="sample",
        reason=RejectReason.DECODER_CRASHED,
        detail=f"mask 0: ended by {name}; the last of 2 tries",
        num_members=4,
    )
    assert file.times == 0  # it was tried in two workers


def test_a_worker_killed_once_from_outside_costs_no_sample(decoder, disturbed):
    file, groups = disturbed
    file.times = 1
    answers = [decoder.decode(file, group) for group in groups]
    assert file.times == 0
    for answer, group in zip(answers, groups, strict=True):
        assert_same(answer, decode_sample(file, group))


def test_a_worker_killed_while_idle_costs_no_sample(decoder, disturbed):
    file, groups = disturbed
    file.times = 0
    assert isinstance(decoder.decode(file, groups[0]), Sample)
    os.kill(decoder.pid, signal.SIGKILL)
    assert isinstance(decoder.decode(file, groups[1]), Sample)


@pytest.mark.parametrize("member", ["image", "mask", "large image"])
def test_a_hang_costs_that_sample_and_bounded_time(member):
    """A stopped process hangs as one in an endless loop does, and takes no signal but SIGKILL.

    Nor does it read: an image of more than a pipe holds must not be written for ever.
    """
    changes = {"jpg": RNG.bytes(3 << 20)} if member == "large image" else {}
    file, groups = open_tar(make_sample("a", **changes) | make_sample("b", 1), Disturbed)
    with SampleDecoder(base_s=1.0, s_per_mpx=0.1) as decoder:
        assert isinstance(decoder.decode(file, groups[1]), Sample)
        file.decoder, file.number = decoder, signal.SIGSTOP
        file.offset = (groups[0].masks[0] if member == "mask" else groups[0].image).offset
        pid = decoder.pid
        start = time.monotonic()
        reject = decoder.decode(file, groups[0])
        assert time.monotonic() - start < 60  # it would never end
        assert (reject.name, reject.reason) == ("a", RejectReason.DECODER_TIMEOUT)
        what = "mask 0" if member == "mask" else "image"
        assert reject.detail == f"{what}: not decoded in time; the last of 2 tries"
        assert reject.num_members == 4
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert isinstance(decoder.decode(file, groups[1]), Sample)


def test_the_time_is_that_of_a_sample_not_of_a_member():
    """``base_s`` is given once: many masks cannot each take it."""
    process = DecodeProcess(memory_bytes=1 << 32, base_s=5, s_per_mpx=0)
    limits = {"max_metadata_bytes": 1000}
    mask = encode(np.ones((9, 9), bool))
    process.decode_image(encode(PIXELS), max_pixels=10**6, formats=("PNG",), **limits)
    left = [process._left_s]
    for _ in range(3):
        process.decode_mask(mask, size=(9, 9), **limits)
        left.append(process._left_s)
    assert sorted(left, reverse=True) == left
    process.begin_sample()
    assert process._left_s == 5
    process.end()


def test_over_the_memory_bound_is_a_reject():
    big = encode(np.full((4000, 4000, 3), 9, np.uint8), "JPEG")
    file, groups = open_tar(make_sample("a") | make_sample("b", jpg=big))
    with SampleDecoder(memory_bytes=180 * 1024**2) as decoder:
        assert isinstance(decoder.decode(file, groups[0]), Sample)
        reject = decoder.decode(file, groups[1])
        assert reject.reason == RejectReason.DECODER_CRASHED
        assert "image: exit 1: " in reject.detail
        assert "MemoryError" in reject.detail
        assert isinstance(decoder.decode(file, groups[0]), Sample)


def test_what_the_limits_allow_fits_the_memory_bound():
    """The costliest form found: WebP with alpha, turned."""
    limits = Limits(max_pixels=4_000_000, max_member_bytes=10_000_000)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.full((2000, 2000, 4), 9, np.uint8)
    file, (group,) = open_tar(
        {
            "a.webp": encode(pixels, "WEBP", exif=exif, method=0),
            "a.json": b'{"phrases": ["a"]}',
            "a.mask0.png": encode(np.ones((2000, 2000), bool)),
        }
    )
    tight = bound_memory(limits) - (2 * 1024**3 - 160 * 1024**2)  # a bare worker takes 110 MiB
    with SampleDecoder(limits=limits, memory_bytes=tight) as decoder:
        assert isinstance(decoder.decode(file, group), Sample)


@pytest.mark.parametrize(
    ("executable", "message"),
    [
        ("/nowhere/python", "nowhere"),
        (shutil.which("false"), "decode worker cannot be started: start: exit 1"),
        (shutil.which("yes"), "decode worker cannot be started: start: (ended|exit|the worker)"),
    ],
)
def test_a_worker_that_cannot_be_started_is_the_task_s_error(monkeypatch, executable, message):
    file, (group,) = open_tar(make_sample("a"))
    monkeypatch.setattr("sys.executable", executable)
    with SampleDecoder() as decoder:
        with pytest.raises(OSError, match=message):
            decoder.decode(file, group)
        assert decoder.pid is None


def test_a_tar_that_has_shrunk_fails_the_task(decoder):
    file, (group,) = open_tar(make_sample("a"))
    file.truncate(group.masks[1].offset + 1)
    with pytest.raises(DamagedTarError, match="as when the members were listed"):
        decoder.decode(file, group)


def test_an_interrupt_leaves_no_half_answer_behind(decoder, monkeypatch):
    file, groups = open_tar(make_sample("a") | make_sample("b", 1))
    decoder.decode(file, groups[0])

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DecodeProcess, "_read_frame", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decoder.decode(file, groups[0])
    assert_same(decoder.decode(file, groups[1]), decode_sample(file, groups[1]))


def test_decode_all_is_in_order_and_one_ahead(decoder):
    members = {}
    for number in range(5):
        members |= make_sample(f"k{number}", number, **({"jpg": b"no"} if number == 2 else {}))

    class Watched(io.BytesIO):
        ahead = threading.Event()

        def read(self, size=-1):
            if self.tell() == groups[3].image.offset:
                self.ahead.set()
            return super().read(size)

    file, groups = open_tar(members)
    watched = Watched(file.getvalue())
    answers = []
    for number, answer in enumerate(decoder.decode_all(watched, groups)):
        answers.append(answer)
        if number == 1:
            assert not watched.ahead.is_set()
        if number == 2:
            assert watched.ahead.wait(30)  # read while this one is the caller's
    for answer, group in zip(answers, groups, strict=True):
        assert_same(answer, decode_sample(file, group))
    assert answers[2].reason == RejectReason.BAD_IMAGE
    assert list(decoder.decode_all(file, [])) == []


def test_decode_all_raises_when_the_sample_s_turn_comes(decoder):
    file, groups = open_tar(make_sample("a") | make_sample("b", 1))
    file.truncate(groups[1].image.offset)
    answers = decoder.decode_all(file, groups)
    assert isinstance(next(answers), Sample)
    with pytest.raises(DamagedTarError, match="as when the members were listed"):
        next(answers)


def test_decode_all_ends_its_thread_when_closed(decoder):
    file, groups = open_tar(make_sample("a") | make_sample("b", 1))
    answers = decoder.decode_all(file, groups)
    next(answers)
    answers.close()
    file.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode-ahead")]


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="no /proc")
def test_the_worker_gets_no_secrets_and_a_group_of_its_own(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    file, (group,) = open_tar(make_sample("a"))
    with SampleDecoder() as decoder:
        decoder.decode(file, group)
        with open(f"/proc/{decoder.pid}/environ", "rb") as environment:
            assert b"hush" not in environment.read()
        assert os.getpgid(decoder.pid) == decoder.pid  # a Ctrl-C goes to the parent's
        assert os.getsid(decoder.pid) == os.getsid(0)
        with open(f"/proc/{decoder.pid}/limits") as file:
            limits = dict(re.findall(r"^Max (.*?)  +(\d+|unlimited) ", file.read(), re.MULTILINE))
    assert limits["address space"] == str(bound_memory(Limits()))
    assert limits["core file size"] == "0"
