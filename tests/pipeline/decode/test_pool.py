"""Decoding in workers: the views of decode_sample; a crash or a hang costs that sample alone."""

import gzip
import io
import json
import os
import re
import shutil
import signal
import tarfile
import threading
import time
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from pipeline.corpus.members import Limits, Reject, RejectReason, group_members
from pipeline.corpus.tar import DamagedTarError, list_members
from pipeline.decode.pool import (
    NUM_TRIES,
    DecoderKilledError,
    SampleDecoder,
    bound_bytes,
    bound_memory,
)
from pipeline.decode.process import DecodeProcess
from pipeline.spec.fields import LatentsSpec
from tests.support.decode_here import build_views, decode_sample
from tests.support.icc import make_profile

HEIGHT, WIDTH = 48, 61
RNG = np.random.default_rng(0)
SPEC = LatentsSpec(model="m", size=64)
PROMPTS = ("a {}.", "one {}.", "the {}.")
PLENTY = 1 << 30


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
    groups, rejects, _ = group_members(list_members(file, num_bytes=len(out.getvalue())))
    assert rejects == []
    return file, groups


def decode(decoder, file, groups, spec=SPEC, max_bytes=PLENTY):
    with closing(decoder.decode_views(file, groups, spec, max_bytes=max_bytes)) as samples:
        return list(samples)


def list_pids(decoder):
    """The process ids of the workers that run."""
    return [p._process.pid for p in decoder._processes if p and p.alive]


class Disturbed(io.BytesIO):
    """A tar whose member at ``offset``, when it is read, sends the workers a signal first."""

    offset = -1
    number = signal.SIGKILL
    times = NUM_TRIES
    decoder: SampleDecoder

    def read(self, size=-1):
        if self.tell() == self.offset and self.times and list_pids(self.decoder):
            self.times -= 1
            for pid in list_pids(self.decoder):
                os.kill(pid, self.number)
        return super().read(size)


@pytest.fixture(scope="module")
def decoder():
    with SampleDecoder() as running:
        yield running


@pytest.fixture(scope="module")
def two_workers():
    with SampleDecoder(num_workers=2) as running:
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


def summarise(views):
    """All of the views but their pixels, and the pixels."""
    facts = [
        (v.source, v.number, v.flipped, v.box, [(p.phrase, p.prompt, p.instance) for p in v.pairs])
        for v in views
    ]
    return facts, [x for v in views for x in (v.image, *(pair.mask for pair in v.pairs))]


def assert_as_in_process(found, file, groups, spec=SPEC):
    assert len(found) == len(groups)
    for answer, group in zip(found, groups, strict=True):
        sample = decode_sample(file, group, spec=spec)
        if isinstance(sample, Reject):
            assert (answer.views, answer.rejects, answer.num_bytes) == ((), (sample,), 0)
            continue
        views, rejects = build_views(sample, spec)
        assert answer.rejects[: len(rejects)] == tuple(rejects)
        levels = [reject.level for reject in answer.rejects]
        assert levels == ["pair"] * len(rejects) + ["sample"] * (not views)
        (facts, arrays), (expected, expected_arrays) = summarise(answer.views), summarise(views)
        assert facts == expected
        for array, expected_array in zip(arrays, expected_arrays, strict=True):
            np.testing.assert_array_equal(array, expected_array)
            assert array.dtype == np.uint8
        assert answer.num_bytes == sum(array.nbytes for array in arrays)
        assert answer.num_bytes <= bound_bytes(group, spec)
        assert answer.busy_s > 0


def orient(pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(pixels, "JPEG", exif=exif)


PIXELS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
EDGE = np.zeros((HEIGHT, WIDTH), bool)
EDGE[5, 0] = True  # outside the centre crop
WHOLE = make_sample("x")
CHANGES = [
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
    {"mask0_png": encode(EDGE)},
    {"mask0_png": encode(EDGE), "mask1_png": encode(EDGE)},
    {"jpg": encode(PIXELS, "JPEG", icc_profile=make_profile())},
    {"jpg": encode(PIXELS, "JPEG", icc_profile=b"none")},
]


@pytest.mark.parametrize(
    "fields",
    [
        {"crop": "center"},
        {"crop": "resize", "flip": True, "prompts": PROMPTS},
        {"crop": "phrase", "views": 3, "flip": True, "prompts": PROMPTS, "seed": 5},
        {"crop": "phrase", "views": 2, "size": 128},
        {"orientation": "ignore", "color": "srgb"},
    ],
)
def test_the_views_are_those_of_decode_sample(two_workers, fields):
    members = {}
    for number, changes in enumerate(CHANGES):
        members |= make_sample(f"k{number}", number, **changes)
    file, groups = open_tar(members)
    spec = LatentsSpec(**{"model": "m", "size": 64, **fields})
    found = decode(two_workers, file, groups, spec)
    assert_as_in_process(found, file, groups, spec)
    reasons = {reject.reason for answer in found for reject in answer.rejects}
    assert len(reasons) >= 6


def test_limits_are_those_of_decode_sample():
    limits = Limits(max_pixels=HEIGHT * WIDTH, max_mask_pixels=2 * HEIGHT * WIDTH - 1)
    file, groups = open_tar(make_sample("a") | make_sample("b", jpg=encode(PIXELS[:9], "JPEG")))
    with SampleDecoder(limits=limits) as strict:
        found = decode(strict, file, groups)
    for answer, group in zip(found, groups, strict=True):
        assert answer.rejects == (decode_sample(file, group, limits=limits),)
    assert found[0].rejects[0].reason == RejectReason.MASKS_TOO_LARGE


def test_a_sample_that_shows_nothing_is_rejected(decoder):
    file, groups = open_tar(make_sample("a", mask0_png=encode(EDGE), mask1_png=encode(EDGE)))
    (answer,) = decode(decoder, file, groups)
    assert answer.views == ()
    assert [(r.level, r.num_members) for r in answer.rejects] == [*2 * [("pair", 0)], ("sample", 4)]
    assert answer.rejects[-1].reason == RejectReason.OUTSIDE_VIEW
    assert answer.rejects[-1].detail == "no phrase's mask has a pixel in any view"


def test_a_sample_of_thin_masks_alone_is_rejected_as_such(decoder):
    mask = np.zeros((1000, 1000), bool)
    mask[:, 485] = True
    image = encode(np.zeros((1000, 1000, 3), np.uint8), "JPEG")
    outside = encode(np.arange(1000) * np.ones((600, 1)) < 1)
    members = make_sample("a", jpg=image, mask0_png=encode(mask), mask1_png=encode(mask))
    members |= make_sample(
        "b",
        jpg=encode(np.zeros((600, 1000, 3), np.uint8), "JPEG"),
        mask0_png=encode(np.roll(mask[:600], -5, axis=1)),
        mask1_png=outside,
    )
    file, groups = open_tar(members)
    thin, mixed = decode(decoder, file, groups)
    assert [reject.reason for reject in thin.rejects] == [RejectReason.TOO_THIN] * 3
    assert [reject.reason for reject in mixed.rejects] == [
        *(RejectReason.TOO_THIN, RejectReason.OUTSIDE_VIEW),
        RejectReason.TOO_THIN,  # a larger size brings the sample
    ]


def test_a_sample_of_more_than_a_pipe_holds(decoder):
    large = RNG.integers(0, 256, (700, 800, 3), dtype=np.uint8)  # PNG takes 1.7 MB
    members = make_sample("a", mask0_png=encode(large[..., 0]), mask1_png=encode(large[..., 1]))
    members["a.png"] = encode(large)
    del members["a.jpg"]
    file, groups = open_tar(members)
    spec = LatentsSpec(model="m", size=512, crop="phrase", views=3, flip=True)
    assert_as_in_process(decode(decoder, file, groups, spec), file, groups, spec)


def test_workers_serve_samples_and_are_ended():
    file, groups = open_tar(make_sample("a") | make_sample("b", 1))
    with SampleDecoder() as decoder:
        assert list_pids(decoder) == []
        found = []
        for answer in decoder.decode_views(file, groups, SPEC, max_bytes=PLENTY):
            assert answer.views
            found += list_pids(decoder)
        assert len(found) == 2
        assert found[0] == found[1]
    assert list_pids(decoder) == []
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], 0)
    decoder.close()
    assert decode(decoder, file, groups)[0].views  # it starts another
    decoder.close()
    with pytest.raises(ValueError, match="num_workers must be at least 1, but got 0"):
        SampleDecoder(num_workers=0)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT"])
def test_a_worker_that_dies_costs_that_sample_alone(decoder, disturbed, name):
    file, groups = disturbed
    file.number = getattr(signal, name)
    before, crashed, after = decode(decoder, file, groups)
    assert before.views
    assert after.views
    assert crashed.views == ()
    assert crashed.rejects == (
        Reject(
            name="b",
            level="sample",
            reason=RejectReason.DECODER_CRASHED,
            detail=f"request: ended by {name}; the last of 2 tries",
            num_members=4,
        ),
    )
    assert file.times == 0  # it was tried in two workers


def test_a_death_says_at_which_member():
    """An image of more than a pipe holds is under way before the first mask is read."""
    large = encode(RNG.integers(0, 256, (700, 800, 3), dtype=np.uint8), "JPEG", quality=100)
    assert len(large) > 1 << 20
    file, groups = open_tar(make_sample("a", jpg=large), Disturbed)
    with SampleDecoder() as decoder:
        file.decoder, file.offset = decoder, groups[0].masks[1].offset
        file.read = lambda size=-1: (time.sleep(0.3), Disturbed.read(file, size))[1]
        (reject,) = decode(decoder, file, groups)[0].rejects
    assert re.match("(image|mask 0): ended by SIGKILL", reject.detail)


def test_a_worker_killed_once_from_outside_costs_no_sample(decoder, disturbed):
    file, groups = disturbed
    file.times = 1
    found = decode(decoder, file, groups)
    assert file.times == 0
    assert_as_in_process(found, file, groups)


def test_a_worker_killed_while_idle_costs_no_sample(decoder, disturbed):
    file, groups = disturbed
    file.times = 0
    assert decode(decoder, file, groups[:1])[0].views
    os.kill(list_pids(decoder)[0], signal.SIGKILL)
    assert decode(decoder, file, groups[1:])[0].views


class Stopped(Disturbed):
    """A tar that stops the workers when a member is read, and tells when it has."""

    number, times = signal.SIGSTOP, 1

    def __init__(self, data):
        super().__init__(data)
        self.reached = threading.Event()

    def read(self, size=-1):
        data = super().read(size)
        if not self.times:
            self.reached.set()
        return data


def test_a_kill_ends_at_once_what_would_hang_and_is_no_reject():
    """A stopped worker never answers, and its time is an hour; the next sample gets no worker."""
    file, groups = open_tar(make_sample("a") | make_sample("b", 1), Stopped)
    decoder = SampleDecoder(base_s=3600)
    assert decode(decoder, file, groups[1:])[0].views
    (pid,) = list_pids(decoder)
    file.decoder, file.offset = decoder, groups[0].masks[1].offset
    killer = threading.Thread(target=lambda: (file.reached.wait(60), decoder.kill()))
    killer.start()
    with pytest.raises(DecoderKilledError, match="killed before the sample was decoded"):
        decode(decoder, file, groups)
    killer.join()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    decoder.kill()
    with pytest.raises(DecoderKilledError, match="killed"):
        decode(decoder, file, groups[1:])
    decoder.close()
    assert list_pids(decoder) == []


def test_a_kill_ends_a_worker_that_is_starting(monkeypatch, tmp_path):
    """An interpreter that never says it is ready would be waited for a minute."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 600\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    file, groups = open_tar(make_sample("a"))
    with SampleDecoder() as decoder:

        def kill():
            while not list_pids(decoder):
                time.sleep(0.01)
            decoder.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(DecoderKilledError, match="killed"):
            decode(decoder, file, groups)
        killer.join()


@pytest.mark.parametrize("member", ["image", "mask", "large image"])
def test_a_hang_costs_that_sample_and_bounded_time(member):
    """A stopped process hangs as one in an endless loop does, and takes no signal but SIGKILL.

    Nor does it read: an image of more than a pipe holds must not be written for ever.
    """
    changes = {"jpg": RNG.bytes(3 << 20)} if member == "large image" else {}
    file, groups = open_tar(make_sample("a", **changes) | make_sample("b", 1), Disturbed)
    with SampleDecoder(base_s=1.0, s_per_mpx=0.1) as decoder:
        assert decode(decoder, file, groups[1:])[0].views
        file.decoder, file.number = decoder, signal.SIGSTOP
        file.offset = (groups[0].masks[0] if member == "mask" else groups[0].image).offset
        (pid,) = list_pids(decoder)
        start = time.monotonic()
        (reject,) = decode(decoder, file, groups[:1])[0].rejects
        assert time.monotonic() - start < 60  # it would never end
        assert (reject.name, reject.reason) == ("a", RejectReason.DECODER_TIMEOUT)
        assert reject.detail == "request: not decoded in time; the last of 2 tries"
        assert reject.num_members == 4
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert decode(decoder, file, groups[1:])[0].views


def test_reading_costs_none_of_the_time():
    class Slow(io.BytesIO):
        def read(self, size=-1):
            time.sleep(0.4)
            return super().read(size)

    file, groups = open_tar(make_sample("a"))
    with SampleDecoder(base_s=0.8, s_per_mpx=0) as decoder:
        assert decode(decoder, Slow(file.getvalue()), groups)[0].views  # its members take 1.2 s


def test_over_the_memory_bound_is_a_reject():
    big = encode(np.full((6000, 6000, 3), 9, np.uint8), "JPEG")
    file, groups = open_tar(make_sample("a") | make_sample("b", jpg=big) | make_sample("c", 1))
    with SampleDecoder(memory_bytes=180 * 1024**2) as decoder:
        before, refused, after = decode(decoder, file, groups)
    assert before.views
    assert after.views
    assert refused.rejects[0].reason == RejectReason.DECODER_CRASHED
    assert "image: exit 1: " in refused.rejects[0].detail
    assert "MemoryError" in refused.rejects[0].detail


def test_what_the_limits_allow_fits_the_memory_bound():
    """The costliest form found: WebP with alpha, turned; a colour profile must not add to it."""
    limits = Limits(max_pixels=4_000_000, max_member_bytes=10_000_000)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.full((2000, 2000, 4), 9, np.uint8)
    file, groups = open_tar(
        {
            "a.webp": encode(pixels, "WEBP", exif=exif, method=0, icc_profile=make_profile()),
            "a.json": b'{"phrases": ["a"]}',
            "a.mask0.png": encode(np.ones((2000, 2000), bool)),
        }
    )
    tight = bound_memory(limits) - (2 * 1024**3 - 160 * 1024**2)  # a bare worker takes 110 MiB
    with SampleDecoder(limits=limits, memory_bytes=tight) as decoder:
        for color in ("raw", "srgb"):
            spec = SPEC.model_copy(update={"color": color})
            assert decode(decoder, file, groups, spec)[0].views


@pytest.mark.parametrize(
    ("executable", "message"),
    [
        ("/nowhere/python", "nowhere"),
        (shutil.which("false"), "decode worker cannot be started: start: exit 1"),
        (shutil.which("yes"), "decode worker cannot be started: start: (ended|exit|the worker)"),
    ],
)
def test_a_worker_that_cannot_be_started_is_the_task_s_error(monkeypatch, executable, message):
    file, groups = open_tar(make_sample("a"))
    monkeypatch.setattr("sys.executable", executable)
    with SampleDecoder() as decoder:
        with pytest.raises(OSError, match=message):
            decode(decoder, file, groups)
        assert list_pids(decoder) == []


def test_a_tar_that_has_shrunk_fails_the_task_when_its_turn_comes(decoder):
    file, groups = open_tar(make_sample("a") | make_sample("b", 1))
    file.truncate(groups[1].masks[1].offset + 1)
    answers = decoder.decode_views(file, groups, SPEC, max_bytes=PLENTY)
    assert next(answers).views
    with pytest.raises(DamagedTarError, match="as when the members were listed"):
        next(answers)
    assert decode(decoder, file, groups[:1])[0].views


def test_an_interrupt_leaves_no_half_answer_behind(decoder, monkeypatch):
    file, groups = open_tar(make_sample("a") | make_sample("b", 1))
    decode(decoder, file, groups)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DecodeProcess, "_read_answer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decode(decoder, file, groups)
    assert_as_in_process(decode(decoder, file, groups), file, groups)


def test_several_generators_share_the_workers(two_workers):
    tars = [
        open_tar({k: v for i in range(6) for k, v in make_sample(f"{name}{i}", i).items()})
        for name in "abc"
    ]
    found = [[], [], []]

    def run(i):
        found[i] = decode(two_workers, *tars[i], max_bytes=1)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list_pids(two_workers)) <= 2
    for answers, (file, groups) in zip(found, tars, strict=True):
        assert_as_in_process(answers, file, groups)


def test_closing_ends_its_threads(two_workers):
    file, groups = open_tar({k: v for i in range(9) for k, v in make_sample(f"k{i}").items()})
    before = threading.active_count()
    answers = two_workers.decode_views(file, groups, SPEC, max_bytes=PLENTY)
    assert next(answers).views
    answers.close()
    file.close()
    assert threading.active_count() == before


def test_a_real_file_is_read_without_its_position(decoder, tmp_path):
    tar, groups = open_tar(make_sample("a") | make_sample("b", 1))
    path = tmp_path / "a.tar"
    path.write_bytes(tar.getvalue())
    with path.open("rb") as file:
        file.seek(7)
        assert_as_in_process(decode(decoder, file, groups), tar, groups)
        assert file.tell() == 7
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar.getvalue()))
    with gzip.open(tmp_path / "a.tar.gz") as file:  # its fileno is of what is compressed
        assert_as_in_process(decode(decoder, file, groups), tar, groups)
    os.truncate(path, groups[1].masks[1].offset)
    with path.open("rb") as file, pytest.raises(DamagedTarError, match="only 0"):
        decode(decoder, file, groups)


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="no /proc")
def test_the_worker_gets_no_secrets_and_a_group_of_its_own(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    file, groups = open_tar(make_sample("a"))
    with SampleDecoder() as decoder:
        decode(decoder, file, groups)
        (pid,) = list_pids(decoder)
        with open(f"/proc/{pid}/environ", "rb") as environment:
            assert b"hush" not in environment.read()
        assert os.getpgid(pid) == pid  # a Ctrl-C goes to the parent's
        assert os.getsid(pid) == os.getsid(0)
        with open(f"/proc/{pid}/limits") as file:
            limits = dict(re.findall(r"^Max (.*?)  +(\d+|unlimited) ", file.read(), re.MULTILINE))
    assert limits["address space"] == str(bound_memory(Limits()))
    assert limits["core file size"] == "0"
