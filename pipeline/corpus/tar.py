"""Lists a tar's members, strictly: all of them, or an error that says where the tar is damaged.

``tarfile`` and ``webdataset`` read a tar with a flipped header byte, or one cut short, as a shorter
tar without an error. Here every header's checksum, every size and the archive's end are checked.
No data is read: a listing costs one read of 512 bytes a member.

Damage is whatever changes or could hide a member, and anything but zeros after the end, of which
some may be missing. Data and the names in extension headers have no checksum in a tar. The layouts
are ustar, GNU and PAX, as described in POSIX.1-2008 "pax" and in GNU tar's ``tar.h``. A volume's
label and the list of names that an incremental tar keeps of a folder are no members.
"""

import re
from dataclasses import dataclass
from typing import BinaryIO, Literal

from pipeline.corpus.other_files import describe_other_file

Kind = Literal["file", "symlink", "hardlink", "device", "fifo", "directory", "other"]

BLOCK_BYTES = 512
MAX_EXTENSION_BYTES = 1024 * 1024
"""Of a GNU long name, below 4 KiB, or a PAX header: a folder's names, a file's attributes."""
MAX_EMPTY_BYTES = 10 * 1024  # of a tar without members: tar's usual record
MAX_TAIL_BYTES = 1024 * 1024
"""Of zeros after a member that ends in zeros. Writers pad to 10 KiB, or to ``tar -b``'s records."""

_KINDS: dict[bytes, Kind] = {
    **dict.fromkeys((b"0", b"\0", b"7"), "file"),
    b"1": "hardlink",
    b"2": "symlink",
    b"3": "device",
    b"4": "device",
    b"5": "directory",
    b"6": "fifo",
    b"D": "directory",  # GNU's of an incremental tar, with names as its data
}
_WITHOUT_DATA = b"123456"
_MAGICS = (b"ustar\0", b"ustar ", b"\0\0\0\0\0\0")  # POSIX, GNU, and none (version 7)
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,6}) ")
_PAX_SIZE = re.compile(rb"[0-9]{1,19}")
_WRITE_AGAIN = "Copy or write this tar again from its source."


class DamagedTarError(ValueError):
    """A tar with damaged framing, for which the whole task fails.

    ``offset`` is the byte at which the damage was found, ``advice`` says what to do.
    """

    def __init__(self, offset: int, expected: str, got: str, advice: str = _WRITE_AGAIN) -> None:
        super().__init__(offset, expected, got, advice)  # all four, so that it survives pickling
        self.offset, self.expected, self.got, self.advice = offset, expected, got, advice

    def __str__(self) -> str:
        return f"tar at byte {self.offset}: expected {self.expected}, got {self.got}. {self.advice}"


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a tar.

    ``name``: bytes that are not UTF-8 are lone surrogates (surrogateescape). ``offset``: the byte
    at which its ``size`` bytes of data start.
    """

    name: str
    kind: Kind
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class _Header:
    name: bytes
    typeflag: bytes
    size: int


@dataclass(slots=True)
class _Pending:
    """What extension headers (GNU L and K, PAX x) say of the next member."""

    seen: bool = False
    name: bytes | None = None
    size: int | None = None


def list_members(file: BinaryIO, *, num_bytes: int) -> list[Member]:
    """List all members, directories and links included, of a seekable tar of ``num_bytes``.

    Raises:
        DamagedTarError: the file is no tar, a compressed, sparse or multi-volume one, or damaged.
            It says what the file is, where that is known.
        OSError: raised by ``file``.
    """
    _check_is_tar(file, num_bytes)
    members: list[Member] = []
    pending = _Pending()
    offset = 0
    while (header := _read_header(file, offset, num_bytes)) is not None:
        if header.typeflag in (b"L", b"K", b"x", b"X", b"g"):
            size = header.size
            _read_extension(file, header, offset, num_bytes, pending)
        elif header.typeflag == b"V":  # GNU's label of a volume: a name
            size = header.size
        else:
            members.append(_build_member(header, pending, offset, num_bytes))
            size = members[-1].size
            pending = _Pending()
        offset += BLOCK_BYTES + -(-size // BLOCK_BYTES) * BLOCK_BYTES
    if pending.seen:
        raise DamagedTarError(offset, "the member an extension header announced", "the tar's end")
    _check_tail(file, offset, num_bytes)
    if offset == 0 and num_bytes > MAX_EMPTY_BYTES:
        got = f"{num_bytes} bytes of zeros"
        raise DamagedTarError(
            0, "a tar", got, f"The download stopped before its start. {_WRITE_AGAIN}"
        )
    if num_bytes - offset > MAX_TAIL_BYTES and members:
        _check_last(file, members[-1], num_bytes)
    return members


def _check_is_tar(file: BinaryIO, num_bytes: int) -> None:
    if num_bytes <= 0:
        raise DamagedTarError(0, "a tar", "an empty file")
    file.seek(0)
    head = file.read(BLOCK_BYTES)
    if len(head) == BLOCK_BYTES and _checksum(head) == _parse_octal(head[148:156]):
        return  # before the magics: a member may well be called "BZh.jpg"
    if (found := describe_other_file(head)) is not None:
        raise DamagedTarError(0, "a tar", *found)


def _read_at(file: BinaryIO, offset: int, size: int, num_bytes: int, what: str) -> bytes:
    if offset + size > num_bytes:
        raise DamagedTarError(offset, f"{size} bytes of {what}", f"the file's end at {num_bytes}")
    file.seek(offset)
    data = b""
    while len(data) < size:  # a raw or remote file may give less than asked
        piece = file.read(size - len(data))
        if not piece:
            raise DamagedTarError(offset, f"{size} bytes of {what}", f"only {len(data)}")
        data += piece
    return data


def _checksum(block: bytes) -> int:
    return sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _parse_octal(field: bytes) -> int | None:
    match = _OCTAL.fullmatch(field)
    return int(match[1], 8) if match else None


def _read_header(file: BinaryIO, offset: int, num_bytes: int) -> _Header | None:
    """Return the checked header at ``offset``, None for an end block."""
    block = _read_at(file, offset, BLOCK_BYTES, num_bytes, "a header or an end block")
    if not any(block):
        return None
    stored = _parse_octal(block[148:156])
    if stored != _checksum(block):
        got = repr(block[148:156]) if stored is None else str(stored)
        raise DamagedTarError(offset, f"a header with the checksum {_checksum(block)}", got)
    magic = block[257:263]
    if magic not in _MAGICS:
        raise DamagedTarError(offset, "the magic 'ustar' or none", repr(magic))
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if magic == b"ustar\0" else b""
    typeflag, size = block[156:157], block[124:136]
    return _Header(
        name=prefix + b"/" + name if prefix else name,
        typeflag=typeflag,
        size=0 if typeflag == b"V" and not any(size) else _parse_size(size, offset),
    )


def _parse_size(field: bytes, offset: int) -> int:
    """Parse octal digits, or GNU's base-256: the top bit, then a two's complement number."""
    if field[0] & 0x80:
        size = int.from_bytes(field) & ((1 << 95) - 1)
        if field[0] & 0x40:
            raise DamagedTarError(offset, "a size of 0 or more", f"{size - (1 << 95)} bytes")
        return size
    octal = _parse_octal(field)
    if octal is None:
        raise DamagedTarError(offset, "a size in octal or base-256", repr(field))
    return octal


def _read_extension(
    file: BinaryIO, header: _Header, offset: int, num_bytes: int, pending: _Pending
) -> None:
    """Read the extension header at ``offset`` into ``pending``."""
    if header.size > MAX_EXTENSION_BYTES:
        expected = f"an extension header of at most {MAX_EXTENSION_BYTES} bytes"
        raise DamagedTarError(offset, expected, f"{header.size} bytes")
    data_offset = offset + BLOCK_BYTES
    payload = _read_at(file, data_offset, header.size, num_bytes, "an extension header")
    if header.typeflag == b"g":
        records = _parse_pax(payload, data_offset)
        if b"path" in records or b"size" in records:
            # readers differ on whether these hold for one member, all, or none
            raise DamagedTarError(data_offset, "no path or size in a global header", "one")
        return
    pending.seen = True
    if header.typeflag == b"L":
        _set_name(pending, payload.rstrip(b"\0"), data_offset)
    elif header.typeflag != b"K":
        _read_pax(payload, data_offset, pending)


def _read_pax(payload: bytes, offset: int, pending: _Pending) -> None:
    records = _parse_pax(payload, offset)
    if any(keyword.startswith(b"GNU.sparse.") for keyword in records):
        raise _sparse_error(offset)
    if (path := records.get(b"path")) is not None:
        _set_name(pending, path, offset)
    if (size := records.get(b"size")) is not None:
        if pending.size is not None or not _PAX_SIZE.fullmatch(size):
            raise DamagedTarError(offset, "one size of at most 19 digits", repr(size[:40]))
        pending.size = int(size)


def _parse_pax(payload: bytes, offset: int) -> dict[bytes, bytes]:
    """Parse PAX records, each "LENGTH KEYWORD=VALUE\\n"; the last of a keyword wins."""
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(payload):
        match = _PAX_LENGTH.match(payload, start)
        end = start + int(match[1]) if match else start
        keyword, equals, value = payload[match.end() if match else start : end].partition(b"=")
        if not (match and keyword and equals and value.endswith(b"\n")) or end > len(payload):
            got = repr(payload[start : start + 40])
            raise DamagedTarError(offset + start, "a PAX record 'LENGTH KEYWORD=VALUE'", got)
        records[keyword] = value[:-1]
        start = end
    return records


def _set_name(pending: _Pending, name: bytes, offset: int) -> None:
    if pending.name is not None:  # readers differ on which of the two holds
        raise DamagedTarError(offset, "one long name for a member", "a second one")
    pending.name = name


def _build_member(header: _Header, pending: _Pending, offset: int, num_bytes: int) -> Member:
    if header.typeflag == b"S":
        raise _sparse_error(offset)
    if header.typeflag == b"M":
        advice = "Join the volumes and write the tar again."
        raise DamagedTarError(offset, "a whole tar", "one volume of several", advice)
    name = header.name if pending.name is None else pending.name
    size = header.size if pending.size is None else pending.size
    kind = _KINDS.get(header.typeflag, "other")
    if kind == "file" and name.endswith(b"/") and size == 0:
        kind = "directory"  # how version 7, which had no type for it, marks one
    if header.typeflag in _WITHOUT_DATA and size != 0:  # readers differ on whether data follows
        raise DamagedTarError(offset, f"a {kind} without data", f"{size} bytes")
    data_offset = offset + BLOCK_BYTES
    if data_offset + size > num_bytes:
        got = f"data up to byte {data_offset + size}"
        raise DamagedTarError(offset, f"data within the file's {num_bytes} bytes", got)
    return Member(name.decode("utf-8", "surrogateescape"), kind, data_offset, size)


def _sparse_error(offset: int) -> DamagedTarError:
    advice = "Write the tar again without --sparse."
    return DamagedTarError(offset, "a member stored whole", "a sparse one", advice)


def _check_tail(file: BinaryIO, offset: int, num_bytes: int) -> None:
    """Check for two end blocks at ``offset``, then only zeros up to the file's end."""
    if num_bytes - offset < 2 * BLOCK_BYTES:
        raise DamagedTarError(offset, "two end blocks", f"the file's end at {num_bytes}")
    while offset < num_bytes:
        size = min(64 * 1024, num_bytes - offset)
        piece = _read_at(file, offset, size, num_bytes, "the zeros after the last member")
        if data := piece.lstrip(b"\0"):
            at = offset + size - len(data)
            advice = "If tars were joined with cat, keep them apart or join them with tar -A."
            raise DamagedTarError(at, "zeros after the tar's end", repr(data[:8]), advice)
        offset += size


def _check_last(file: BinaryIO, member: Member, num_bytes: int) -> None:
    """Refuse long zeros after a last member that ends in zeros itself.

    So ends a file that was given its size before its download, which then stopped within a member.
    A whole member, which pictures and texts end without zeros, stands before the zeros of a tar
    that was written in large records.
    """
    size = min(member.size, 16)
    end = member.offset + member.size
    if size and not any(_read_at(file, end - size, size, num_bytes, "data")):
        expected = f"at most {MAX_TAIL_BYTES} bytes of zeros after data that end in zeros"
        advice = f"The download may have stopped before its end. {_WRITE_AGAIN}"
        raise DamagedTarError(end, expected, f"{num_bytes - end}", advice)
