"""Patience with a server that does not answer: how long, how often, what ends it, what is said."""

import logging
import re
import threading
from itertools import pairwise

import pytest

from pipeline.base.outages import (
    FIRST_S,
    MAX_PAUSE_S,
    TOLD_AFTER_S,
    OutageError,
    Patience,
    watching,
)
from tests.support.fake_time import FakeTime, make_patience

URL = "s3://bucket/store"
MINUTES = 60.0


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def patience(time):
    """Ten minutes, of which none pass, with a server that has answered."""
    patience = make_patience(10 * MINUTES, time)
    patience.ride_out(lambda: None, url=URL)
    return patience


class Server:
    """Refuses for a time, or until told otherwise; counts the requests."""

    def __init__(self, time, *, away_s=float("inf"), reason="HTTP 503 SlowDown"):
        self.time, self.back_s, self.reason = time, time.now_s + away_s, reason
        self.num = 0

    def __call__(self):
        self.num += 1
        if self.time.now_s < self.back_s:
            raise OutageError.because(self.reason, "x: could not read")
        return "answer"


def test_an_outage_within_patience_is_ridden_out(time, patience):
    server = Server(time, away_s=9 * MINUTES)
    assert patience.ride_out(server, url=URL) == "answer"
    assert 9 * MINUTES / MAX_PAUSE_S <= server.num <= 130
    assert time.now_s - server.back_s <= MAX_PAUSE_S


def test_one_beyond_it_is_an_error_that_says_since_when(time, patience):
    server = Server(time)
    began_s = time.now_s
    said = r"x: could not read; s3://bucket has not answered since \d\d:\d\d:\d\d, for 10m00s"
    with pytest.raises(OutageError, match=said) as caught:
        patience.ride_out(server, url=URL)
    assert caught.value.reason == "HTTP 503 SlowDown"
    assert time.now_s - began_s == pytest.approx(10 * MINUTES, abs=0.1)


def test_pauses_grow_to_their_cap_and_differ(time, patience):
    tried_s = []

    def refuse():
        tried_s.append(time.now_s)
        raise OutageError("away")

    for _ in range(2):
        with pytest.raises(OutageError):
            patience.ride_out(refuse, url=f"{URL}{len(tried_s)}://other")
    pauses = [after - before for before, after in pairwise(tried_s)]
    assert pauses[0] <= 0.5
    assert MAX_PAUSE_S / 2 <= max(pauses) <= MAX_PAUSE_S
    assert len(set(pauses)) > 3


def test_before_a_first_answer_patience_is_short(time):
    patience = make_patience(10 * MINUTES, time)
    server, began_s = Server(time), time.now_s
    with pytest.raises(OutageError, match="for 10s"):
        patience.ride_out(server, url=URL)
    assert time.now_s - began_s == pytest.approx(FIRST_S, abs=0.1)
    patience.ride_out(lambda: None, url="s3://other")
    with pytest.raises(OutageError, match="for 10s"):  # another server's answer tells nothing
        patience.ride_out(Server(time, away_s=5 * MINUTES), url=URL)


def test_a_worker_trusts_the_answers_that_its_command_had(time):
    patience = make_patience(10 * MINUTES, time)
    patience.trusted = True
    assert patience.ride_out(Server(time, away_s=5 * MINUTES), url=URL) == "answer"


def test_a_refusal_is_an_answer(time):
    patience = make_patience(10 * MINUTES, time)

    def refuse():
        raise PermissionError("denied")

    with pytest.raises(PermissionError, match="denied"):
        patience.ride_out(refuse, url=URL)
    assert time.slept == []
    assert patience.ride_out(Server(time, away_s=5 * MINUTES), url=URL) == "answer"


def test_patience_is_of_an_outage_and_not_of_each_request(time, patience):
    server = Server(time)
    with pytest.raises(OutageError):
        patience.ride_out(server, url=URL)
    num_before = server.num
    for _ in range(3):
        with pytest.raises(OutageError):
            patience.ride_out(server, url=URL)
    assert server.num == num_before + 3
    server.back_s = time.now_s
    assert patience.ride_out(server, url=URL) == "answer"
    assert patience.ride_out(Server(time, away_s=9 * MINUTES), url=URL) == "answer"


def test_a_server_that_answers_others_has_patience_for_each_request(time, patience):
    """A prefix that S3 splits: some requests get 503 while others are answered."""
    began_s = time.now_s

    def refuse():
        patience.ride_out(lambda: None, url=URL)
        raise OutageError("busy")

    with pytest.raises(OutageError, match="busy"):
        patience.ride_out(refuse, url=URL)
    assert time.now_s - began_s == pytest.approx(10 * MINUTES, abs=0.1)


def test_without_patience_there_is_one_try(time):
    server = Server(time)
    with pytest.raises(OutageError, match=r"tries: 1"):
        make_patience(0, time).ride_out(server, url=URL)
    assert (server.num, time.slept) == (1, [])


def test_an_asker_ends_the_wait_and_is_called_while_it_lasts(time, patience):
    asked = []

    def ask():
        asked.append(time.now_s)
        return len(asked) == 100

    patience.askers += [ask, lambda: False]
    server = Server(time)
    with pytest.raises(OutageError, match="could not read"):
        patience.ride_out(server, url=URL)
    assert len(asked) == 100
    assert time.now_s - asked[0] < 60
    assert max(time.slept) <= 0.5


def test_an_interrupt_in_mid_wait_passes_at_once(time):
    def interrupt(duration_s):
        raise KeyboardInterrupt

    patience = Patience(10 * MINUTES, clock=time.clock, sleep=interrupt)
    server = Server(time)
    with pytest.raises(KeyboardInterrupt):
        patience.ride_out(server, url=URL)
    assert server.num == 1
    assert patience.describe() == ""


def test_an_outage_is_told_once_whoever_meets_it_and_so_is_its_end(time, patience, caplog):
    told, server = [], Server(time, away_s=3 * MINUTES)

    def meet_too():
        told.append(patience.describe())
        return len(told) == 20 and patience.ride_out(server, url=URL) == ""

    patience.askers.append(meet_too)
    with caplog.at_level(logging.WARNING):
        assert patience.ride_out(server, url=URL) == "answer"
    began, over = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        r"s3://bucket has not answered since \d\d:\d\d:\d\d \(HTTP 503 SlowDown\), waiting up to "
        "10 min",
        began,
    )
    assert re.fullmatch(r"s3://bucket answers again, after 3m\d\ds", over)
    assert told[0] == ""  # nobody is told of a blip
    assert told[int(TOLD_AFTER_S / 0.5) + 5] == began
    assert patience.describe() == ""


def test_a_blip_is_not_told(time, patience, caplog):
    with caplog.at_level(logging.WARNING):
        patience.ride_out(Server(time, away_s=1), url=URL)
    assert caplog.records == []


def test_no_user_or_password_of_a_url_is_told(time, patience, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(OutageError) as caught:
        patience.ride_out(Server(time), url="https://user:hush@host/a?token=hush#hush")
    assert "https://host has not answered" in caplog.text
    assert "hush" not in caplog.text + str(caught.value)


def test_what_is_to_end_waits_no_more(time, patience):
    patience.stop()
    server = Server(time)
    with pytest.raises(OutageError):
        patience.ride_out(server, url=URL)
    assert (server.num, len(time.slept)) == (1, 1)
    assert patience.ride_out(lambda: "answer", url=URL) == "answer"


def test_a_command_asks_on_while_workers_work_and_whatever_comes(monkeypatch):
    monkeypatch.setattr("pipeline.base.outages.ASK_EVERY_S", 0.01)
    before, num_asked, enough = set(threading.enumerate()), [], threading.Event()

    def ask():
        num_asked.append(1)
        if len(num_asked) > 3:
            enough.set()
        raise OutageError("away")

    with watching([ask]):
        assert enough.wait(20)
        (thread,) = set(threading.enumerate()) - before
    thread.join(20)
    assert not thread.is_alive()


def test_threads_share_one_outage():
    patience = Patience(60)
    away = threading.Event()
    failed = threading.Barrier(9)

    def ask():
        if not away.is_set():
            failed.wait(20)
            away.wait(20)
            raise OutageError("away")
        return "answer"

    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(patience.ride_out(ask, url=URL)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    failed.wait(20)  # all eight have asked
    away.set()
    for thread in threads:
        thread.join(20)
    assert answers == ["answer"] * 8
    assert patience.describe() == ""
