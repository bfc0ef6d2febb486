"""The processes that tests kill: what goes wrong in one is told."""

from tests.writers import writers  # noqa: F401  a fixture


def test_an_unexpected_error_is_in_the_output(writers):  # noqa: F811
    status, output = writers.run("inspect", failpoints="nonsense")
    assert status == 1
    assert "Traceback" in output
    assert "LDZNET_FAILPOINTS: expected" in output
