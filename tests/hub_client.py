"""A user's Python session against a loopback Hub: a process of its own, as the libraries read HF_ENDPOINT at import.

    with HubClient(hub, home) as client:
        print(client.run("print(1)"))  # what the code has printed
        answer = client.script("push_to_hub", "runs/x", "--repo_id", "acme/x")  # exit code, output, errors

The code of each call starts without the names of the calls before it; the modules stay imported, which saves seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import select
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds for one answer


class Answer(NamedTuple):
    """What a call has come to."""

    code: int
    out: str
    err: str


class HubClient:
    """The other end of the process."""

    def __init__(self, environment: dict[str, str], python: str = sys.executable) -> None:
        self._command = [python, str(Path(__file__).resolve())]
        self._environment = environment

    def __enter__(self) -> HubClient:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, env=self._environment, stdin=pipe, stdout=pipe, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)  # without orders it ends

    def run(self, code: str) -> str:
        """What the code prints; an AssertionError with its traceback if it raises."""
        answer = self._ask({"code": code})
        assert answer.code == 0, answer.err[-3000:]
        return answer.out

    def failure(self, code: str) -> str:
        """The last line of the traceback of code that raises."""
        answer = self._ask({"code": code})
        assert answer.code == 1, answer.out
        return answer.err.strip().splitlines()[-1]

    def script(self, name: str, *arguments: str) -> Answer:
        """What a script of the project does with these arguments."""
        return self._ask({"script": name, "arguments": arguments})

    def _ask(self, order: dict[str, Any]) -> Answer:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            self._process.kill()
            raise AssertionError(f"no answer within {PATIENCE} s to {order}")
        line = self._process.stdout.readline()
        assert line, "the client's process has ended"
        return Answer(**json.loads(line))


def serve() -> None:
    """Follow orders until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    for line in sys.stdin:
        order = json.loads(line)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = _follow(order)
        answers.write(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}) + "\n")
        answers.flush()


def _follow(order: dict[str, Any]) -> int:
    try:
        if "code" in order:
            exec(compile(order["code"], "code", "exec"), {"__name__": "__main__"})
        else:
            path = ROOT / "scripts" / f"{order['script']}.py"
            sys.argv = [str(path), *order["arguments"]]
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  what Python would do with it at the end of a script
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve()
