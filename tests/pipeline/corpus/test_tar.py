"""The strict tar reader: what proper writers write, and every kind of damage."""

import bz2
import gzip
import io
import lzma
import pickle
import shutil
import subprocess
import tarfile

import pytest
import webdataset

from pipeline.corpus.tar import (
    MAX_EMPTY_BYTES,
    MAX_EXTENSION_BYTES,
    MAX_TAIL_BYTES,
    DamagedTarError,
    list_members,
)

END = bytes(1024)


def list_bytes(data):
    return list_members(io.BytesIO(data), num_bytes=len(data))


def make_tar(entries, tar_format=tarfile.USTAR_FORMAT):
    """A tar of (name, data) files or ready TarInfos."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            name, data = entry
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def make_header(name="a.jpg", size=0, typeflag=b"0", **fields):
    """One header block; ``fields`` like at124=b"..." overwrite bytes before the checksum."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, typeflag
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    for at, value in fields.items():
        start = int(at[2:])
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pad(data):
    return data + bytes(-len(data) % 512)


def pax(payload, typeflag=b"x"):
    return make_header("pax", len(payload), typeflag) + pad(payload)


def summarise(members):
    return [(m.name, m.kind, m.offset, m.size) for m in members]


def summarise_tarfile(data):
    kinds = {
        tarfile.REGTYPE: "file",
        tarfile.AREGTYPE: "file",
        tarfile.LNKTYPE: "hardlink",
        tarfile.SYMTYPE: "symlink",
        tarfile.CHRTYPE: "device",
        tarfile.BLKTYPE: "device",
        tarfile.DIRTYPE: "directory",
        tarfile.FIFOTYPE: "fifo",
    }
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m.name, kinds[m.type], m.offset_data, m.size) for m in tar]


def make_info(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "target" * (30 if kind == tarfile.SYMTYPE else 1)
    return info


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_and_long_names_are_listed_as_tarfile_does(tar_format):
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
    entries = [
        ("a.jpg", b"x" * 700),
        ("größe/日本.json", b"{}"),
        ("d/" * 100 + "long.png", b"y" * 512),
        make_info("dir", tarfile.DIRTYPE),
        *(make_info(f"special{kind[0]}", kind) for kind in kinds),
        ("empty", b""),
    ]
    data = make_tar(entries, tar_format)
    listed = [(m.name.rstrip("/"), m.kind, m.offset, m.size) for m in list_bytes(data)]
    assert listed == summarise_tarfile(data)
    assert len(listed) == len(entries)


def test_ustar_prefix_is_joined():
    data = make_tar([("d" * 80 + "/" + "e" * 60 + "/f.jpg", b"x")])
    assert summarise(list_bytes(data)) == summarise_tarfile(data)


def test_webdataset_writer():
    out = io.BytesIO()
    with webdataset.TarWriter(out) as writer:
        writer.write({"__key__": "a/b", "jpg": b"j" * 999, "mask0.png": b"m", "json": {"x": 1}})
    assert summarise(list_bytes(out.getvalue())) == summarise_tarfile(out.getvalue())


@pytest.fixture
def gnu_tar(tmp_path):
    """Runs GNU tar on a folder of a sample, a link and a long name; returns what it wrote."""
    if shutil.which("tar") is None:
        pytest.skip("no tar program")
    version = subprocess.run(["tar", "--version"], capture_output=True, text=True, check=True)
    if "GNU tar" not in version.stdout:
        pytest.skip("tar is not GNU tar")
    folder = tmp_path / "d"
    (folder / ("m" * 70)).mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"a" * 1000)
    (folder / "link").symlink_to("a.jpg")
    (folder / ("m" * 70) / ("n" * 60 + ".json")).write_bytes(b"{}")

    def run(*options, name="d"):
        command = ["tar", "-c", *options, name]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout

    return run


@pytest.mark.parametrize("tar_format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_gnu_tar(gnu_tar, tar_format):
    leave_out = ["--exclude", "m*"] if tar_format == "v7" else []
    data = gnu_tar(f"--format={tar_format}", *leave_out)
    listed = [(m.name.rstrip("/"), m.kind, m.offset, m.size) for m in list_bytes(data)]
    assert listed == summarise_tarfile(data)
    assert ("d/link", "symlink") in [(name, kind) for name, kind, _, _ in listed]


@pytest.mark.parametrize("tar_format", ["oldgnu", "gnu", "posix"])
@pytest.mark.parametrize(
    "options",
    [
        ["--label=a volume"],
        ["--incremental"],
        ["--label=a volume", "--incremental", "--blocking-factor=4096"],
        ["--blocking-factor=2048"],
        ["--blocking-factor=10000"],
        ["--blocking-factor=4096", "--sort=name"],
        ["--xattrs", "--acls", "--selinux", "--sparse"],
    ],
    ids=" ".join,
)
def test_what_else_gnu_tar_writes_holds_the_same_members(gnu_tar, tar_format, options):
    """Also a list of names that takes more than a header of 64 KiB has room for."""
    plain = list_bytes(gnu_tar(f"--format={tar_format}"))
    listed = list_bytes(gnu_tar(f"--format={tar_format}", *options))
    assert sorted((m.name, m.kind) for m in listed) == sorted((m.name, m.kind) for m in plain)


def test_an_incremental_tar_of_many_files(gnu_tar, tmp_path):
    """The names of its folder are one header, here of 200 KB."""
    many = tmp_path / "many"
    many.mkdir()
    for i in range(2000):
        (many / f"{i:0100}.json").write_bytes(b"")
    for tar_format in ("gnu", "posix"):
        data = gnu_tar(f"--format={tar_format}", "--incremental", name="many")
        assert [m.kind for m in list_bytes(data)] == ["directory"] + ["file"] * 2000


def test_a_volume_of_several_is_refused():
    with pytest.raises(DamagedTarError, match=r"got one volume of several\. Join the volumes"):
        list_bytes(make_header("label", typeflag=b"V") + make_header(typeflag=b"M") + END)


def test_base_256_size_and_pax_size():
    base_256 = make_header(at124=b"\x80" + (3).to_bytes(11)) + pad(b"abc")
    by_pax = pax(b"10 size=4\n") + make_header("b.jpg", 99) + pad(b"abcd")
    members = list_bytes(base_256 + by_pax + END)
    assert summarise(members) == [("a.jpg", "file", 512, 3), ("b.jpg", "file", 2560, 4)]


def test_a_name_that_is_not_utf8_stays_visible():
    (member,) = list_bytes(make_header(at0=b"\xff\xfe.jpg") + END)
    assert member.name == "\udcff\udcfe.jpg"


def test_long_names_keep_an_inner_nul():
    long_name = make_header("././@LongLink", 6, b"L") + pad(b"a\0b.c\0")
    (member,) = list_bytes(long_name + make_header() + END)
    assert member.name == "a\0b.c"


def test_version_7_marks_a_directory_by_its_name_but_only_without_data():
    data = make_header("d/", at257=bytes(8)) + make_header("e/", 1) + pad(b"x")
    assert [m.kind for m in list_bytes(data + END)] == ["directory", "file"]


def test_an_empty_archive_has_no_members_and_an_empty_file_is_damaged():
    assert list_bytes(END) == []
    assert list_bytes(bytes(MAX_EMPTY_BYTES)) == []
    with pytest.raises(DamagedTarError, match="byte 0: expected a tar, got an empty file"):
        list_bytes(b"")


@pytest.mark.parametrize("num_bytes", [MAX_EMPTY_BYTES + 512, 100_000, 5_000_000])
def test_a_file_that_was_given_its_size_and_no_content_is_no_empty_tar(num_bytes):
    with pytest.raises(
        DamagedTarError, match=rf"a tar, got {num_bytes} bytes of zeros\. The downl"
    ):
        list_bytes(bytes(num_bytes))


def test_long_zeros_are_taken_after_a_whole_member_and_not_where_a_download_stopped():
    """Both files have their right size; of the second the first MB came."""
    photos = [(f"{i}.jpg", b"\xff\xd8" + bytes(i) * 300_000 + b"\xff\xd9") for i in range(1, 9)]
    data = make_tar(photos)
    padded = data + bytes(MAX_TAIL_BYTES)
    assert list_bytes(padded) == list_bytes(data)
    stopped = data[:1_000_000] + bytes(len(data) - 1_000_000)
    with pytest.raises(DamagedTarError, match=r"expected at most 1048576 bytes of zeros after da"):
        list_bytes(stopped)
    tail = bytes(MAX_TAIL_BYTES)
    assert len(list_bytes(make_tar([*photos, make_info("d", tarfile.DIRTYPE)]) + tail)) == 9
    assert len(list_bytes(make_tar([*photos, ("empty", b"")]) + tail)) == 9


def test_a_file_called_like_a_magic_is_not_taken_for_compressed():
    assert [m.name for m in list_bytes(make_tar([("BZh.jpg", b"x")]))] == ["BZh.jpg"]


TAR = make_tar([("a", b"x")])


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (gzip.compress(TAR), "gzip"),
        (bz2.compress(TAR), "bzip2"),
        (lzma.compress(TAR), "xz"),
        (lzma.compress(TAR, lzma.FORMAT_ALONE), "lzma"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd"),
        (b"\x04\x22\x4d\x18" + bytes(600), "lz4"),
    ],
    ids=["gzip", "bzip2", "xz", "lzma", "zstd", "lz4"],
)
def test_compressed_tars_are_refused(data, name):
    with pytest.raises(DamagedTarError, match=rf"got {name} data\. Decompress"):
        list_bytes(data)


HEADER = make_header(size=3) + pad(b"abc")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0not a tar" * 200, "byte 0: expected a header with the checksum"),
        (HEADER, r"byte 1024: expected 512 bytes of a header or an end block, got the file's end"),
        (HEADER + END[:512], "byte 1024: expected two end blocks, got the file's end at 1536"),
        (HEADER + END[:512] + HEADER + END, "byte 1536: expected zeros after the tar's end"),
        (HEADER + END + HEADER + END, r"byte 2048: expected zeros.* got b'a\.jpg.*tar -A"),
        (HEADER + END + bytes(5000) + b"!", "byte 7048: expected zeros after the tar's end"),
        (make_header(size=3) + bytes(MAX_TAIL_BYTES + 513), "byte 515: expected at most 1048576"),
        (make_header(size=4096) + END, "byte 0: expected data within .* 1536 bytes, got .* 4608"),
        (make_header(at124=b"\xff" * 12) + END, "size of 0 or more, got -1 bytes"),
        (make_header(at124=b"\x80" + b"\x3f" * 11) + END, "expected data within"),
        (make_header(at124=b"\xbf" + b"\xff" * 11) + END, "expected data within"),
        (make_header(at124=b"-0000000001\0") + END, "expected a size in octal or base-256, got"),
        (make_header(at124=b"00000000009\0") + END, "expected a size in octal or base-256, got"),
        (make_header(at124=bytes(12)) + END, "expected a size in octal or base-256, got"),
        (make_header(at257=b"newtar") + END, "expected the magic 'ustar' or none, got b'newtar'"),
        (make_header(typeflag=b"S") + END, "expected a member stored whole, got a sparse one"),
        (make_header(typeflag=b"M") + END, "expected a whole tar, got one volume of several"),
        (make_header(at124=b"00000001000\0", at156=b"2") + END, "expected a symlink without data"),
        (make_header(at124=b"00000001000\0", at156=b"5") + END, "expected a directory without"),
        (pax(b"22 GNU.sparse.major=1\n") + HEADER + END, "got a sparse one"),
        (pax(b"36 size=999999999999999999999999999\n") + HEADER + END, "at most 19 digits"),
        (pax(b"28 size=9999999999999999999\n") + HEADER + END, "expected data within"),
        (pax(b"10 size=3\n") * 2 + HEADER + END, "one size of at most 19 digits"),
        (pax(b"11 size=-5\n") + HEADER + END, "at most 19 digits"),
        (pax(b"99 path=a\n") + HEADER + END, "byte 512: expected a PAX record"),
        (pax(b"2 path=a\n") + HEADER + END, "expected a PAX record"),
        (pax(b"path=a\n") + HEADER + END, "expected a PAX record"),
        (pax(b"9 path=ab") + HEADER + END, "expected a PAX record"),
        (pax(b"10 path=a\n", b"g") + HEADER + END, "no path or size in a global header"),
        (pax(b"10 path=a\n") * 2 + HEADER + END, "one long name for a member, got a second"),
        (HEADER + pax(b"10 path=a\n") + END, "expected the member an extension header announced"),
        (pax(bytes(MAX_EXTENSION_BYTES + 1)) + HEADER + END, "at most 1048576 bytes, got 1048577"),
        (make_header(size=1 << 32, typeflag=b"L") + END, "at most 1048576 bytes, got 4294967296"),
        (make_header(size=5000, typeflag=b"L") + END, "5000 bytes of an extension header"),
    ],
)
def test_damage_is_an_error_that_says_where_and_what(data, message):
    with pytest.raises(DamagedTarError, match=message):
        list_bytes(data)


def test_a_global_header_of_comments_is_no_member():
    data = pax(b"13 comment=x\n", b"g") + HEADER + END
    assert [m.name for m in list_bytes(data)] == ["a.jpg"]


def test_a_file_shorter_than_said_is_damaged():
    with pytest.raises(DamagedTarError, match=r"byte 0: .* got only 100"):
        list_members(io.BytesIO(HEADER[:100]), num_bytes=4096)


def test_damage_in_the_padding_after_data_is_harmless():
    data = bytearray(HEADER + END)
    data[1000] = 1
    assert list_bytes(bytes(data)) == list_bytes(HEADER + END)


class _ShortReads(io.BytesIO):
    """Answers with at most 100 bytes a read, as a remote file may, and counts them."""

    num_read = 0

    def read(self, size=-1):
        piece = super().read(min(size, 100))
        self.num_read += len(piece)
        return piece


def test_short_reads_are_completed_and_data_is_not_read():
    data = HEADER + make_header("b.jpg", 1 << 20) + bytes(1 << 20) + END
    file = _ShortReads(data)
    assert list_members(file, num_bytes=len(data)) == list_bytes(data)
    assert file.num_read < 5000


def test_the_error_survives_pickling_with_its_fields():
    error = pickle.loads(pickle.dumps(DamagedTarError(7, "x", "y")))
    assert (error.offset, error.expected, error.got) == (7, "x", "y")
    assert (
        str(error)
        == "tar at byte 7: expected x, got y. Copy or write this tar again from its source."
    )
