"""Lanes: what overlaps, what order holds, and how an encoding that fails or is given up ends."""

import threading
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pipeline.stage.device import Device
from pipeline.stage.lanes import Lanes, StageClosedError
from pipeline.stage.stored_form import store_float16

CPU = Device(torch.device("cpu"))
STEPS = ("fetch", "read", "compute", "write", "commit")


@dataclass
class Numbers:
    """A batch: some numbers, doubled on the device."""

    values: list[float]
    stage: str = "unet"
    num_bytes: int = 8


class Doubling:
    """An encoding that doubles numbers; it notes its steps, and can wait or fail at any of them."""

    read_stage = "decode"

    def __init__(self, name, notes, *, num_batches=3, fail=None, gates=None):
        self.name, self.notes, self.num_batches = name, notes, num_batches
        self.fail, self.gates = fail, gates or {}
        self.written = []
        self.num_abandoned = 0

    def note(self, step):
        self.notes.append((self.name, step))
        if step in self.gates:
            assert self.gates[step].wait(20), f"{self.name} waited at {step} for ever"
        if step == self.fail:
            raise ValueError(f"{self.name} failed at {step}")

    def fetch(self):
        self.note("fetch")

    def read(self):
        for number in range(self.num_batches):
            self.note("read")
            yield Numbers([float(number)])

    def compute(self, batch):
        self.note("compute")
        yield CPU.run(lambda: store_float16("x", torch.tensor(batch.values) * 2))

    def write(self, batch, results):
        self.note("write")
        self.written += [float(x) for result in results for x in result["x"]]

    def commit(self):
        self.note("commit")
        return self.written

    def abandon(self):
        self.num_abandoned += 1


class Ends:
    """Collects what becomes of encodings."""

    def __init__(self):
        self.came = {}
        self.changed = threading.Condition()

    def __call__(self, entry):
        with self.changed:
            self.came[entry.encoding.name] = entry
            self.changed.notify_all()

    def wait(self, *names):
        with self.changed:
            assert self.changed.wait_for(lambda: set(names) <= set(self.came), 20), self.came
        return [self.came[name] for name in names]


def open_lanes(max_bytes=64):
    return Lanes(("latents", "features"), max_bytes=max_bytes, on_progress=lambda step: None)


def test_an_encoding_passes_its_steps_in_order_and_its_time_is_booked():
    lanes, notes, ends = open_lanes(), [], Ends()
    encoding = Doubling("a", notes)
    assert lanes.submit("latents", encoding, ends)
    (entry,) = ends.wait("a")
    assert entry.result == [0.0, 2.0, 4.0]
    assert entry.error is None
    assert Counter(step for _, step in notes) == {
        "fetch": 1, "read": 3, "compute": 3, "write": 3, "commit": 1,
    }  # fmt: skip
    assert notes[0] == ("a", "fetch")
    assert notes[-1] == ("a", "commit")
    assert {"fetch", "decode", "unet", "write", "commit"} == set(entry.busy_s)
    assert encoding.num_abandoned == 1


def test_the_next_encoding_is_fetched_read_and_computed_while_one_is_committed():
    lanes, notes, ends = open_lanes(), [], Ends()
    gate = threading.Event()
    lanes.submit("latents", Doubling("a", notes, gates={"commit": gate}), ends)
    lanes.submit("latents", Doubling("b", notes), ends)
    assert ends.wait("b")[0].result == [0.0, 2.0, 4.0]  # passes the one that hangs
    assert ("a", "commit") in notes
    assert "a" not in ends.came
    gate.set()
    ends.wait("a")


def test_a_full_inbox_holds_reading_back():
    lanes, notes, ends = open_lanes(max_bytes=16), [], Ends()
    gate = threading.Event()
    lanes.submit("latents", Doubling("a", notes, num_batches=20, gates={"compute": gate}), ends)
    threading.Event().wait(0.3)
    # One at the device, two of 8 bytes in the inbox, one read that does not fit.
    assert Counter(notes)["a", "read"] == 4
    gate.set()
    assert len(ends.wait("a")[0].result) == 20


@pytest.mark.parametrize("step", STEPS)
def test_an_encoding_that_fails_costs_itself_alone(step):
    lanes, notes, ends = open_lanes(), [], Ends()
    encodings = [
        Doubling("a", notes, fail=step),
        Doubling("b", notes),
    ]
    for encoding in encodings:
        lanes.submit("features", encoding, ends)
    failed, whole = ends.wait("a", "b")
    assert str(failed.error) == f"a failed at {step}"
    assert failed.result is None
    assert whole.result == [0.0, 2.0, 4.0]
    assert [encoding.num_abandoned for encoding in encodings] == [1, 1]
    after = STEPS[STEPS.index(step) + 1 :]
    assert not [noted for name, noted in notes if name == "a" and noted in after[-1:]]


def test_a_value_that_is_not_finite_fails_its_encoding():
    lanes, notes, ends = open_lanes(), [], Ends()
    encoding = Doubling("a", notes)
    encoding.read = lambda: (batch for batch in [Numbers([np.inf])])
    lanes.submit("latents", encoding, ends)
    (entry,) = ends.wait("a")
    assert isinstance(entry.error, FloatingPointError)
    assert encoding.written == []


def test_threads_end_with_the_last_encoding_and_none_is_accepted_then():
    before = threading.active_count()
    lanes, ends = open_lanes(), Ends()
    lanes.submit("latents", Doubling("a", []), ends)
    ends.wait("a")
    deadline = threading.Event()
    for _ in range(200):
        if threading.active_count() <= before:
            break
        deadline.wait(0.05)
    assert threading.active_count() <= before
    assert lanes.closed
    assert lanes.submit("latents", Doubling("b", []), ends) is False


def test_giving_up_ends_every_encoding_and_lets_go_of_its_files():
    lanes, notes, ends = open_lanes(), [], Ends()
    gate = threading.Event()
    computing = Doubling("a", notes, gates={"compute": gate})
    waiting = [Doubling(name, notes) for name in "bc"]
    for encoding in (computing, *waiting):
        lanes.submit("latents", encoding, ends)
    while ("a", "compute") not in notes:
        threading.Event().wait(0.01)
    threading.Timer(0.2, gate.set).start()
    lanes.abandon()
    for entry in ends.wait("a", "b", "c"):
        assert isinstance(entry.error, StageClosedError)
        assert entry.encoding.num_abandoned == 1
    assert not [name for name, step in notes if step == "commit"]


def test_giving_up_lets_a_commit_that_has_begun_come_to_its_end():
    lanes, notes, ends = open_lanes(), [], Ends()
    gate = threading.Event()
    encoding = Doubling("a", notes, gates={"commit": gate})
    lanes.submit("latents", encoding, ends)
    while ("a", "commit") not in notes:
        threading.Event().wait(0.01)
    threading.Timer(0.2, gate.set).start()
    lanes.abandon()
    (entry,) = ends.wait("a")
    assert (entry.error, entry.result) == (None, [0.0, 2.0, 4.0])


def test_a_clean_up_that_fails_is_told_and_ends_the_encoding():
    lanes, ends = open_lanes(), Ends()
    encoding = Doubling("a", [])

    def fail():
        raise RuntimeError("was written to while it was read")

    encoding.abandon = fail
    lanes.submit("latents", encoding, ends)
    (entry,) = ends.wait("a")
    assert str(entry.error) == "was written to while it was read"


def test_a_thread_that_crashes_answers_for_its_encodings():
    def crash(step):
        raise LookupError(f"a fault after {step}")

    lanes, ends = Lanes(("latents",), max_bytes=64, on_progress=crash), Ends()
    lanes.submit("latents", Doubling("a", []), ends)
    (entry,) = ends.wait("a")
    assert str(entry.error) == "a fault after fetch"
    assert lanes.closed


def test_what_is_in_hand_comes_to_its_end_first_but_one_is_kept_ahead():
    """Lane 0 is latents, lane 1 features: two encodings in the latter, and it is served first."""
    lanes = open_lanes()
    latents, features = lanes._lanes.values()
    features.num_entries = 2
    assert lanes._choose_lane([0, 1]) == 1
    features.num_entries = 1
    assert lanes._choose_lane([0, 1]) == 0
    assert lanes._choose_lane([1]) == 1
    latents.num_entries = 3
    assert lanes._choose_lane([0]) == 0
    lanes.abandon()
