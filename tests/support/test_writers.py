"""The processes that tests kill: what goes wrong in one is told."""


def test_an_unexpected_error_is_in_the_output(writers):
    status, output = writers.run("inspect", failpoints="nonsense")
    assert status == 1
    assert "Traceback" in output
    assert "LDZNET_FAILPOINTS: expected" in output


def test_what_a_command_says_is_told_apart_and_it_runs_where_told(writers, tmp_path):
    result = writers.run_in(tmp_path, "blocks", "sd14")
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) > 16
    result = writers.run_in(tmp_path, "inspect", "nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert "expected a store, found no layer there" in result.stderr
    assert str(tmp_path) in result.stderr
