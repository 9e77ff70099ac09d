"""Real gloo processes that end at the moment which is hardest for the threads of their process group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Threads of the lowest class on the core of the main thread, which they get only when that one waits: they are sure to
# hold the tensors of the last collective when the main thread goes on after it.
LATE_THREADS = """
import glob, os

def gloo_threads():
    names = {int(path.split("/")[4]): open(path).read() for path in glob.glob("/proc/self/task/*/comm")}
    return [number for number, name in names.items() if name.startswith("pt_gloo")]

def make_them_late():
    core = min(os.sched_getaffinity(0))
    for number in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(number, {core})
    for number in gloo_threads():
        os.sched_setscheduler(number, os.SCHED_IDLE, os.sched_param(0))
"""

PROCESS = """
import sys
import torch
from accelerate import Accelerator
from late_threads import gloo_threads, make_them_late
from hf_selortho.batch_group import BatchGroup
from hf_selortho.process_watch import leave_process_group

accelerator = Accelerator(cpu=True)
torch.set_num_threads(1)
model = accelerator.prepare(torch.nn.Linear(64, 64))
model(torch.randn(4, 64)).sum().backward()
assert gloo_threads()
make_them_late()
BatchGroup().sum(torch.ones(3))
if sys.argv[1] == "leaves":
    del model
    leave_process_group(accelerator)
    assert not gloo_threads()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the classes of threads are those of Linux")


@pytest.fixture
def launch(tmp_path):
    """`launch("script.py", "argument")`: two processes of this script, which may import `late_threads`."""
    (tmp_path / "late_threads.py").write_text(LATE_THREADS)

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)

    return run


@pytest.mark.slow
def test_threads_that_are_late_end_no_process(launch, tmp_path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    ended = [launch(script, "leaves") for _ in range(2)]
    assert [result.returncode for result in ended] == [0, 0], ended[-1].stderr[-3000:]


@pytest.mark.slow
def test_threads_that_are_late_end_a_process_that_does_not_leave(launch, tmp_path) -> None:
    """This is what `leave_process_group` is there for: should torch mend it, this fails and that can go."""
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    assert any("terminate called" in launch(script, "stays").stderr for _ in range(5))
