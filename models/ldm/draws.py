"""Random numbers that follow from what they are for, not from the process that draws them.

Every draw comes from Philox keyed by SHA-256 over (purpose, seed, key, view, draw). Philox's raw
64-bit stream is stable across NumPy versions (NEP 19). Imports no torch, for decode workers.
"""

import hashlib

import numpy as np


def open_stream(purpose: str, *, seed: int, key: str, view: int, draw: int) -> np.random.Philox:
    """Return the raw 64-bit stream of one draw of one view."""
    text = "\0".join(("ldznet", purpose, str(seed), key, str(view), str(draw)))
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def draw_integer(
    low: int, high: int, *, purpose: str, seed: int, key: str, view: int, draw: int
) -> int:
    """Return one integer uniform in [low, high) for one draw of one view.

    The 64-bit remainder's bias is below 1e-15 for any range used here.
    """
    raw = open_stream(purpose, seed=seed, key=key, view=view, draw=draw).random_raw(1)
    return low + int(raw[0]) % (high - low)
