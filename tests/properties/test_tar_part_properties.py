"""Parts of a tar: together the whole, in order, nothing twice, balanced by bytes."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.members import Reject, RejectReason, SampleMembers
from pipeline.corpus.parts import select_part
from pipeline.corpus.tar import BLOCK_BYTES, Member

SIZES = st.one_of(st.integers(0, 1000), st.integers(0, 2**60))


def make_sample(number, sizes):
    members = [Member(f"{number}", "file", 0, size) for size in sizes]
    return SampleMembers(f"key-{number}", members[0], members[1], tuple(members[2:]))


samples_of_tars = st.lists(st.lists(SIZES, min_size=3, max_size=5), max_size=40).map(
    lambda rows: [make_sample(i, sizes) for i, sizes in enumerate(rows)]
)
rejects_of_tars = st.lists(st.sampled_from(["sample", "member"]), max_size=5).map(
    lambda levels: [Reject(f"{i}", x, RejectReason.BAD_TEXT, "") for i, x in enumerate(levels)]
)


def num_bytes(samples):
    members = [m for s in samples for m in (s.image, s.text, *s.masks)]
    return sum(member.size + BLOCK_BYTES for member in members)


@given(samples_of_tars, rejects_of_tars, st.integers(1, 50))
def test_all_parts_one_after_another_are_the_tar(groups, rejects, num_parts):
    parts = [select_part(groups, rejects, part=i, num_parts=num_parts) for i in range(num_parts)]
    assert [sample for samples, _ in parts for sample in samples] == groups
    assert [reject for _, of_part in parts for reject in of_part] == rejects


@given(samples_of_tars.filter(bool), st.integers(1, 50))
def test_a_part_is_within_a_sample_of_the_mean(groups, num_parts):
    whole, largest = num_bytes(groups), max(num_bytes([sample]) for sample in groups)
    for i in range(num_parts):
        samples, _ = select_part(groups, [], part=i, num_parts=num_parts)
        assert abs(num_parts * num_bytes(samples) - whole) < num_parts * largest + num_parts
