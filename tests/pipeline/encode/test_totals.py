"""What a run says of itself: rates over a window, the bottleneck, ETA by bytes."""

import json

import pytest

from pipeline.base.progress_text import ProgressState
from pipeline.encode.totals import RESOURCES, TASKS_A_WINDOW, WINDOW_S, EncodeTotals
from pipeline.stage.work import STAGES, TaskOutcome


class Clock:
    """Seconds that a test sets."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def outcome(task="a", status="committed", **more):
    return TaskOutcome(task=task, status=status, **more)


def figures_of(totals):
    return totals.report().figures


def test_every_stage_needs_one_resource():
    assert sorted(stage for stages in RESOURCES.values() for stage in stages) == sorted(STAGES)


def test_before_the_first_task_nothing_is_guessed(clock):
    report = EncodeTotals(tar_bytes={"a": 10}, clock=clock).report()
    assert (report.done, report.eta_s, report.text) == (0, None, "no task has ended yet")
    assert report.figures["bottleneck"] == "waiting"


def test_rates_are_of_the_time_that_passed(clock):
    totals = EncodeTotals(clock=clock)
    clock.now_s += 4.0
    totals.add(outcome(num_pairs=100, num_bytes=2000, num_samples=50))
    figures = figures_of(totals)
    assert (figures["window_pairs_per_s"], figures["window_bytes_per_s"]) == (25.0, 500.0)
    assert (figures["pairs"], figures["bytes_written"], figures["window_s"]) == (100, 2000, 4.0)
    clock.now_s += 4.0  # nothing more came: the rate falls without an outcome
    assert figures_of(totals)["window_pairs_per_s"] == 12.5


def test_the_window_forgets_what_is_past_and_the_sums_do_not(clock):
    totals = EncodeTotals(clock=clock)
    for step in range(600):
        clock.now_s += 2.0
        totals.add(outcome(str(step), num_pairs=10 if step < 300 else 40))
    figures = figures_of(totals)
    assert figures["window_pairs_per_s"] == pytest.approx(20.0)
    assert figures["pairs"] == 7500 * 2
    assert WINDOW_S <= figures["window_s"] < 1.1 * WINDOW_S


def test_the_window_grows_until_it_holds_tasks_of_every_actor(clock):
    totals = EncodeTotals(clock=clock, num_actors=4)
    for step in range(64):
        clock.now_s += 60.0
        totals.add(outcome(str(step), num_pairs=6))
    figures = figures_of(totals)
    assert figures["window_s"] == 60.0 * TASKS_A_WINDOW * 4
    assert figures["window_pairs_per_s"] == pytest.approx(0.1)


def test_the_device_is_one_resource_and_shares_are_of_all_actors(clock):
    totals = EncodeTotals(clock=clock, num_actors=2)
    clock.now_s += 10.0
    busy = {"vae": 6.0, "text": 1.0, "unet": 11.0, "decode": 10.0, "commit": 10.0}
    totals.add(outcome(busy_s=busy))
    figures = figures_of(totals)
    assert figures["window_busy"] == {
        "fetch": 0.0, "decode": 0.5, "device": 0.9, "read": 0.0, "write": 0.0, "commit": 0.25,
    }  # fmt: skip
    assert figures["bottleneck"] == "device"
    assert figures["busy_s"] == busy
    assert "bottleneck device 90%," in totals.report().text
    assert totals.report().details[1] == "bottleneck device 90%, decode 50%, commit 25%"


def test_shares_are_of_the_actors_that_are_alive(clock):
    """One of 16 came; when a second has come, of the time that each was there."""
    alive = [1]
    sizes = dict.fromkeys(["a", "b", "c"], 1)
    totals = EncodeTotals(0, sizes, clock=clock, num_actors=16, count_alive=lambda: alive[0])
    assert totals.report().text == "no task has ended yet, 1 of 16 actors alive"
    clock.now_s += 100.0
    totals.add(outcome(busy_s={"unet": 80.0}))
    figures = figures_of(totals)
    assert (figures["actors_alive"], figures["actors_max"]) == (1, 16)
    assert figures["window_busy"]["device"] == 0.8
    assert ", bottleneck device 80%, 1 of 16 actors alive, " in totals.report().text
    assert totals.report().details[1] == "1 of 16 actors alive; bottleneck device 80%"
    alive[0] = 2
    totals.report()
    clock.now_s += 50.0
    totals.add(outcome(busy_s={"unet": 20.0}))
    assert figures_of(totals)["window_busy"]["device"] == 0.5
    totals.add(outcome())
    alive[0] = 0
    assert "2 of 16 actors alive" in totals.report().text, "as many as there were at the end"


def test_while_no_actor_is_alive_the_run_waits(clock):
    sizes = {"a": 1, "b": 1}
    totals = EncodeTotals(0, sizes, clock=clock, num_actors=4, count_alive=lambda: 0)
    clock.now_s += 1000.0
    totals.add(outcome(busy_s={"unet": 10.0}))
    assert "waiting (device 1%), 0 of 4 actors alive" in totals.report().text


def test_what_another_run_committed_is_counted_apart(clock):
    totals = EncodeTotals(clock=clock, tar_bytes={"mine": 1, "theirs": 1})
    clock.now_s += 10.0
    totals.add(outcome("mine", num_pairs=20, num_samples=9, num_bytes=5, rejects={"no_text": 1}))
    totals.add(outcome("theirs", "lost", num_pairs=70, num_samples=8, rejects={"no_text": 6}))
    figures = figures_of(totals)
    assert (figures["pairs"], figures["samples"], figures["lost_pairs"]) == (20, 9, 70)
    assert figures["window_pairs_per_s"] == 2.0
    assert (totals.rejects, totals.report().done) == ({"no_text": 1}, 2)
    assert totals.report().eta_s == 0.0
    assert totals.describe().splitlines()[:2] == [
        "stored 9 samples, 20 pairs, 5 B in 1 task",
        "1 task, 70 pairs: another run committed first",
    ]


def test_what_is_to_be_tried_again_is_no_failure_yet(clock):
    totals = EncodeTotals(clock=clock, tar_bytes={"a": 1, "b": 1})
    full = {"error": "NodeError: full", "cause": "node", "node": "host", "ray_node": "0123456789"}
    totals.add(outcome("a", "again", busy_s={"fetch": 1.0}, **full))
    totals.add(outcome("b"))
    assert (totals.failures, figures_of(totals)["again"]) == ({}, 1)
    assert totals.report().done == 1
    assert "0 failed, 1 to be tried again, 0 rejects" in totals.report().text
    assert "1 task would have been tried again" in totals.describe()
    totals.add(outcome("a", "failed", **full))
    assert (list(totals.failures), figures_of(totals)["again"]) == (["a"], 0)
    said = "1 failed task: because of node host (01234567), which says nothing of their tars"
    assert said in totals.describe().splitlines()


def test_where_no_resource_is_near_its_limit_the_run_waits(clock):
    totals = EncodeTotals(clock=clock)
    clock.now_s += 100.0
    totals.add(outcome(busy_s={"unet": 20.0, "fetch": 30.0}))
    assert figures_of(totals)["bottleneck"] == "waiting"
    assert "waiting (fetch 30%)" in totals.report().text
    assert totals.report().details[1] == "waiting: fetch 30%, device 20%"


def test_what_is_left_is_told_by_bytes_of_tars(clock):
    totals = EncodeTotals(tar_bytes={"big": 900, "small": 50, "tiny": 50}, clock=clock)
    clock.now_s += 90.0
    totals.add(outcome("big"))
    assert totals.report().eta_s == pytest.approx(10.0)
    totals.add(outcome("small", status="failed", error="x"))
    totals.add(outcome("tiny"))
    assert totals.report().eta_s == 0.0


def test_done_counts_what_was_committed_before_and_no_failure(clock):
    totals = EncodeTotals(num_done_before=7, clock=clock)
    for status in ("committed", "lost", "failed"):
        totals.add(outcome(status, status=status, error="boom"))
    assert totals.report().done == 9
    assert figures_of(totals)["tasks"] == {"committed": 1, "lost": 1, "failed": 1}
    assert totals.failures == {"failed": "boom"}


def test_all_reasons_are_recorded_and_the_commonest_shown(clock):
    totals = EncodeTotals(clock=clock)
    clock.now_s += 1.0
    totals.add(outcome(rejects={"no_text": 5, "bad_image": 9, "bad_mask": 1}))
    totals.add(outcome(rejects={"no_text": 5, "no_image": 2, "mask_size": 2}))
    assert figures_of(totals)["rejects"] == {
        "no_text": 10, "bad_image": 9, "bad_mask": 1, "no_image": 2, "mask_size": 2,
    }  # fmt: skip
    losses = "0 failed, 24 rejects (no_text 10, bad_image 9, no_image 2, 3 more)"
    assert totals.report().details[2] == losses
    assert totals.report().text.endswith(losses)


def test_members_that_were_set_aside_are_told_in_the_line_and_at_the_end(clock):
    totals = EncodeTotals(clock=clock)
    clock.now_s += 1.0
    totals.add(outcome(num_set_aside=1))
    assert "set aside 1 member: sidecars" in totals.describe().splitlines()
    totals.add(outcome("b", num_set_aside=19_999, rejects={"no_text": 1}))
    totals.add(outcome("c", status="lost", num_set_aside=7))  # which the other run tells
    assert "set aside 20,000 members: sidecars" in totals.describe().splitlines()
    assert totals.report().text.endswith("0 failed, 1 rejects (no_text 1), 20k set aside")
    assert figures_of(totals)["set_aside"] == 20_000


def test_no_line_is_long_and_every_row_fits_a_terminal(clock):
    totals = EncodeTotals(num_done_before=400_000, tar_bytes={"a": 1, "b": 10**6}, clock=clock)
    clock.now_s += 7.0
    reasons = ("unexpected_member", "duplicate_member", "member_too_large", "masks_too_large")
    totals.add(
        outcome(
            num_pairs=10**10, num_bytes=10**14, num_set_aside=10**9,
            rejects=dict.fromkeys(reasons, 10**8),
            busy_s=dict.fromkeys(STAGES, 6.66) | {"vae": 2.0, "text": 2.0, "unet": 3.0},
        )
    )  # fmt: skip
    report = totals.report()
    moment = ProgressState("encode", "running", report.done, 10**6, "tasks", 0, 1e5, {}, report)
    assert len(f"{moment.format_heading()} {moment.format_text()}") <= 160
    assert "400000000 rejects" in report.text
    assert all(len(row) <= 78 for row in report.details[:2])


def test_figures_are_json_for_metrics(clock):
    totals = EncodeTotals(clock=clock)
    totals.add(outcome(rejects={"no_text": 1}, busy_s={"unet": 0.5}))
    figures = figures_of(totals)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_the_end_says_what_came_of_it_and_how_to_go_on():
    totals = EncodeTotals(urls={"c": "s3://bucket/c.tar"})
    totals.add(outcome(num_pairs=3, num_samples=2, num_bytes=1_500_000, rejects={"no_text": 1}))
    totals.add(outcome("b", status="lost"))
    totals.add(outcome("c", status="failed", error="OSError: gone"))
    totals.failed_list = "runs/failed.jsonl"
    text = totals.describe(command="ldznet encode --store s")
    assert text.splitlines() == [
        "stored 2 samples, 3 pairs, 1.5 MB in 1 task",
        "1 task, 0 pairs: another run committed first",
        "rejected 1: no_text",
        "failed c: OSError: gone",
        "  s3://bucket/c.tar",
        "tasks failed: 1; the same command tries them again",
        "  ldznet encode --store s",
        "all of them: runs/failed.jsonl",
    ]


def test_the_same_command_is_not_said_to_try_changed_tars_again():
    totals = EncodeTotals()
    totals.add(outcome("a", status="failed", error="changed", cause="changed"))
    only_changed = totals.describe(command="ldznet encode")
    assert "tasks failed because their tars changed: 1; the same command with --changed" in (
        only_changed
    )
    assert "tries them again" not in only_changed
    totals.add(outcome("b", status="failed", error="damaged"))
    both = totals.describe(command="ldznet encode")
    assert "their tars changed: 1;" in both
    assert "tasks failed: 1; the same command tries them again\n  ldznet encode" in both


def test_notes_are_summed_and_told_in_plain_words():
    totals = EncodeTotals()
    totals.add(outcome("a", notes={"cut_prompts": 1}))
    totals.add(outcome("b", notes={"cut_prompts": 11, "turned_images": 1, "of_a_later_ldznet": 2}))
    sums = {"cut_prompts": 12, "turned_images": 1, "of_a_later_ldznet": 2}
    assert figures_of(totals)["notes"] == sums
    summary = totals.describe()
    assert "note: 12 pairs with a prompt that the tokenizer cut" in summary
    assert "note: 1 image turned upright by EXIF" in summary
    assert "note: 2 of_a_later_ldznet" in summary
    assert "note" not in EncodeTotals().describe()
