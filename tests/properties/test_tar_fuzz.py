"""Fuzzed tars, to the pixels: refused, or read as tarfile reads them and all accounted for.

Without the slow ones it is a few seconds' worth; ``make test-slow`` takes every byte and more.
"""

import contextlib
import io
import itertools
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.corpus.members import group_members
from pipeline.corpus.tar import DamagedTarError, list_members
from pipeline.scenes.scene import write_corpus
from tests.support.decode_here import Sample, decode_sample
from tests.support.examples import examples

END = bytes(1024)
SIDE = 8


class Counted(io.BytesIO):
    """Counts the bytes and calls that a walk takes."""

    num_read = num_calls = 0

    def read(self, size=-1):
        assert size >= 0, "a read without a bound"
        piece = super().read(size)
        self.num_read += len(piece)
        self.num_calls += 1
        return piece


def list_or_none(data):
    """The members, or None where the tar is refused; the walk's cost is checked."""
    file = Counted(data)
    try:
        members = list_members(file, num_bytes=len(data))
    except DamagedTarError:
        members = None
    assert file.num_read <= len(data) + 1024  # the first header and the end block twice
    assert file.num_calls <= 2 + len(data) // 256  # one a block, two where an extension follows
    return members


# --- bytes ---

NUMBERS = st.one_of(
    st.integers(0, 2000).map(lambda n: b"%011o\0" % n),
    st.integers(0, 2000).map(lambda n: b"%o \0" % n),
    st.integers(0, 2**40).map(lambda n: b"\x80" + n.to_bytes(11)),
    st.sampled_from([b"-1", b"0x10", b"", b"77777777777\0", b"00000000009\0", b"\xff" * 12]),
    st.binary(max_size=12),
)
NAMES = st.one_of(
    st.sampled_from([b"a.jpg", b"a.json", b"d/", b"../x", b"/x", b"", b"n" * 100, b"\xff.png"]),
    st.binary(max_size=100),
)
PAX_KEYWORDS = st.sampled_from(
    [b"path", b"size", b"linkpath", b"mtime", b"comment", b"GNU.sparse.major", b""]
)
PAX_VALUES = st.one_of(st.integers(0, 3000).map(lambda n: b"%d" % n), st.binary(max_size=40), NAMES)


def pack_record(keyword, value, wrong_by):
    body = b" " + keyword + b"=" + value + b"\n"
    length = next(n for n in itertools.count(len(body)) if n == len(body) + len(b"%d" % n))
    return b"%d" % max(length + wrong_by, 0) + body


RECORDS = st.builds(
    pack_record, PAX_KEYWORDS, PAX_VALUES, st.sampled_from([0] * 12 + [1, -1, 1000])
)
TYPES = st.sampled_from([b"0", b"0", b"\0", *(bytes([n]) for n in b"1234567LKxgXSMNDVAZ\xff")])


@st.composite
def blocks(draw):
    """One header whose checksum is right, whatever its fields say, and data after it."""
    kind = draw(TYPES)
    if kind in b"xgX" and draw(st.integers(0, 3)):
        content = b"".join(draw(st.lists(RECORDS, max_size=3)))
    elif kind in b"LK" and draw(st.booleans()):
        content = draw(NAMES) + b"\0"
    else:
        content = draw(st.binary(max_size=700))
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(draw(st.sampled_from([0, 1]))))
    header[124:136] = b"%011o\0" % len(content)
    header[156:157] = kind
    if draw(st.booleans()):
        name = draw(NAMES)[:100]
        if kind == b"\0":  # "d/" is a folder, for tarfile even where a long name replaces it
            name = name.split(b"\0")[0].rstrip(b"/")
        header[:100] = name.ljust(100, b"\0")
    if kind not in b"LK" and not draw(st.integers(0, 5)):  # there tarfile reads past the size
        header[124:136] = draw(NUMBERS)[:12].ljust(12, b"\0")
    if not draw(st.integers(0, 9)):
        magics = [bytes(8), b"ustar\x0000", b"ustar  \0", b"ustar\0xx", b"garbage!"]
        header[257:265] = draw(st.sampled_from(magics))
    if header[257:263] == b"ustar\0" and not draw(st.integers(0, 3)):
        # tarfile reads a prefix in GNU's headers too, where the field is two dates
        header[345:500] = draw(NAMES)[:155].ljust(155, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % 512)


tars = st.builds(
    lambda parts, tail: b"".join(parts) + tail,
    st.lists(blocks(), max_size=6),
    st.sampled_from([END, END, END, END + bytes(8704), b"", bytes(512), END + b"x", bytes(2000)]),
)


def compare_with_tarfile(data):
    """Where the tar is taken, tarfile sees the same files: names, places and contents."""
    members = list_or_none(data)
    if not members:
        return  # tarfile takes an archive of a global header alone for none
    if any(member.kind == "file" and member.name.endswith("/") for member in members):
        return  # a folder with data: rejected by its name, and tarfile does not skip the data
    theirs = []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        with contextlib.suppress(tarfile.ReadError):  # a global header after the last member
            for their in tar:
                if their.type != b"V":  # a volume's label, for us no member
                    theirs.append(their)
        assert len(theirs) == len(members)
        for ours, their in zip(members, theirs, strict=True):
            names = (ours.name, ours.name.split("\0")[0])  # we keep a NUL, to reject the member
            assert their.name.rstrip("/") in [name.rstrip("/") for name in names]
            if ours.kind == "file":
                assert their.isreg()
                assert (ours.offset, ours.size) == (their.offset_data, their.size)
                content = data[ours.offset : ours.offset + ours.size]
                assert content == tar.extractfile(their).read()
            elif ours.kind != "other":  # GNU tar too takes an empty file "d/" for a directory
                assert not their.isreg() or (ours.name[-1:], their.size) == ("/", 0)


@examples(800)
@given(tars)
def test_what_is_taken_is_what_tarfile_reads(data):
    compare_with_tarfile(data)


@pytest.mark.slow
@examples(20_000)
@given(tars)
def test_what_is_taken_is_what_tarfile_reads_at_length(data):
    compare_with_tarfile(data)


# --- members ---


def encode(pixels, image_format):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, image_format)
    return out.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
MASK = encode(PIXELS[:, :, 0] > 100, "PNG")
JPEG, PNG = encode(PIXELS, "JPEG"), encode(PIXELS, "PNG")
CONTENTS = {
    "jpg": [JPEG, JPEG, JPEG, PNG, JPEG[:-30], b""],
    "PNG": [PNG, PNG, JPEG],
    "webp": [encode(PIXELS, "WEBP"), encode(PIXELS, "GIF")],
    "json": [json.dumps({"phrases": ["a"] * n}).encode() for n in (1, 1, 2, 0)] + [b"\xff", b"{"],
    "mask0.png": [MASK, MASK, MASK, encode(PIXELS[:, :, 0] > 255, "PNG"), PNG, MASK[:50]],
    "mask1.png": [MASK, encode(PIXELS[:4, :, 0] > 100, "PNG")],
    "npy": [b"\x93NUMPY"],
    "json/../x": [b"{}"],
}
FOLDERS = ["", "", "", "d/", "../", "/", "x" * 250, "\x1b[2J"]
KINDS = [tarfile.REGTYPE] * 8 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]


@st.composite
def members_of_a_key(draw):
    """Some members of a key: often one whole sample, in any order, with more or less of it."""
    key = draw(st.sampled_from(FOLDERS)) + draw(st.sampled_from("ab"))
    whole = ["jpg", "json", "mask0.png"] if draw(st.integers(0, 2)) else []
    more = draw(st.lists(st.sampled_from(list(CONTENTS)), max_size=2))
    found = []
    for extension in draw(st.permutations(whole + more)):
        content = draw(st.sampled_from(CONTENTS[extension]))
        found.append((f"{key}.{extension}", draw(st.sampled_from(KINDS)), content))
    return found


def write_tar(entries):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, content in entries:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def read_samples(data, known):
    """Every sample and reject of a tar that is not refused; its accounting is checked.

    ``known`` keeps what was decoded: most tars here are another one but for a byte.
    """
    file = io.BytesIO(data)
    members = list_members(file, num_bytes=len(data))
    groups, rejects, set_aside = group_members(members)
    samples = []
    for group in groups:
        parts = group.members
        content = (group.key, *((m.name, data[m.offset : m.offset + m.size]) for m in parts))
        if content not in known:
            known[content] = decode_sample(file, group)
        answer = known[content]
        (samples if isinstance(answer, Sample) else rejects).append(answer)
    num_members = sum(member.kind != "directory" for member in members)
    kept = {sample.key for sample in samples}
    stored = sum(len(group.members) for group in groups if group.key in kept)
    rejected = sum(reject.num_members for reject in rejects)
    assert stored + rejected + len(set_aside) == num_members
    assert all(reject.detail and reject.name.isprintable() for reject in rejects)
    assert all(len(sample.masks) in (0, len(sample.phrases)) for sample in samples)
    return samples, rejects


def check_members(runs):
    entries = [entry for run in runs for entry in run]
    samples, rejects = read_samples(write_tar(entries), {})
    keys = [sample.key for sample in samples]
    assert len(set(keys)) == len(keys)
    assert set(keys).isdisjoint(r.name for r in rejects if r.level == "sample")
    for sample in samples:  # nothing but what was written under that key
        assert sample.image.shape == (SIDE, SIDE, 3)
        texts = (f"{sample.key}.json", tarfile.REGTYPE)
        assert not sample.masks or texts in [entry[:2] for entry in entries]
        assert all(mask.any() for mask in sample.masks)


@examples(400)
@given(st.lists(members_of_a_key(), max_size=4))
def test_the_accounting_of_any_tar_closes(runs):
    check_members(runs)


@pytest.mark.slow
@examples(5000)
@given(st.lists(members_of_a_key(), max_size=6))
def test_the_accounting_of_any_tar_closes_at_length(runs):
    check_members(runs)


# --- flips and cuts of a real tar ---


@pytest.fixture(scope="module")
def real_tar(tmp_path_factory):
    """Two scenes of 32 px as the project writes them."""
    folder = tmp_path_factory.mktemp("real")
    (path,) = write_corpus(folder, split="train", num_images=2, images_per_tar=2, size_px=32)
    return path.read_bytes()


def describe(samples):
    return {s.key: (s.phrases, s.image.tobytes(), [m.tobytes() for m in s.masks]) for s in samples}


def check_flips(data, offsets, flip):
    """What one changed byte may do, by the part of the tar that it is in.

    A tar has no checksum over data, nor JPEG and JSON over theirs. So there a flip may decode, to
    other pixels or another phrase, and the SHA-256 of the tar in the commit is what tells.
    """
    known = {}
    members = list_members(io.BytesIO(data), num_bytes=len(data))
    whole = describe(read_samples(data, known)[0])
    assert len(whole) == 2
    outcomes = dict.fromkeys(["refused", "rejected", "other content", "harmless"], 0)
    for at in offsets:
        flipped = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
        member = next((m for m in members if m.offset <= at < m.offset + m.size), None)
        try:
            samples, rejects = read_samples(flipped, known)
        except DamagedTarError:
            assert member is None, f"byte {at} of {member}"
            outcomes["refused"] += 1
            continue
        found = describe(samples)
        if found == whole:
            assert rejects == []
            outcomes["harmless"] += 1
            continue
        assert member is not None, f"byte {at} is in no member's data, yet changed a sample"
        key = member.name.partition(".")[0]
        assert {k: v for k, v in found.items() if k != key} == {
            k: v for k, v in whole.items() if k != key
        }
        if key in found:
            assert member.name.endswith((".jpg", ".json")), f"byte {at} of {member.name}"
            outcomes["other content"] += 1
        else:
            assert [(reject.name, reject.level) for reject in rejects] == [(key, "sample")]
            outcomes["rejected"] += 1
    return outcomes


def test_a_flipped_byte_is_refused_rejected_or_other_content(real_tar):
    outcomes = check_flips(real_tar, range(0, len(real_tar), 7), 0x41)
    assert min(outcomes["refused"], outcomes["rejected"], outcomes["harmless"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_refused_rejected_or_other_content(real_tar, flip):
    check_flips(real_tar, range(len(real_tar)), flip)


def test_a_cut_tar_is_never_a_shorter_one(real_tar):
    members = list_members(io.BytesIO(real_tar), num_bytes=len(real_tar))
    end = members[-1].offset + -(-members[-1].size // 512) * 512 + 1024
    for length in range(0, len(real_tar), 7):
        listed = list_or_none(real_tar[:length])
        assert listed == (members if length >= end else None)


@examples(400)
@given(
    st.lists(st.tuples(st.integers(0), st.integers(0, 700), st.binary(max_size=600)), max_size=4)
)
def test_a_tar_of_spliced_pieces_closes_or_is_refused(real_tar, splices):
    """Pieces cut out, put in or replaced, whole blocks too: what many flips at once may do."""
    data = real_tar
    for at, num_cut, piece in splices:
        at %= len(data) + 1
        data = data[:at] + piece + data[at + num_cut :]
    with contextlib.suppress(DamagedTarError):
        read_samples(data, {})


@examples(400)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=6))
def test_a_tar_of_shuffled_blocks_closes_or_is_refused(real_tar, moves):
    """A block moved or doubled is a header with a right checksum at a wrong place."""
    blocks = [real_tar[at : at + 512] for at in range(0, len(real_tar), 512)]
    for source, target in moves:
        blocks.insert(target % len(blocks), blocks[source % len(blocks)])
    with contextlib.suppress(DamagedTarError):
        read_samples(b"".join(blocks), {})
