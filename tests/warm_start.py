"""Starts scripts/train.py over and over without importing torch and transformers each time, for tests that kill it.

A process of its own, which has imported everything once, reads orders as lines of JSON from its standard input and
answers each with a line. A run is a child of it, forked: from there on it does what `python scripts/train.py` does.

    {"start": [argument, ...], "environment": {...}, "output": file}   ->   {"pid": ...}
    {"wait": pid}                                                      ->   {"code": ...}, once it has ended

Linux and macOS only.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SCRIPT = "scripts/train.py"


class WarmStart:
    """The other end: `with WarmStart() as warm: pid = warm.start(arguments, output); code = warm.wait(pid)`."""

    def __enter__(self) -> WarmStart:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate(timeout=60)  # without orders it ends

    def start(self, arguments: list[str], output: Path, environment: dict[str, str] | None = None) -> int:
        """Process id of a new run."""
        return self._ask({"start": arguments, "environment": environment or {}, "output": str(output)})["pid"]

    def wait(self, pid: int, seconds: float = 300) -> int:
        """Exit code of a run, as subprocess has it, once the run has ended; one that does not end is killed."""
        self._tell({"wait": pid})
        hangs = not select.select([self._server.stdout], [], [], seconds)[0]
        if hangs:
            os.kill(pid, signal.SIGKILL)
        code = self._answer()["code"]
        assert not hangs, f"process {pid} did not end within {seconds:.0f} s"
        return code

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        self._tell(order)
        return self._answer()

    def _tell(self, order: dict[str, Any]) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())


def serve() -> None:
    """Follow orders until there are no more."""
    import scripts.train  # noqa: F401  all that a run imports at its start

    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                _become_run(order)
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _become_run(order: dict[str, Any]) -> None:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # that of all processes of the run
    for target, source in enumerate((nothing, output, output)):
        os.dup2(source, target)
    os.environ.update(order["environment"])
    sys.argv = [SCRIPT, *order["start"]]
    code: Any = 1
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001  what Python would do with it at the end of a script
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve()
