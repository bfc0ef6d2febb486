"""ICC profiles of our own, as small as the specification (ICC.1:2001-04) allows.

RGB and grey profiles are a gamma and, for RGB, the primaries; a CMYK profile is a table of the 16
corners, read as Lab.
"""

import itertools
import struct

# XYZ of red, green and blue relative to D50, a row each.
SRGB_PRIMARIES = (
    (0.43607, 0.22249, 0.01392),
    (0.38515, 0.71687, 0.09708),
    (0.14307, 0.06061, 0.7141),
)
WIDE_PRIMARIES = (
    (0.60974, 0.31111, 0.01947),
    (0.20528, 0.62567, 0.06087),
    (0.14919, 0.06322, 0.74457),
)
_D50 = (0.9642, 1.0, 0.8249)


def make_profile(space="RGB ", *, gamma=2.2, primaries=WIDE_PRIMARIES, name="wide", kind="mntr"):
    """The bytes of a profile of a colour space as the header spells it."""
    tags = {"desc": _desc(name), "cprt": b"text\0\0\0\0none\0", "wtpt": _xyz(_D50)}
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    if space == "RGB ":
        tags |= {f"{c}XYZ": _xyz(xyz) for c, xyz in zip("rgb", primaries, strict=True)}
        tags |= {f"{c}TRC": curve for c in "rgb"}
    elif space == "GRAY":
        tags["kTRC"] = curve
    elif space == "CMYK":
        tags["A2B0"] = _table()
    body, table = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag.encode() + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    pcs = "Lab " if space == "CMYK" else "XYZ "
    head = struct.pack(">I4sI", size, b"none", 0x02400000)
    head += f"{kind}{space}{pcs}".encode() + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3i", *(round(x * 65536) for x in _D50)) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


def _desc(name):
    text = name.encode("latin-1") + b"\0"
    return b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(8 + 3 + 67)


def _xyz(values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(x * 65536) for x in values))


def _table():
    """An 8-bit table: no lightness with full black, and less with each other ink; no colour."""
    ramp = bytes(range(256))
    corners = itertools.product((0, 1), repeat=4)
    lights = [0 if k else 255 - 60 * (c + m + y) for c, m, y, k in corners]
    clut = b"".join(bytes((light, 128, 128)) for light in lights)
    head = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0))
    head += struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    return head + ramp * 4 + clut + ramp * 3
