"""Plain pickles are read, of Python 2 as well; whatever else is in one is refused and never run."""

import base64
import contextlib
import copyreg
import io
import json
import pickle
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingest import pickle_data
from pipeline.ingest.pickle_data import PickleError, load_plain_pickle

PYTHON_2 = json.loads(Path(__file__).with_name("python2_pickles.json").read_text(encoding="ascii"))
RUN = []  # what a hostile pickle would have called


def run(*args):
    RUN.append(args)
    return [*args]


class Hostile:
    """Asks to be made by a call, as an attack does."""

    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


class WithState:
    def __setstate__(self, state):
        RUN.append(state)


class WithIds(pickle.Pickler):
    def persistent_id(self, value):
        return "an id" if value == "here" else None


def dump_with_id(protocol):
    file = io.BytesIO()
    WithIds(file, protocol).dump(["here"])
    return file.getvalue()


def load(tmp_path, data):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(data)
    return load_plain_pickle(path)


@pytest.mark.parametrize("data", PYTHON_2)
def test_python_2s_pickles_are_read_whatever_their_text_is_encoded_in(tmp_path, data):
    (ref,) = load(tmp_path, base64.b64decode(data))
    first, second = ref.pop("sentences")
    assert ref == {
        "ref_id": 1,
        "ann_id": 10,
        "image_id": 2**33,
        "split": "val",
        "area": 1.5,
        "flags": [True, None],
    }
    assert first == {"sent_id": 0, "raw": 'café "left"', "sent": "café left", "tokens": []}
    assert second["raw"] == "the kid’s hat"
    assert second["tokens"] == ["kids", "hat"]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(plain, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_comes_back_as_it_was(tmp_path_factory, value, protocol):
    assert load(tmp_path_factory.mktemp("p"), pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_tuples_are_lists(tmp_path, protocol):
    data = pickle.dumps([(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, (4,))], protocol)
    assert load(tmp_path, data) == [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, [4]]]


def list_hostile():
    system = "touch ran"
    by_call = [
        Hostile(exec, "open('ran', 'w')"),
        Hostile(run, 1),
        [{"sentences": [{"sent": Hostile(run, 2)}]}],
        {"key": ({1: Hostile(eval, "run(3)")},)},
        Hostile(getattr, WithState(), "__setstate__"),
        WithState(),
        {1, 2},
        frozenset([1]),
        b"bytes",
        bytearray(b"bytes"),
        complex(1, 2),
        range(3),
        int,
    ]
    for value in by_call:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            yield pickle.dumps(value, protocol)
    yield from map(dump_with_id, range(pickle.HIGHEST_PROTOCOL + 1))
    yield b"cos\nsystem\n(S'%s'\ntR." % system.encode()
    yield b"(S'%s'\nios\nsystem\n." % system.encode()  # INST
    yield b"(cos\nsystem\nS'%s'\no." % system.encode()  # OBJ
    yield b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R."  # STACK_GLOBAL
    yield b"]cos\nsystem\n(S'touch ran'\ntR0."  # run, and thrown away
    yield b"\x80\x02]\x81."  # NEWOBJ of plain data, and so on
    yield b"\x80\x04]}}\x92."
    yield b"](tR."
    yield b"]}b."
    for step in (b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"):  # copyreg's extensions
        yield b"\x80\x02" + step + b"K\x01\x85R."
    yield b"\x80\x05\x97."  # a buffer
    yield b"Pos.system\n."


@pytest.mark.parametrize("data", list(list_hostile()))
def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(copyreg, "_extension_cache", {0xF0: run})  # found without a class's name
    RUN.clear()
    with pytest.raises(PickleError, match=r"expected a pickle of plain data, got .*nothing of it"):
        load(tmp_path, data)
    assert not RUN
    assert not (tmp_path / "ran").exists()


def test_the_error_names_what_was_asked_for(tmp_path):
    with pytest.raises(PickleError, match=r"refs\(unc\)\.p.* the class or function os\.system"):
        load(tmp_path, b"cos\nsystem\n(S'true'\ntR.")


@pytest.mark.parametrize(
    "data",
    [
        b"]r\xff\xff\xff\x7f.",  # LONG_BINPUT: the interpreter in C takes 34 GB
        b"]r\xff\xff\xff\xff.",
        b"]p4294967295\n.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"short",  # BINUNICODE8
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"short",  # FRAME
        b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"short",  # LONG4
        b"I" + b"9" * 100_000 + b"\n.",
        b"}" + b")" + b"\x85" * 10_000 + b"Ns.",  # a key that the stack is too small to hash
        b"})" + b"2\x86" * 60 + b"Ns.",  # a key with 2**60 parts
        b"]" + b"(h\x00h\x00l".join([b"q\x00"] * 60) + b".",  # a list of twice the last: 2**60
    ],
)
def test_a_small_pickle_takes_little_memory(tmp_path, data):
    tracemalloc.start()
    with contextlib.suppress(PickleError):
        load(tmp_path, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_a_pickle_of_too_many_objects_or_bytes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_data._Steps, "left", 1000)
    assert load(tmp_path, b"(" + b"}" * 900 + b"l.") == [{}] * 900
    with pytest.raises(PickleError, match="steps"):
        load(tmp_path, b"(" + b"}" * 1000 + b"l.")
    monkeypatch.setattr(pickle_data, "MAX_BYTES", 900)
    with pytest.raises(PickleError, match="at most 900 bytes, got 903"):
        load(tmp_path, b"(" + b"}" * 900 + b"l.")


@pytest.mark.parametrize("data", PYTHON_2[::2])
def test_a_pickle_cut_short_anywhere_is_damaged(tmp_path, data):
    whole = base64.b64decode(data)
    for end in range(len(whole)):
        with pytest.raises(PickleError, match="is no whole pickle"):
            load(tmp_path, whole[:end])


@given(st.binary(max_size=60))
def test_any_bytes_are_plain_data_or_an_error(tmp_path_factory, data):
    try:
        found = load(tmp_path_factory.mktemp("p"), data)
    except PickleError:
        return
    assert isinstance(found, list | tuple | dict | str | int | float | None)
