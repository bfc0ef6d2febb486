"""``--help`` of every command, and the reference page that is made from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.__main__ import VERBS
from jobs.bench import BENCHMARKS
from jobs.ingest import KINDS
from jobs.reference import PAGE, format_reference

COMMANDS = [
    *[(verb,) for verb in VERBS],
    *[("ingest", kind.__name__) for kind in KINDS],
    *[("bench", found.__name__) for found in BENCHMARKS],
]
SLOW = ("torch", "ray", "diffusers", "transformers", "pyarrow", "zarr")
# Imports stay in a process: so each command's help is asked in the same one, and a heavy import is
# the fault of the first command after which it is there.
ASK = f"""
import json, sys
from typer.testing import CliRunner
from jobs.__main__ import app
found = []
for command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, [*command, "--help"], prog_name="ldznet")
    found.append((result.exit_code, result.stdout, [x for x in {SLOW} if x in sys.modules]))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers():
    command = [sys.executable, "-c", ASK, json.dumps(COMMANDS)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    return dict(zip(COMMANDS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_answers_without_loading_torch_or_ray(answers, command):
    status, shown, loaded = answers[command]
    assert status == 0
    assert shown.startswith(f"Usage: ldznet {' '.join(command)} ")
    assert loaded == []


def test_the_reference_is_up_to_date():
    """``make docs`` writes it."""
    assert PAGE.read_text(encoding="utf-8") == format_reference()


def test_the_reference_has_every_command_and_default():
    page = format_reference()
    for command in COMMANDS:
        assert f"## ldznet {' '.join(command)}\n" in page
    assert "| `--config` | required | YAML" in page
    assert "| `--batch` | `16` | Rows" in page
    assert "| `--heads`, `--no-heads` | `--heads` |" in page


def test_a_notebooks_backend_for_plots_stops_no_command():
    code = """
import sys
from jobs.__main__ import main
sys.argv = ["ldznet", "--help"]
try:
    main()
except SystemExit as left:
    assert left.code == 0
import matplotlib
print(matplotlib.get_backend())
"""
    environment = {**os.environ, "MPLBACKEND": "module://of_a_notebook.backend"}
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["agg"], done.stderr


def test_a_current_folder_that_was_removed_is_named(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'cd "$0" && rmdir "$0" && exec "$1" -m jobs inspect store'
    run = subprocess.run(
        ["bash", "-c", script, gone, sys.executable],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (run.returncode, "the current folder was removed" in run.stderr) == (2, True), run.stderr
