"""How often a property is tried: a tenth as often in `make test` as with the mark `thorough`."""

from hypothesis import settings

THOROUGH = "thorough"  # a mark, and hypothesis' profile in runs that select it

settings.register_profile(THOROUGH)


def examples(number):
    """Settings that try a property ``number`` times in a thorough run, without a deadline."""
    thorough = settings.get_current_profile_name() == THOROUGH
    return settings(max_examples=number if thorough else max(number // 10, 10), deadline=None)
