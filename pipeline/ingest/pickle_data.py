"""Reads a pickle of plain data, and refuses everything by which a pickle can run code or grow.

RefCOCO's annotations are pickles that Python 2 wrote, and anyone may have put them where they were
found. So the interpreter knows the steps of lists, tuples, dicts, text, numbers and None alone. It
is the one that Python has in Python: that in C makes room for every memo entry up to the largest
that is named, and five bytes can name the 2**32nd.
"""

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 512 * 2**20  # RefCOCO's have some 50 MB
MAX_STEPS = 2**25  # each makes an object of up to 100 bytes; RefCOCO's have some 6e6

_PLAIN = (
    b"(.012NIJKMLFGSTUVXdltasuegphjqr}])"  # protocols 0 and 1: as pickle.MARK, STOP, POP and so on
    b"\x80\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x94\x95"  # 2 to 4: tuples, booleans, text, frames
    b"ciPQ\x93"  # classes, functions and persistent ids: named, so that the error can say which
)
_TUPLES = b"t)\x85\x86\x87"
_DAMAGED = (  # what the interpreter raises for bytes that are no pickle
    *(pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError),
    *(AttributeError, AssertionError, OverflowError, struct.error),
)


class PickleError(ValueError):
    """A pickle is refused, or damaged."""


def load_plain_pickle(path: Path) -> Any:
    """Read a pickle of lists, dicts, text, numbers, booleans and None; tuples become lists.

    Text of Python 2 is UTF-8, or else Windows's 1252. An object may stand in many places, so who
    walks through the result bounds his steps.

    Raises:
        PickleError: something else is in it, it is damaged, or too large.
        OSError: it cannot be read.
    """
    if (num_bytes := path.stat().st_size) > MAX_BYTES:
        raise PickleError(f"{path}: expected at most {MAX_BYTES} bytes, got {num_bytes}")
    try:
        return _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except PickleError as error:
        what = f"{path}: expected a pickle of plain data, got {error}; nothing of it was run"
        raise PickleError(f"{what}. Take the file from its publishers.") from error
    except _DAMAGED as error:
        raise PickleError(f"{path}: is no whole pickle: {type(error).__name__}: {error}") from error


def _make_list(make_tuple: Callable[[Any], None]) -> Callable[[Any], None]:
    """Have a step make a list: hashing a deep tuple, as a dict's key, would exhaust the stack."""

    def step(unpickler: Any) -> None:
        make_tuple(unpickler)
        unpickler.stack[-1] = list(unpickler.stack[-1])

    return step


class _Steps(dict[int, Callable[[Any], None]]):
    """The plain steps, counted as they are asked for."""

    left = MAX_STEPS

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise PickleError(f"more than {MAX_STEPS} steps")
        if code not in self:
            raise PickleError(f"the step {bytes([code])!r}")
        return super().__getitem__(code)


class _PlainUnpickler(pickle._Unpickler):
    """Python's interpreter with the plain steps alone."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        steps = pickle._Unpickler.dispatch
        self.dispatch = _Steps(  # type: ignore[misc]
            {code: _make_list(steps[code]) if code in _TUPLES else steps[code] for code in _PLAIN}
        )

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse a class or function."""
        raise PickleError(f"the class or function {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        """Refuse a persistent id."""
        raise PickleError(f"a persistent id, {pid!r:.40}")

    def _decode_string(self, value: bytes) -> str:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("cp1252", "replace")
