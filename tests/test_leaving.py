"""Real gloo processes that end at the moment which is hardest for the threads of their process group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROCESS = """
import sys
import torch
from accelerate import Accelerator
from hf_selortho import SelOrthoSAE  # as in a training, where transformers is there before a group is
from hf_selortho.process_group import ProcessGroup, leave_process_group
from tests.gloo_threads import gloo_threads, gloo_threads_stay, make_them_late

accelerator = Accelerator(cpu=True)
torch.set_num_threads(1)
model = accelerator.prepare(torch.nn.Linear(64, 64))
model(torch.randn(4, 64)).sum().backward()
assert gloo_threads()
make_them_late()
ProcessGroup.of_run().sum(torch.ones(3))
if sys.argv[1] == "leaves":
    del model
    leave_process_group(accelerator)
    assert not gloo_threads_stay()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the classes of threads are those of Linux")


@pytest.fixture
def launch(tmp_path):
    """`launch("leaves")` or `launch("stays")`: two processes that do so after a collective."""
    script = tmp_path / "process.py"
    script.write_text(PROCESS)

    def run(what: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, script, what], capture_output=True, text=True, env=env, timeout=300, check=False
        )

    return run


@pytest.mark.slow
def test_threads_that_are_late_end_no_process(launch) -> None:
    ended = [launch("leaves") for _ in range(2)]
    assert [result.returncode for result in ended] == [0, 0], ended[-1].stderr[-3000:]


@pytest.mark.slow
def test_threads_that_are_late_end_a_process_that_does_not_leave(launch) -> None:
    """This is what `leave_process_group` is there for: should torch mend it, this fails and that can go."""
    assert any("terminate called" in launch("stays").stderr for _ in range(5))
