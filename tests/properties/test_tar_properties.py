"""For any tar: read as tarfile reads it, damage never makes it shorter, the accounting closes."""

import io
import tarfile
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.members import group_members
from pipeline.corpus.tar import DamagedTarError, Member, list_members
from tests.support.examples import examples

KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "hardlink",
    tarfile.CHRTYPE: "device",
    tarfile.FIFOTYPE: "fifo",
    tarfile.DIRTYPE: "directory",
}
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]

characters = st.characters(exclude_characters="\0/", exclude_categories=["Cs"])
names = st.lists(st.text(characters, min_size=1, max_size=30), min_size=1, max_size=8).map("/".join)
contents = st.binary(max_size=1100)
entries = st.tuples(names, st.sampled_from(list(KINDS)), contents)

# few keys and roles, so that samples come out whole, doubled, broken up and incomplete
keys = st.sampled_from(["a", "b", "d/a"])
roles = st.sampled_from(["jpg", "png", "json", "mask0.png", "mask1.png", "npy", "jpg/../x"])
layout_members = st.builds(
    lambda key, role, kind: Member(f"{key}.{role}", kind, 512, 1),
    keys,
    roles,
    st.sampled_from(["file"] * 8 + ["symlink", "directory"]),
)


def write_tar(tar_entries, tar_format):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for name, kind, data in tar_entries:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def list_bytes(data):
    return list_members(io.BytesIO(data), num_bytes=len(data))


def list_or_none(data):
    """The members, or None where the tar is refused as damaged."""
    try:
        return list_bytes(data)
    except DamagedTarError:
        return None


@examples(150)
@given(st.lists(entries, max_size=6), st.sampled_from(FORMATS[1:]))
def test_any_members_are_listed_as_written(tar_entries, tar_format):
    data = write_tar(tar_entries, tar_format)
    members = list_bytes(data)
    assert [(m.name.rstrip("/"), m.kind) for m in members] == [
        (name, KINDS[kind]) for name, kind, _ in tar_entries
    ]
    for member, (_, kind, content) in zip(members, tar_entries, strict=True):
        expected = content if kind == tarfile.REGTYPE else b""
        assert data[member.offset : member.offset + member.size] == expected
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.offset, m.size) for m in members] == [(m.offset_data, m.size) for m in tar]


SMALL = [
    ("a.jpg", tarfile.REGTYPE, b"j" * 700),
    ("d/" * 60 + "größe.json", tarfile.REGTYPE, b"{}"),
    ("link", tarfile.SYMTYPE, b""),
    ("a.mask0.png", tarfile.REGTYPE, b"p" * 512),
]
SMALL_TARS = [
    write_tar(SMALL if tar_format != tarfile.USTAR_FORMAT else SMALL[::2], tar_format)
    for tar_format in FORMATS
]


def find_part(data, members, at):
    """Which part of a tar byte ``at`` is in: a member's data, the tail, a header or a long name."""
    if at >= find_end(members):
        return "tail"
    if any(m.offset <= at < m.offset + -(-m.size // 512) * 512 for m in members):
        return "data"
    start = 512 * (at // 512)
    is_header = data[start + 257 : start + 262] == b"ustar"
    return "long name" if not is_header else "checksum" if 148 <= at % 512 < 156 else "header"


def find_end(members):
    return members[-1].offset + -(-members[-1].size // 512) * 512


@examples(1500)
@given(st.integers(0, len(FORMATS) - 1), st.integers(0, 8000), st.integers(1, 255))
def test_a_changed_byte_is_damage_or_harmless(index, at, change):
    """A tar has no checksum over a long name: there, names may change, but nothing else."""
    data = SMALL_TARS[index]
    at %= len(data)
    damaged = bytearray(data)
    damaged[at] ^= change
    members, listed = list_bytes(data), list_or_none(bytes(damaged))
    part = find_part(data, members, at)
    if part in ("header", "tail"):
        assert listed is None
    elif part == "data":
        assert listed == members
    elif part == "checksum":  # a blank for a leading zero or for another blank is the same number
        assert listed in (None, members)
    elif listed is not None:
        assert [(m.kind, m.offset, m.size) for m in listed] == [
            (m.kind, m.offset, m.size) for m in members
        ]


def test_every_cut_is_damage_or_within_the_last_zeros():
    for data in SMALL_TARS:
        members = list_bytes(data)
        end = find_end(members) + 1024
        for length in range(0, len(data), 8):
            assert list_or_none(data[:length]) == (members if length >= end else None)


def test_every_flipped_bit_of_a_header_is_damage():
    data = SMALL_TARS[0]
    for bit in range(512 * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        if not 148 <= bit // 8 < 156:
            assert list_or_none(bytes(damaged)) is None
        else:
            assert list_or_none(bytes(damaged)) in (None, list_bytes(data))


@examples(400)
@given(st.lists(layout_members, max_size=14))
def test_the_accounting_of_any_members_closes(members):
    samples, rejects, _ = group_members(members)
    counted = [member for member in members if member.kind != "directory"]
    stored = sum(len(sample.members) for sample in samples)
    assert stored + sum(reject.num_members for reject in rejects) == len(counted)

    used = Counter()
    for sample in samples:
        used.update([sample.image, sample.text, *sample.masks])
    used.update(reject.name for reject in rejects if reject.level == "member")
    rejected_keys = {reject.name for reject in rejects if reject.level == "sample"}
    assert rejected_keys.isdisjoint(sample.key for sample in samples)
    for member in counted:
        places = used[member] + used[member.name]
        assert places or member.name.rpartition("/")[2].partition(".")[0] in {
            key.rpartition("/")[2] for key in rejected_keys
        }
    assert len({sample.key for sample in samples}) == len(samples)


@examples(200)
@given(st.binary(max_size=1600))
def test_any_bytes_are_refused_or_an_empty_tar(data):
    assert list_or_none(data) in (None, [])
