"""Of which tars a run stored nothing, and how it says so."""

import pytest

from pipeline.corpus.tasks import list_part_ids
from pipeline.encode.totals import EncodeTotals
from pipeline.stage.work import TaskOutcome

URLS = {task: f"s3://bucket/{task}.tar" for task in "abcdef"}


def add_all(*outcomes, urls=URLS):
    totals = EncodeTotals(urls=urls)
    for task, status, num_held, num_samples, rejects in outcomes:
        totals.add(
            TaskOutcome(task, status, num_held=num_held, num_samples=num_samples, rejects=rejects)
        )
    return totals


def test_a_tar_of_which_every_sample_was_rejected_is_named_with_its_main_reason():
    totals = add_all(
        ("a", "committed", 3, 0, {"no_text": 1, "missing_mask": 2}),
        ("b", "committed", 3, 1, {"no_text": 2}),
        ("c", "committed", 10, 0, {"no_text": 10, "unexpected_member": 10_000}),
        ("d", "committed", 5, 0, {"missing_mask": 5}),
        ("e", "committed", 1, 0, {"missing_mask": 1}),
    )
    assert len(totals.empty_tars) == 4
    first, second = (x for x in totals.describe().splitlines() if x.startswith("nothing stored"))
    assert first == (
        "nothing stored of s3://bucket/a.tar and of 2 more alike: 3 samples, rejected "
        "missing_mask 2, no_text 1"
    )
    assert second.startswith("nothing stored of s3://bucket/c.tar: 10 samples, rejected unexpected")


def test_what_is_no_sign_of_a_wrong_corpus():
    totals = add_all(
        ("a", "committed", 0, 0, {}),  # an empty tar
        ("b", "committed", 0, 0, {"unexpected_member": 7}),  # no sample in it
        ("c", "lost", 3, 0, {"no_text": 3}),  # the run that was first says so
        ("d", "failed", 0, 0, {}),
    )
    assert len(totals.empty_tars) == 0
    assert "nothing stored" not in totals.describe()


def test_the_parts_of_a_tar_are_judged_together_in_any_order():
    """The first part has the rejects of grouping, and may have no sample of its own."""
    good, bad = list_part_ids("g-01234567", 3), list_part_ids("b-01234567", 3)
    outcomes = [
        (good[0], "committed", 4, 0, {"no_text": 4}),
        (bad[0], "committed", 4, 0, {"no_text": 4}),
        (good[1], "committed", 9, 9, {}),
        (bad[1], "committed", 0, 0, {}),
        (bad[2], "committed", 2, 0, {"bad_image": 2}),
        (good[2], "committed", 1, 0, {"bad_image": 1}),
    ]
    for order in (outcomes, outcomes[::-1]):
        totals = add_all(*order, urls=dict.fromkeys(good, "g.tar") | dict.fromkeys(bad, "b.tar"))
        lines = [x for x in totals.describe().splitlines() if x.startswith("nothing stored")]
        assert lines == ["nothing stored of b.tar: 6 samples, rejected no_text 4, bad_image 2"]


MENDED = "once such a tar is mended, --changed renew encodes it anew"


@pytest.mark.parametrize(
    ("reasons", "advice"),
    [
        (["no_text"], [MENDED]),
        (["too_thin"], ["masks too_thin for the spec's size are kept at a larger one (size: ...)"]),
        (["outside_view"], ["masks outside_view are kept with another crop"]),
        (["too_thin", "no_text"], ["masks too_thin for the spec's size", MENDED]),
    ],
)
def test_the_advice_is_the_reasons(reasons, advice):
    """A tar whose masks are lost at the spec's size has nothing to be mended."""
    totals = add_all(
        *((task, "committed", 4, 0, {x: 5}) for task, x in zip("ab", reasons, strict=False))
    )
    lines = totals.empty_tars.describe(URLS)[len(reasons) :]
    assert len(lines) == len(advice)
    assert all(line.startswith(start) for line, start in zip(lines, advice, strict=True))
