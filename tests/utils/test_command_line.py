from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_selortho.utils.command_line import without_secrets
from hf_selortho.utils.environment import use_all_cores

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "aB3" * 11


def test_accelerate_launch_with_several_processes_on_cpus_is_refused(tmp_path) -> None:
    """It starts a single process, whatever their number."""
    script = tmp_path / "script.py"
    script.write_text("from hf_selortho.utils.command_line import *\nrun_script(check_launcher)\nprint('trains')")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes"]

    def started(processes: str) -> subprocess.CompletedProcess[str]:
        command = [*launch, processes, str(script)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert started("1").stdout == "trains\n"
    refused = started("2")
    assert refused.stdout == "" and refused.returncode != 0
    assert "\nscript.py: error: accelerate launch starts a single process on CPUs" in refused.stderr
    assert f"torchrun --nproc_per_node N {script} --cpu ..." in refused.stderr


@pytest.mark.parametrize(
    "launcher",
    [
        "python",
        "python -m accelerate.commands.launch --quiet --cpu --num_processes 1",
        "python -m torch.distributed.run --standalone --nproc_per_node 1",
        "torchrun --standalone --nproc_per_node 1",
    ],
)
def test_the_command_is_what_was_typed(launcher, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from hf_selortho.utils.command_line import launch_command\nprint(launch_command('train'))")
    start = launcher.replace("torchrun", str(Path(sys.executable).with_name("torchrun")))
    start = start.replace("python ", f"{sys.executable} ", 1) if start.startswith("python ") else start
    start = sys.executable if start == "python" else start
    command = [*start.split(), str(script), "--layer", "3", "--resume_from_checkpoint", "au to", "--hub_token", TOKEN]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == f"{launcher} {script} --layer 3 --hub_token ***\n", done.stderr


def test_cores_are_shared_among_processes(monkeypatch) -> None:
    before = torch.get_num_threads()
    try:
        use_all_cores(threads=1)
        assert torch.get_num_threads() == 1
        use_all_cores()
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
        use_all_cores()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


SCRIPT = """
import sys
from hf_selortho.utils.command_line import run_script
from hf_selortho.errors import SelOrthoError

def main():
    if sys.argv[1] == "mistake":
        raise SelOrthoError("layer 99 is out of range:\\n choose 0 to 17")
    if sys.argv[1] == "secret":
        raise SelOrthoError(f"--hub_token {sys.argv[2]} and {sys.argv[3]}: refused")
    if sys.argv[1] == "bug":
        raise ZeroDivisionError
run_script(main)
"""


@pytest.mark.parametrize(("what", "code"), [("nothing", 0), ("mistake", 2), ("bug", 1)])
def test_exit_codes(what, code, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = subprocess.run([sys.executable, str(script), what], capture_output=True, text=True, check=False)
    assert result.returncode == code
    if what == "mistake":
        assert result.stderr == "script.py: error: layer 99 is out of range: choose 0 to 17\n"
    assert ("Traceback" in result.stderr) == (what == "bug")


@pytest.mark.parametrize(
    ("file", "module"), [("tool.py", "tool"), ("kit/__main__.py", "kit"), ("kit/tool.py", "kit.tool")]
)
def test_a_module_calls_itself_what_users_type(file, module, tmp_path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(SCRIPT)
    command = [sys.executable, "-m", module, "mistake"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stderr.startswith(f"python -m {module}: error: layer 99") and result.returncode == 2


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY"])
def test_secrets_of_the_environment_are_left_out(name, monkeypatch) -> None:
    monkeypatch.setenv(name, "0123456789abcdef")
    assert without_secrets("login(0123456789abcdef), 0123456789abcde") == "login(***), 0123456789abcde"
    monkeypatch.setenv(name, "")
    assert without_secrets("nothing is a secret") == "nothing is a secret"


def test_whatever_looks_like_a_token_of_the_hub_is_left_out() -> None:
    assert without_secrets(f"--token={TOKEN} --hub https://user:{TOKEN}@huggingface.co") == (
        "--token=*** --hub https://user:***@huggingface.co"
    )
    assert without_secrets("hf_selortho hf_hub_download hf_" + "a" * 19) == "hf_selortho hf_hub_download hf_" + "a" * 19


def test_an_error_on_the_screen_holds_no_secret(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, str(script), "secret", TOKEN, "0123456789abcdef"],
        env={**os.environ, "WANDB_API_KEY": "0123456789abcdef"},
        **{"capture_output": True, "text": True, "check": False},
    )
    assert (result.returncode, result.stderr) == (2, "script.py: error: --hub_token *** and ***: refused\n")
