import io
import json
import logging
import math
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.base.outages import OutageError
from pipeline.base.progress import Progress
from pipeline.base.progress_text import ProgressState, WorkStatus, format_duration
from tests.support.fake_time import make_patience

NEVER_S = 3600.0


def read_records(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def snapshot_of(**changes):
    values = {"verb": "encode", "status": "running", "done": 12, "total": 468, "unit": "tasks"}
    return ProgressState(**{**values, "start": 0, "elapsed_s": 4.0, **changes})


def test_plain_line_reads_as_the_design_says():
    snapshot = snapshot_of(figures={"stored": "340 pairs", "rejected": 2})
    assert snapshot.format_text() == (
        "12/468 tasks 2.6% 3.0 tasks/s eta 2m32s stored 340 pairs, rejected 2"
    )


def test_a_mapping_is_shown_by_its_largest_and_written_whole(tmp_path):
    stream, path = io.StringIO(), tmp_path / "metrics.jsonl"
    rejects = {"a": 1, "b": 4, "c": np.int64(9), "d": 2, "e": 0, "f": math.nan}
    with Progress("encode", total=1, unit="tasks", metrics_path=path, stream=stream) as progress:
        progress.update(1, rejects=rejects)
    assert read_records(path)[-1]["rejects"] == {"a": 1, "b": 4, "c": 9, "d": 2, "e": 0, "f": None}
    assert stream.getvalue().endswith("rejects (c 9, b 4, d 2, 1 more)\n")


def test_what_the_work_says_of_itself_stands_over_updates(tmp_path):
    stream, path = io.StringIO(), tmp_path / "metrics.jsonl"
    asked = []

    def source():
        asked.append(threading.current_thread().name)
        return WorkStatus(len(asked), f"asked {len(asked)}", ("row",), {"share": {"x": 0.5}}, 600.0)

    with Progress(
        "encode", total=99, unit="tasks", metrics_path=path, stream=stream, source=source,
        interval_s=0.02,
    ) as progress:  # fmt: skip
        progress.update(98, more=1)
        time.sleep(0.1)
    first, *_, last = read_records(path)
    assert stream.getvalue().startswith("encode 1/99 tasks 1.0% eta 10m00s, asked 1\n")
    assert (first["done"], first["eta_s"], first["share"]) == (1, 600.0, {"x": 0.5})
    assert (last["done"], last["more"]) == (len(asked), 1)
    assert "progress-encode" in asked


@pytest.mark.parametrize("columns", [80, 40])
def test_no_row_of_the_bar_is_wider_than_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    report = WorkStatus(400_000, "", ("x" * 60, "y" * 200), {}, 187_200.0)
    stream = io.StringIO()
    with Progress(
        "encode", total=1_000_000, unit="tasks", metrics_path=None, stream=stream, terminal=True,
        source=lambda: report, interval_s=NEVER_S,
    ):  # fmt: skip
        shown = stream.getvalue()
    rows = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", row) for row in re.split(r"[\r\n]+", shown)]
    assert max(len(row) for row in rows) <= columns
    assert ("400000/1000000 tasks 40.0% eta 2d04h" in shown) == (columns == 80)
    assert ("x" * 60 in shown) == (columns == 80)


def test_who_is_waited_for_is_said_in_lines_bar_and_records(tmp_path, monkeypatch):
    path, shown = tmp_path / "metrics.jsonl", []
    patience = make_patience(20)
    monkeypatch.setattr("pipeline.base.progress.PATIENCE", patience)

    def show():
        for terminal in (False, True):
            stream = io.StringIO()
            options = {"metrics_path": path, "stream": stream, "terminal": terminal}
            with Progress("encode", total=1, unit="tasks", **options):
                pass
            shown.append(stream.getvalue())
        return False

    def refuse():
        raise OutageError.because("HTTP 503", "away")

    show()
    patience.askers.append(show)
    with pytest.raises(OutageError):
        patience.ride_out(refuse, url="s3://bucket")
    show()
    said = "s3://bucket has not answered since"
    assert [said in text for text in (*shown[:2], *shown[-4:])] == [0, 0, 1, 1, 0, 0]
    assert "(HTTP 503), waiting up to 10 s" in shown[-4]
    outages = [record.get("outage", "") for record in read_records(path)]
    assert outages[0] == outages[-1] == ""
    assert outages[-5].startswith(said)


def test_percent_is_whole_only_at_the_end():
    assert " 99.9% " in snapshot_of(done=99_999, total=100_000).format_text()
    assert " 100.0% " in snapshot_of(done=100_000, total=100_000).format_text()


def test_first_line_comes_at_once():
    stream = io.StringIO()
    with Progress("encode", total=468, unit="tasks", metrics_path=None, stream=stream):
        assert stream.getvalue() == "encode 0/468 tasks 0.0%\n"


def test_lines_and_records_come_without_updates(tmp_path):
    stream, path = io.StringIO(), tmp_path / "metrics.jsonl"
    with Progress(
        "train", total=9, unit="steps", metrics_path=path, stream=stream, interval_s=0.02
    ):
        time.sleep(0.2)
    assert len(stream.getvalue().splitlines()) >= 4
    assert len(read_records(path)) == len(stream.getvalue().splitlines())


def test_interval_is_kept_between_updates():
    stream = io.StringIO()
    with Progress("t", total=9, unit="steps", metrics_path=None, stream=stream) as progress:
        for done in range(9):
            progress.update(done)
    assert len(stream.getvalue().splitlines()) == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt, "interrupted"), (ValueError, "failed"), (SystemExit, "failed")],
)
def test_last_record_says_how_it_ended(tmp_path, error, status):
    stream, path = io.StringIO(), tmp_path / "metrics.jsonl"
    progress = Progress("encode", total=4, unit="tasks", metrics_path=path, stream=stream)

    def work():
        with progress:
            progress.update(3)
            raise error("stop")

    with pytest.raises(error, match="stop"):
        work()
    first, last = read_records(path)
    assert (first["status"], first["done"]) == ("running", 0)
    assert (last["status"], last["done"]) == (status, 3)
    assert stream.getvalue().splitlines()[-1].startswith(f"encode {status} 3/4 tasks 75.0%")


def test_record_has_every_field_and_the_figures(tmp_path):
    path = tmp_path / "made" / "metrics.jsonl"
    with Progress("train", total=10, unit="steps", metrics_path=path, stream=io.StringIO()) as bar:
        bar.update(5, loss=np.float32(0.5), rows=np.int64(3))
        bar.update(10, split="val")
    last = read_records(path)[-1]
    assert last.pop("time").endswith("+00:00")
    assert last.pop("elapsed_s") >= 0
    assert last.pop("rate_per_s") > 0
    assert last == {
        "verb": "train", "status": "done", "done": 10, "total": 10, "unit": "steps", "start": 0,
        "eta_s": 0.0, "loss": 0.5, "rows": 3, "split": "val",
    }  # fmt: skip


def test_rate_counts_only_what_this_run_did():
    resumed = snapshot_of(done=110, start=100, total=120, elapsed_s=5.0)
    assert resumed.rate_per_s == 2.0
    assert resumed.eta_s == 5.0
    assert snapshot_of(done=100, start=100, total=120).eta_s is None


def test_start_is_where_done_begins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Progress(
        "encode", total=8, unit="tasks", metrics_path=path, stream=io.StringIO(), start=6
    ):
        pass
    assert [record["done"] for record in read_records(path)] == [6, 6]
    assert read_records(path)[-1]["rate_per_s"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_figure_that_is_not_finite_is_null(tmp_path, value):
    stream, path = io.StringIO(), tmp_path / "metrics.jsonl"
    with Progress("train", total=1, unit="steps", metrics_path=path, stream=stream) as progress:
        progress.update(1, loss=value)
    assert read_records(path)[-1]["loss"] is None
    assert stream.getvalue().endswith("loss -\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_total_of_nothing_works(tmp_path, terminal):
    stream, path = io.StringIO(), tmp_path / "metrics.jsonl"
    with Progress(
        "encode", total=0, unit="tasks", metrics_path=path, stream=stream, terminal=terminal
    ):
        pass
    assert "encode done" in stream.getvalue()
    assert "0/0 tasks" in stream.getvalue()
    assert read_records(path)[-1]["eta_s"] == 0


def test_lines_hold_no_terminal_codes_whatever_a_figure_says():
    stream = io.StringIO()
    with Progress("encode", total=2, unit="tasks", metrics_path=None, stream=stream) as progress:
        progress.update(1, last="a\x1b[31m\r\nb\x07")
    lines = stream.getvalue().split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert lines[1].endswith("last a?[31m??b?")


def test_terminal_shows_one_bar_and_writes_records(tmp_path):
    stream, path = io.StringIO(), tmp_path / "metrics.jsonl"
    with Progress(
        "encode", total=4, unit="tasks", metrics_path=path, stream=stream, terminal=True,
        interval_s=0.02,
    ) as progress:  # fmt: skip
        progress.update(2, last="[red]x[/red]")
        time.sleep(0.1)
    shown = stream.getvalue()
    assert "\x1b[" in shown
    assert "2/4 tasks" in shown
    assert "[red]x" in shown
    assert "encode ended" in shown  # not "done": two of four are
    assert len(read_records(path)) >= 3


@pytest.mark.parametrize(("tty", "term", "bar"), [(1, "xterm", 1), (0, "xterm", 0), (1, "dumb", 0)])
def test_stream_is_asked_whether_it_is_a_terminal(monkeypatch, tty, term, bar):
    monkeypatch.setenv("TERM", term)
    stream = io.StringIO()
    stream.isatty = lambda: bool(tty)
    with Progress("encode", total=1, unit="tasks", metrics_path=None, stream=stream):
        pass
    assert ("\x1b[" in stream.getvalue()) == bool(bar)
    assert stream.getvalue().startswith("encode 0/1 tasks 0.0%\n") != bool(bar)


def test_no_thread_outlives_the_block():
    before = set(threading.enumerate())
    for terminal in (False, True):
        with Progress(
            "encode", total=1, unit="tasks", metrics_path=None, stream=io.StringIO(),
            terminal=terminal, interval_s=NEVER_S,
        ):  # fmt: skip
            assert len(set(threading.enumerate()) - before) == 1
        assert set(threading.enumerate()) <= before


def test_updates_from_many_threads_all_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Progress(
        "encode", total=800, unit="tasks", metrics_path=path, stream=io.StringIO(), interval_s=0.001
    ) as progress:

        def work(worker):
            for done in range(200):
                progress.update(done, **{f"worker{worker}": done})

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    last = read_records(path)[-1]
    assert [last[f"worker{worker}"] for worker in range(4)] == [199] * 4


def test_records_of_a_second_run_follow_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"verb": "encode"}\n{"verb": "enc')
    with Progress("train", total=1, unit="steps", metrics_path=path, stream=io.StringIO()):
        pass
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"verb": "encode"}', '{"verb": "enc']
    assert [json.loads(line)["verb"] for line in lines[2:]] == ["train", "train"]


def test_closed_pipe_does_not_stop_the_work(tmp_path, caplog):
    class ClosedPipe(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    path = tmp_path / "metrics.jsonl"
    with caplog.at_level(logging.WARNING):
        with Progress("encode", total=1, unit="tasks", metrics_path=path, stream=ClosedPipe()):
            pass
    assert [record["status"] for record in read_records(path)] == ["running", "done"]
    assert [record.message for record in caplog.records] == [
        "encode: progress cannot be shown any more: [Errno 32] Broken pipe"
    ]


def test_full_disk_does_not_stop_the_work(caplog):
    stream = io.StringIO()
    with caplog.at_level(logging.WARNING):
        with Progress("encode", total=1, unit="tasks", metrics_path=full_device(), stream=stream):
            pass
    assert "encode ended" in stream.getvalue()
    assert len(caplog.records) == 1
    assert "No space left on device; the work goes on without it" in caplog.records[0].message


def full_device():
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("/dev/full is Linux's")
    return device


def test_bad_arguments_are_refused():
    with pytest.raises(AssertionError, match="total must be 0 or more, but got -1"):
        Progress("encode", total=-1, unit="tasks", metrics_path=None)
    with pytest.raises(AssertionError, match="interval_s must be above 0 seconds, but got nan"):
        Progress("encode", total=1, unit="tasks", metrics_path=None, interval_s=math.nan)


def test_bad_figures_are_refused():
    with Progress("train", total=1, unit="s", metrics_path=None, stream=io.StringIO()) as progress:
        with pytest.raises(AssertionError, match=r"must not be named .*\['total'\]"):
            progress.update(1, total=3)
        with pytest.raises(
            AssertionError,
            match="figure loss must be a number, a string or a mapping of numbers, but",
        ):
            progress.update(1, loss=[0.1])


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (130, "2m10s"),
        (11100, "3h05m"),
        (187200, "2d04h"),
    ],
)
def test_duration_is_short(duration_s, text):
    assert format_duration(duration_s) == text
