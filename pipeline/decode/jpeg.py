"""Counts a JPEG's scans as a decoder comes to them, without decoding.

Markers are walked up to the picture's own end. What a phone or an editor appends (a film, a gain
map, a second picture) is not looked at, nor is a thumbnail within a segment: both are full of bytes
that look like markers.
"""

import re

# ITU-T T.81, table B.1: the markers that a length follows, and EOI. Others are not looked for:
# FF 00 is a byte FF of the pixels, RST0 to RST7 stand among them, and FF before a marker fills.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
_END, _SCAN = b"\xd9", b"\xda"


def count_scans(data: bytes) -> int:
    """Return the number of scans from the start of a JPEG to its end marker, or to the data's."""
    num_scans, at = 0, 2
    while (found := _MARKER.search(data, at)) and found[1] != _END:
        num_scans += found[1] == _SCAN
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    return num_scans
