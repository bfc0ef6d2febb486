"""The command line in processes that a test may kill or stop, without a start-up each.

A server process imports everything once and forks a child a command: a real process with its own
failpoints, whose death is a real one, in a tenth of the time. The server holds no thread and no
model when it forks.
"""

import json
import os
import subprocess
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Writers:
    """Starts ``ldznet`` commands; each child's output is in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num = 0
        self._open: set[int] = set()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        environment.pop("RAY_ADDRESS", None)
        self._server = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def _ask(self, *question):
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *arguments, failpoints="", folder=None, errors=".log"):
        """Start a command and return (process id, the file of its output).

        What it says on stderr goes to the file of that ending beside it.
        """
        self._num += 1
        log = self._folder / f"{self._num}.log"
        logs = str(log), str(log.with_suffix(errors))
        pid = self._ask("start", [str(a) for a in arguments], failpoints, logs, str(folder or ""))
        self._open.add(pid)
        return pid, log

    def wait(self, pid):
        """Wait until a child ends or is stopped; return its status, or minus the signal."""
        status = self._ask("wait", pid)
        if os.WIFSTOPPED(status):
            return -os.WSTOPSIG(status)
        self._open.discard(pid)
        return os.waitstatus_to_exitcode(status)

    def run(self, *arguments, failpoints=""):
        """Run a command to its end; return its status and its output."""
        pid, log = self.start(*arguments, failpoints=failpoints)
        return self.wait(pid), log.read_text()

    def run_in(self, folder, *arguments):
        """Run a command in a folder to its end, as ``subprocess.run`` does."""
        pid, log = self.start(*arguments, folder=folder, errors=".err")
        status, errors = self.wait(pid), log.with_suffix(".err")
        return subprocess.CompletedProcess(arguments, status, log.read_text(), errors.read_text())

    def close(self):
        """End the server and every child that is left."""
        for pid in self._open:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()


@pytest.fixture(scope="session")
def writers(tmp_path_factory):
    """The server of child processes, started once a session."""
    writers = Writers(tmp_path_factory.mktemp("writers"))
    yield writers
    writers.close()


def _serve():
    import_module("pipeline.encode.run")  # with torch and Ray: what a child need not import
    import_module("pipeline.upkeep.gc")

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        verb, *rest = json.loads(line)
        if verb == "start":
            pid = os.fork()
            if pid == 0:
                _run(*rest)
            answer = pid
        else:
            answer = os.waitpid(rest[0], os.WUNTRACED)[1]
        answers.write(f"{answer}\n")
        answers.flush()


def _run(arguments, failpoints, logs, folder):
    """Be the command, in the child."""
    from jobs.__main__ import main
    from pipeline.base.failpoints import set_failpoints

    status = 1
    try:
        for descriptor, log in enumerate(logs, start=1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        set_failpoints(failpoints)
        os.chdir(folder or ".")
        sys.argv = ["ldznet", *arguments]
        main()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:  # noqa: BLE001  # os._exit would drop it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
